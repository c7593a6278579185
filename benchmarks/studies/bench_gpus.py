"""What CAST would choose and bring on GPUs that are not at hand: simulated, no server, no GPU.

    python -m benchmarks.studies.bench_gpus --out DIR

Times are those that `cast-sglang estimate` writes. Text is that of `tests/support/simulator.py`,
greedy. For each model and task one number is fitted, how easy the text is to draft: EAGLE's tree
has the paper's speed-up over plain decoding at the smallest batch size where the paper gives it.
Everything else is then a prediction: CAST at that batch size, and both at the next. Prints two
tables, and writes `gpus.json`.

Source of the published numbers: Hong, Tan, Hu (arXiv 2510.26577), temperature 0.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness.pairs import OUT
from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, StepCosts, plain_units
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.fixed import FixedPolicy
from cast_sglang.profiling.estimate import estimate_profile
from cast_sglang.profiling.gpus import GPUS, find_gpu
from tests.support.configs import LLAMA_8B, LLAMA_70B, QWEN2_7B, VICUNA_13B
from tests.support.simulator import (
    LAYERS,
    TOPK,
    Result,
    Text,
    fixed_rate,
    fixed_units,
    full_trees,
    gains_of,
    run,
)

# EAGLE's tree in the papers has 60 nodes beside the root, ten children a node and eight layers.
# The simulator has eight children.
MAX_ROWS = 61
SIZES = tuple(range(2, MAX_ROWS + 1))
EAGLE_TREE = (LAYERS, TOPK, MAX_ROWS)
STOCK_TREE = (5, 4, 8)
CHAIN = (3, 1, 4)
PAPER_PRICES = 4.0, 3.0, 2.5  # "about", says the paper, and that they depend on the model
CONTEXT = 512
# EAGLE-3 drafts are trained on their own output, so they are accepted as often in every layer.
DECAY = 0.0
EASES = np.linspace(-3.0, 6.0, 19)
STEPS = {1: 1600, 8: 800, 32: 400}  # by batch size; a step of more requests says more
WARM_UP = 100
TASKS = ("MT-bench", "HumanEval", "GSM8K", "Alpaca", "CNN/DM", "NQ")


class Published(NamedTuple):
    """A line of the paper's table: speed-ups of EAGLE and of CAST on each of `TASKS`."""

    batch_size: int
    model: str
    eagle: tuple[float, ...]
    cast: tuple[float, ...]


class Pair(NamedTuple):
    """A target, its draft and the GPUs that hold it."""

    target: Mapping[str, Any]
    draft: Mapping[str, Any] | None = None  # None for EAGLE-3
    tp_size: int = 1


QWEN2_EAGLE2 = {**QWEN2_7B, "architectures": ["Qwen2ForCausalLMEagle"], "num_hidden_layers": 1}
PAIRS = {
    "Vicuna 13B": Pair(VICUNA_13B),
    "Llama 3.3 70B": Pair(LLAMA_70B, tp_size=4),
    "Llama 3.1 8B": Pair(LLAMA_8B),
    "Qwen2 7B, EAGLE-2": Pair(QWEN2_7B, QWEN2_EAGLE2),
}
PUBLISHED = (
    Published(
        1, "Vicuna 13B", (3.70, 4.73, 4.00, 3.86, 3.68, 3.31), (3.98, 5.18, 3.98, 3.80, 3.76, 3.40)
    ),
    Published(
        1,
        "Llama 3.3 70B",
        (4.13, 4.98, 4.63, 4.66, 3.50, 3.61),
        (4.23, 5.23, 4.65, 4.83, 3.56, 3.67),
    ),
    Published(
        1,
        "Llama 3.1 8B",
        (3.60, 4.27, 3.82, 4.00, 3.22, 3.06),
        (3.77, 4.51, 3.95, 3.98, 3.32, 3.22),
    ),
    Published(
        8,
        "Llama 3.1 8B",
        (1.72, 1.97, 1.92, 2.16, 1.34, 1.72),
        (2.16, 2.62, 2.41, 2.62, 1.76, 2.11),
    ),
    Published(
        8,
        "Qwen2 7B, EAGLE-2",
        (1.25, 1.49, 1.40, 1.48, 1.11, 1.10),
        (1.86, 2.16, 2.19, 2.06, 1.70, 1.72),
    ),
)


class Costs(NamedTuple):
    """Costs of steps on a GPU at one batch size."""

    cast: StepCosts
    static: StepCosts  # without decisions, as a tree of one shape runs

    @property
    def plain(self) -> float:
        """Units of a step of plain decoding."""
        return plain_units(self.static)

    def static_speed(self, shape: tuple[int, int, int], gains: np.ndarray) -> float:
        """Return the speed-up of a fixed tree (steps, topk, tokens) over plain decoding."""
        return (1.0 + float(gains[shape[2] - 2])) * self.plain / fixed_units(self.static, shape)


