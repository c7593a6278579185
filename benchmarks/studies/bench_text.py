"""What a policy is told of a text, and what then came: traces of several texts beside each other.

    sglang serve ... --speculative-algorithm CAST --cast-trace FILE --cast-trace-full   # record
    python -m benchmarks.studies.bench_text NAME=FILE NAME=FILE --profile PROFILE --out DIR

From each trace: how far calibrated chances of first children are from what the target accepted, by
depth and kind of request; whether requests come in runs of right and wrong drafts that the chances
do not tell; what `auto` was promised of a layer and what its children then said; and `auto`
replayed beside itself with one budget for the batch, policy `fixed` and the fixed trees. All texts
are replayed by one table, so that differences are the texts'. A replay goes over the trace twice,
and the second time counts, when prices are known; where the table is that of the recording, both
start from the prices that its server had. Ranges hold 95 % of 1,000 draws of requests, or of runs
of ten steps. Writes `text.json` and `text.png`.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.pairs import OUT, Pair
from benchmarks.harness.provenance import provenance
from cast_sglang.costs.profiles import load_profile
from cast_sglang.costs.schema import CostTables
from cast_sglang.errors import CastError
from cast_sglang.policy.acceptance import DRAWN, GREEDY, KINDS, SAMPLED
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.lookahead import Lookahead
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.fixed_trees import FIXED_TREES, fits, replay_tree
from cast_sglang.trace.records import Trace, TracedRequest, candidate_parents, unpacked
from cast_sglang.trace.replay import Replay, ReplayedStep, make_policy

DEPTHS = ((1, "1"), (2, "2"), (4, "3 to 4"), (8, "5 to 8"))  # last of each bucket, as calibration's
BINS = np.linspace(0.0, 1.0, 11)
FEWEST = 30  # first children of a point that is drawn
DRAWS, BLOCK = 1000, 10
# Octaves of batch size that are replayed: those that most steps of a benchmark are of.
SIZES = ((1, 1), (5, 8), (17, 32))
# Depths whose reliability is drawn.
LINES = {"1": "o-", "3 to 4": "D--"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Judged(NamedTuple):
    """Nodes of the text's own path, whose children the target has judged; one entry each."""

    requests: np.ndarray  # int
    steps: np.ndarray  # int
    kinds: np.ndarray  # of `KINDS`
    depths: np.ndarray  # of the children
    drafted: np.ndarray  # probability of the first child, by the draft
    chances: np.ndarray  # the same, calibrated
    sums: np.ndarray  # chances of all children
    first: np.ndarray  # bool, the text went on with the first child
    any: np.ndarray  # bool, with one of the children


class WatchedLookahead(Lookahead):
    """Keeps what each layer was promised to hold, and what its children then said."""

    def __init__(self, max_layers: int, max_nodes: int) -> None:
        super().__init__(max_layers, max_nodes)
        self.layers: list[tuple[int, float, float]] = []  # depth of the parents, promised, brought

    def learn(
        self, depth: int, parent_scores: torch.Tensor | None, child_probs: torch.Tensor
    ) -> None:
        """Compare the children with those that the means promise, then count them."""
        if parent_scores is not None and self._sums.size:
            below = child_probs.view(len(parent_scores), -1, child_probs.shape[1]).sum(2)
            parents = parent_scores[:, : below.shape[1]]
            promised = float(parents.sum(1).mean()) * float(self._means[depth].sum())
            self.layers.append((depth, promised, float((parents * below).sum(1).mean())))
        super().learn(depth, parent_scores, child_probs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    args = parse_args(argv)
    try:
        profile = load_profile(args.profile)
        texts = {}
        for name, path in args.traces:
            trace = read_trace(path)
            texts[name] = told(trace) | {"replays": replays(trace, profile, args.fixed)}
            print(f"{name}: {json.dumps(texts[name]['short'])}", flush=True)
    except (CastError, OSError) as error:
        print(f"bench_text: error: {error}", file=sys.stderr)
        return 1
    identity = trace.header.identity
    pair = Pair(identity.target.name, identity.draft.name)
    note = "Target and draft are those of the last trace."
    origin = provenance("benchmarks.studies.bench_text", argv, pair, note, {"fixed": args.fixed})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "text.json").write_text(
        json.dumps({"provenance": origin, "texts": texts}, indent=1) + "\n"
    )
    draw(texts, args.out / "text.png")
    print(args.out / "text.json")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("traces", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--profile", required=True, help="cost profile whose table times all")
    parser.add_argument(
        "--fixed",
        default="4-3-2.5-16",
        metavar="C1-C2-C3-R",
        help="of policy fixed (default: %(default)s, the published ones)",
    )
    parser.add_argument("--out", type=Path, default=OUT / "text", help="gets the results")
    args = parser.parse_args(argv)
    args.traces = [tuple(text.split("=", 1)) for text in args.traces]
    if any(len(pair) < 2 for pair in args.traces):
        parser.error("each trace as NAME=FILE")
    return args


def told(trace: Trace) -> dict[str, Any]:
    """Return what the calibrated chances of a trace told of its text."""
    nodes = judged(trace)
    closed = [r for s in trace.steps for r in s.requests if r.probs and not r.is_open]
    lengths = np.array([len(request.follows) for request in closed])
    reached = [float((lengths >= depth).mean()) for depth in range(1, trace.header.num_steps + 1)]
    roots = nodes.depths == 1
    parts = {
        f"{KINDS[kind]}, depth {label}": reliability(nodes, (nodes.kinds == kind) & among)
        for kind in (GREEDY, SAMPLED, DRAWN)
        for label, among in _buckets(nodes.depths)
        if ((nodes.kinds == kind) & among).sum() >= FEWEST
    }
    short = {
        "trees": len(lengths),
        "accepted": round(float(lengths.mean()), 3),
        "none": round(float((lengths == 0).mean()), 3),
        "five and more": round(float((lengths >= 5).mean()), 3),
        "runs": runs(nodes, roots, nodes.first),
        "runs beyond the chances": runs(nodes, roots, nodes.first - nodes.chances),
    }
    return {"short": short, "reached": reached, "reliability": parts}


def judged(trace: Trace) -> Judged:
    """Return the nodes of the texts' paths, the roots first of each tree."""
    rows: list[tuple[float, ...]] = []
    for step in trace.steps:
        for request in step.requests:
            rows += _judged_of(request, step.step, trace.header.topk)
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    is_bool = Judged._fields.index("first")
    return Judged(*columns[:is_bool], *(column.astype(bool) for column in columns[is_bool:]))


def _judged_of(request: TracedRequest, step: int, topk: int) -> Iterator[tuple[float, ...]]:
    if not request.probs:
        return
    probs = unpacked(request.probs, "float32")
    chances = unpacked(request.chances or request.probs, "float32")
    parents = candidate_parents(request, topk)
    greedy = request.target_probs and set(unpacked(request.target_probs, "float32")) <= {0.0, 1.0}
    kind = DRAWN if request.is_drawn else GREEDY if greedy else SAMPLED
    for depth, node in enumerate([-1, *request.follows], start=1):
        [children] = np.nonzero(parents == node)
        is_last = depth == len(request.follows) + 1
        if not len(children) or (is_last and request.is_open):
            return
        went_on = -1 if is_last else request.follows[depth - 1]
        sums = float(chances[children].sum())
        told_of = float(probs[children[0]]), float(chances[children[0]]), sums
        yield request.request, step, kind, depth, *told_of, went_on == children[0], went_on >= 0


def _buckets(depths: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    before = 0
    for last, label in DEPTHS:
        yield label, (depths > before) & (depths <= last)
        before = last


def reliability(nodes: Judged, among: np.ndarray) -> dict[str, Any]:
    """Return how far the chances of some nodes' first children are from what was accepted."""
    first, chances = nodes.first[among], nodes.chances[among]
    requests, places = np.unique(nodes.requests[among], return_inverse=True)
    which = np.clip(np.digitize(chances, BINS) - 1, 0, len(BINS) - 2)
    counts = np.bincount(which, minlength=len(BINS) - 1)
    told_of, seen = (
        np.bincount(which, part, minlength=len(counts)) for part in (chances, first.astype(float))
    )
    gaps = np.bincount(places, first - chances), np.bincount(places)

    def bias(chosen: np.ndarray) -> float:
        return float(gaps[0][chosen].sum() / gaps[1][chosen].sum())

    return {
        "nodes": int(among.sum()),
        "drafted": round(float(nodes.drafted[among].mean()), 4),
        "calibrated": round(float(chances.mean()), 4),
        "accepted": round(float(first.mean()), 4),
        "accepted_less_calibrated": drawn(bias, len(requests), 1),
        "error": round(float(abs(told_of - seen).sum() / among.sum()), 4),
        "any_calibrated": round(float(nodes.sums[among].mean()), 4),
        "any_accepted": round(float(nodes.any[among].mean()), 4),
        "points": [
            [told_of[i] / counts[i], seen[i] / counts[i], int(counts[i])]
            for i in range(len(counts))
            if counts[i] >= FEWEST
        ],
    }


def runs(nodes: Judged, roots: np.ndarray, values: np.ndarray) -> list[float]:
    """Return the correlation of a request's trees with its trees of the step before."""
    order = np.lexsort((nodes.steps[roots], nodes.requests[roots]))
    requests, steps = nodes.requests[roots][order], nodes.steps[roots][order]
    held = values[roots][order].astype(float)
    follows = (requests[1:] == requests[:-1]) & (steps[1:] == steps[:-1] + 1)
    before, after = held[:-1][follows], held[1:][follows]
    names = np.unique(requests[1:][follows])
    places = np.searchsorted(names, requests[1:][follows])
    of_request = [np.nonzero(places == i)[0] for i in range(len(names))]

    def correlation(chosen: np.ndarray) -> float:
        rows = np.concatenate([of_request[i] for i in chosen])
        return float(np.corrcoef(before[rows], after[rows])[0, 1])

    return drawn(correlation, len(names), 1)


def drawn(measure: Callable[[np.ndarray], float], count: int, block: int) -> list[float]:
    """Return a measure of all places, and the ends of what holds 95 % of draws of their blocks."""
    random = np.random.default_rng(0)
    blocks = np.array_split(np.arange(count), max(1, count // block))
    found = [
        measure(np.concatenate([blocks[i] for i in random.integers(len(blocks), size=len(blocks))]))
        for _ in range(DRAWS)
    ]
    ends = np.quantile(found, (0.025, 0.975))
    return [round(float(x), 4) for x in (measure(np.arange(count)), *ends)]


def replays(trace: Trace, tables: CostTables, fixed: str) -> dict[str, Any]:
    """Return how other ways to decide compare with `auto`, by octave of batch sizes."""
    header = trace.header
    shared = msgspec.structs.replace(header, shares_out=not header.shares_out)
    found: dict[str, Any] = {}
    for low, high in SIZES:
        steps = [step for step in trace.steps if low <= step.batch_size <= high]
        steps = [step for step in steps if not step.is_plain]
        if len(steps) < 2 * BLOCK:
            continue
        part = trace._replace(steps=steps)
        auto, lookahead = watched(trace)
        ours = twice(part, tables, auto)
        rows = {"auto": ours, "auto, one budget": twice(part._replace(header=shared), tables)}
        c1, c2, c3, r = (float(text) for text in fixed.split("-"))
        policy = make_policy("fixed", header, c1=c1, c2=c2, c3=c3, r=r)
        rows[f"fixed {fixed}"] = twice(part, tables, policy)
        trees = {
            f"tree {shape}": list(replay_tree(part, tables, shape, rewards=False))
            for shape in FIXED_TREES
            if fits(shape, header)
        }
        sizes = np.array([step.batch_size for step in steps])
        best = max(trees, key=lambda name: rate(trees[name], sizes))
        rows[f"best {best}"] = trees[best]
        promised: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for depth, told_of, brought in lookahead.layers:
            promised[depth].append((told_of, brought))
        found[f"{low} to {high}"] = {
            "steps": len(steps),
            "tok_s": round(rate(ours, sizes), 2),
            "accept_length": round(float(np.mean([1 + step.accepted for step in ours])), 3),
            "rows": round(float(np.mean([step.mean_rows for step in ours])), 2),
            "to_auto": {name: related(theirs, ours, sizes) for name, theirs in rows.items()},
            "lookahead": {
                depth: [len(pairs), *(round(float(x), 4) for x in np.mean(pairs, axis=0))]
                for depth, pairs in sorted(promised.items())
            },
        }
    return found


def watched(trace: Trace) -> tuple[AutoPolicy, WatchedLookahead]:
    """Return policy `auto` and its lookahead, which keeps what it promised."""
    policy = make_policy("auto", trace.header)
    assert isinstance(policy, AutoPolicy)
    lookahead = WatchedLookahead(trace.header.num_steps, trace.header.num_draft_tokens - 1)
    policy._lookahead = lookahead
    return policy, lookahead


def twice(trace: Trace, tables: CostTables, policy: TreePolicy | None = None) -> list[ReplayedStep]:
    """Replay a trace twice, by the table as it is; return the steps of the second time."""
    policy = policy or make_policy("auto", trace.header)
    for _ in range(2):
        steps = list(Replay(trace, tables, policy, rewards=False))
    return steps


def rate(steps: Sequence[ReplayedStep], sizes: np.ndarray) -> float:
    """Return tokens per second."""
    tokens = sizes * np.array([1.0 + step.accepted for step in steps])
    return float(tokens.sum() / sum(step.table_us for step in steps) * 1e6)


def related(
    steps: Sequence[ReplayedStep], base: Sequence[ReplayedStep], sizes: np.ndarray
) -> list[float]:
    """Return the speed of one replay over that of another of the same steps, with its range."""
    tokens, times = (
        np.array([[part(step) for step in side] for side in (steps, base)])
        for part in (lambda step: 1.0 + step.accepted, lambda step: step.table_us)
    )

    def ratio(chosen: np.ndarray) -> float:
        ours, theirs = (tokens * sizes)[:, chosen].sum(1) / times[:, chosen].sum(1)
        return float(ours / theirs)

    return drawn(ratio, len(sizes), BLOCK)


def draw(texts: dict[str, Any], path: Path) -> None:
    """Draw reliability, lookahead and how far texts go along their trees."""
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves, layers, depths = figure.subplots(1, 3)
    for color, (name, text) in zip(COLORS, texts.items(), strict=False):
        for key, part in text["reliability"].items():
            line = LINES.get(key.partition("depth ")[2])
            if line and part["points"]:
                told_of, seen, _ = zip(*part["points"], strict=True)
                curves.plot(told_of, seen, line, color=color, markersize=4, linewidth=0.9)
        for marker, (size, found) in zip("os^", text["replays"].items(), strict=False):
            rows = [row for row in found["lookahead"].values() if row[0] >= BLOCK]
            label = f"{name}, batch {size}"
            layers.plot(
                *([row[i] for row in rows] for i in (1, 2)),
                color=color,
                marker=marker,
                label=label,
                linewidth=0.7,
            )
        depths.plot(range(1, 1 + len(text["reached"])), text["reached"], color=color, label=name)
        same = np.array(text["reached"][0]) ** np.arange(1, 1 + len(text["reached"]))
        depths.plot(range(1, 1 + len(same)), same, color=color, linestyle=":")
    for axes in (curves, layers):
        most = 1.0 if axes is curves else axes.get_xlim()[1]
        axes.plot([0, most], [0, most], color="0.6", linewidth=0.8)
    curves.set_title("First children: depth 1, dashed 3 to 4", loc="left")
    curves.set(xlabel="calibrated chance", ylabel="share accepted")
    layers.set_title("Layers that auto grew, by depth", loc="left")
    layers.set(xlabel="tokens promised", ylabel="tokens its children said")
    layers.legend(frameon=False, fontsize=8)
    depths.set_title("Text in the whole envelope", loc="left")
    depths.set(xlabel="depth", ylabel="share of trees accepted so far", ylim=(0, 1))
    depths.legend(frameon=False, title="dotted: depth 1 to the power", fontsize=8)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