class Gpus:
    """Costs of steps on GPUs, estimated once for each pair."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], tuple[CostModel, float]] = {}

    def costs(self, gpu: str, pair: str, batch_size: int) -> Costs:
        """Return the costs of a step at `CONTEXT`."""
        if (gpu, pair) not in self._models:
            limits = Limits(32, 2048, MAX_ROWS, TOPK, None, LAYERS + 1)
            of, data = PAIRS[pair], find_gpu(gpu)
            profile = estimate_profile(data, of.target, of.draft, limits, tp_size=of.tp_size)
            self._models[gpu, pair] = CostModel(profile, limits), data.rates.decision_seconds
        model, decision_seconds = self._models[gpu, pair]
        cast = model.step_costs(batch_size, CONTEXT)
        decision = decision_seconds * 1e6 / cast.unit_us
        static = cast._replace(
            draft=cast.draft - decision, draft_extend=cast.draft_extend - 2 * decision
        )
        return Costs(cast, static)


class Trees:
    """What trees of one shape are accepted of on text of any ease."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tables: dict[tuple[int, int, int], np.ndarray] = {}

    def gains(self, shape: tuple[int, int, int], ease: float) -> np.ndarray:
        """Return the accepted drafts to expect of the 1.. best nodes of full trees."""
        table = self._tables.get(shape)
        if table is None:
            table = np.stack([self._at(shape, each) for each in EASES])
            self._tables[shape] = table
        return np.array([np.interp(ease, EASES, column) for column in table.T])

    def ease(self, shape: tuple[int, int, int], accept_length: float) -> float:
        """Return the ease at which a step of such a tree brings so many tokens."""
        lengths = [1.0 + float(self.gains(shape, ease)[shape[2] - 2]) for ease in EASES]
        if not lengths[0] <= accept_length <= lengths[-1]:
            raise ValueError(f"no text has an accept length of {accept_length:.2f}")
        return float(np.interp(accept_length, lengths, EASES))

    def _at(self, shape: tuple[int, int, int], ease: float) -> np.ndarray:
        steps, topk, _ = shape
        requests = text_of(1, self._seed, ease)
        for _ in range(1200):
            requests.advance()
        return gains_of(full_trees(requests.all_at_once(), topk)[:steps], MAX_ROWS)


def text_of(batch_size: int, seed: int, ease: float) -> Text:
    """Return greedy requests of one ease."""
    return Text(batch_size, seed, ease, np.ones(batch_size, bool), decay=DECAY)


class Served(NamedTuple):
    """A run of CAST, and how fast it was, relative to EAGLE's tree on the same text."""

    result: Result
    to_eagle: float


def serve(policy: TreePolicy, costs: Costs, batch_size: int, ease: float, seed: int) -> Served:
    """Serve text by a policy of CAST; as in a server, only `auto` uses calibrated chances.

    Text is easier here and harder there, so both trees are judged by the same steps.
    """
    text = text_of(batch_size, seed, ease)
    acceptance = Acceptance() if isinstance(policy, AutoPolicy) else None
    steps = STEPS[batch_size]
    result = run(policy, text, costs.cast, batch_size, steps, acceptance, max_rows=MAX_ROWS)
    eagle = fixed_rate(costs.static, text, EAGLE_TREE, WARM_UP, max_rows=MAX_ROWS)
    return Served(result, result.rate(WARM_UP) / eagle)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    args = parse_args(argv)
    gpus, trees = Gpus(), Trees(args.seed)
    eases = fit(gpus, trees, args.paper_gpu)
    published = [
        compare(gpus, trees, line, n, eases[line.model, n], args)
        for line in PUBLISHED
        for n in range(len(TASKS))
    ]
    ease = eases["Llama 3.1 8B", 0]
    elsewhere = [
        look(gpus, trees, gpu, batch_size, ease, args.seed)
        for gpu in args.gpus
        for batch_size in (1, 8, 32)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "simulated": True,
        "seed": args.seed,
        "paper_gpu": args.paper_gpu,
        "published": published,
        "gpus": elsewhere,
    }
    (args.out / "gpus.json").write_text(json.dumps(content) + "\n")
    print("\n".join([*published_table(published), "", *gpu_table(elsewhere)]))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_gpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--paper-gpu",
        default="A800",
        choices=list(GPUS),
        metavar="GPU",
        help="on which the paper's numbers are taken to be measured (default: A800)",
    )
    parser.add_argument(
        "--gpus",
        type=lambda text: text.split(","),
        default=list(GPUS),
        metavar="LIST",
        help="of the second table (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the text (default: 0)")
    parser.add_argument("--out", type=Path, default=OUT / "gpus", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.gpus) - set(GPUS):
        parser.error(f"--gpus: no {sorted(unknown)[0]}; there are {', '.join(GPUS)}")
    return args


def fit(gpus: Gpus, trees: Trees, gpu: str) -> dict[tuple[str, int], float]:
    """Return the ease of the text of each model and task."""
    eases: dict[tuple[str, int], float] = {}
    for line in PUBLISHED:
        costs = gpus.costs(gpu, line.model, line.batch_size)
        units = fixed_units(costs.static, EAGLE_TREE) / costs.plain
        for n, speed in enumerate(line.eagle):
            if (line.model, n) not in eases:
                eases[line.model, n] = trees.ease(EAGLE_TREE, speed * units)
    return eases


def compare(
    gpus: Gpus, trees: Trees, line: Published, n: int, ease: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the published and the simulated speed-ups of a model on a task."""
    print(f"{line.model}, batch {line.batch_size}, {TASKS[n]}", file=sys.stderr)
    costs = gpus.costs(args.paper_gpu, line.model, line.batch_size)
    gains = trees.gains(EAGLE_TREE, ease)
    policies = {
        "auto": AutoPolicy(SIZES, LAYERS, True),
        "fixed": FixedPolicy(*PAPER_PRICES, r=CastConfig().r, verify_sizes=SIZES),
    }
    eagle = costs.static_speed(EAGLE_TREE, gains)
    simulated = {
        name: eagle * serve(policy, costs, line.batch_size, ease, args.seed + n).to_eagle
        for name, policy in policies.items()
    }
    return {
        "batch_size": line.batch_size,
        "model": line.model,
        "task": TASKS[n],
        "accept_length": 1.0 + float(gains[EAGLE_TREE[2] - 2]),
        "eagle": {"published": line.eagle[n], "simulated": eagle},
        "cast": {"published": line.cast[n], **simulated},
    }


def look(
    gpus: Gpus, trees: Trees, gpu: str, batch_size: int, ease: float, seed: int
) -> dict[str, Any]:
    """Return what CAST chooses and brings on a GPU, beside static trees."""
    print(f"{gpu}, batch {batch_size}", file=sys.stderr)
    costs = gpus.costs(gpu, "Llama 3.1 8B", batch_size)
    served = serve(AutoPolicy(SIZES, LAYERS, True), costs, batch_size, ease, seed)
    statics = {
        "-".join(map(str, shape)): costs.static_speed(shape, trees.gains(shape, ease))
        for shape in (EAGLE_TREE, STOCK_TREE, CHAIN)
    }
    return {
        "gpu": gpu,
        "batch_size": batch_size,
        "plain_ms": costs.plain * costs.static.unit_us / 1e3,
        "static": statics,
        "cast": statics["-".join(map(str, EAGLE_TREE))] * served.to_eagle,
        "layers": float(served.result.layers[WARM_UP:].mean()),
        "rows": float(served.result.rows[WARM_UP:].mean()),
        "plain_share": float(served.result.is_plain[WARM_UP:].mean()),
    }


def published_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of published and simulated speed-ups, a line for each arm of a model."""
    lines = [
        f"| batch | model | arm | {' | '.join(TASKS)} | geometric mean |",
        f"|---|---|---|{'---|' * (len(TASKS) + 1)}",
    ]
    arms = (
        ("EAGLE, published", "eagle", "published"),
        ("EAGLE, simulated", "eagle", "simulated"),
        ("CAST, published", "cast", "published"),
        ("CAST `fixed`, simulated", "cast", "fixed"),
        ("CAST `auto`, simulated", "cast", "auto"),
    )
    for key in dict.fromkeys((row["batch_size"], row["model"]) for row in rows):
        of = [row for row in rows if (row["batch_size"], row["model"]) == key]
        for arm, method, kind in arms:
            speeds = [row[method][kind] for row in of]
            cells = [f"{speed:.2f}" for speed in speeds]
            mean = float(np.exp(np.log(speeds).mean()))
            lines.append(f"| {key[0]} | {key[1]} | {arm} | {' | '.join(cells)} | {mean:.2f} |")
        lengths = [f"{row['accept_length']:.2f}" for row in of]
        mean = float(np.mean([row["accept_length"] for row in of]))
        lines.append(
            f"| {key[0]} | {key[1]} | accept length of EAGLE, simulated | "
            f"{' | '.join(lengths)} | {mean:.2f} |"
        )
    return lines


def gpu_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of GPUs, relative to plain decoding."""
    statics = list(rows[0]["static"])
    lines = [
        f"| GPU | batch | plain step, ms | {' | '.join(statics)} | CAST | layers | rows | plain |",
        f"|---|---|---|{'---|' * (len(statics) + 4)}",
    ]
    for row in rows:
        speeds = " | ".join(f"{row['static'][name]:.2f}" for name in statics)
        lines.append(
            f"| {row['gpu']} | {row['batch_size']} | {row['plain_ms']:.1f} | {speeds} | "
            f"{row['cast']:.2f} | {row['layers']:.1f} | {row['rows']:.1f} | "
            f"{row['plain_share']:.0%} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
