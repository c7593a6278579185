"""How fast `auto` finds its tree on machines whose tables are wrong: simulated, no server.

    python -m benchmarks.studies.bench_machines --out DIR

Every machine of `tests/support/machines.py` serves every kind of text at batch size 1, 8 and 32,
from a first start (nothing is known but the table) and from a restart (acceptance, prices and
corrections of a server with other text are there). Rates are relative to the fixed tree that is
best in hindsight at true costs. Writes `machines.json` and the picture `machines.png`, and prints
the table.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.pairs import OUT
from cast_sglang.costs.correction import Residuals
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.auto import AutoPolicy
from tests.support.machines import LIMITS, MACHINES, Machine, Served, serve
from tests.support.simulator import LAYERS, SIZES, Text

BATCH_SIZES = (1, 8, 32)
# Ends of the parts of a run: of a cold server, of one that settles, and of one that has settled.
ENDS = (0, 100, 500, 1000)
STARTS = ("first start", "restart")
# Steps of the picture's curves that count together.
WINDOW = 50


def _bimodal(batch_size: int) -> float | np.ndarray:
    """Every other request is easy to draft, and every other one hard."""
    return np.tile([-2.0, 2.5], batch_size // 2) if batch_size > 1 else 0.25


def _changing(step: int) -> float:
    return 2.0 if step // 250 % 2 == 0 else -1.0


# Mean log odds of the draft's best child, as `Text` takes them.
TEXTS: dict[str, Callable[[int], object]] = {
    "easy": lambda batch_size: 2.0,
    "hard": lambda batch_size: -1.0,
    "random": lambda batch_size: -2.5,
    "bimodal": _bimodal,
    "changing": lambda batch_size: _changing,
}


class Row(NamedTuple):
    """One run."""

    machine: str
    text: str
    batch_size: int
    start: str
    rates: list[float]  # of each part, relative to the best fixed tree
    vs_plain: float  # of the last part
    curve: list[float]  # the same as `rates`, of every WINDOW steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    args = parse_args(argv)
    rows = []
    cells = list(product(args.machines, args.batches, TEXTS))
    for done, (machine, batch_size, text) in enumerate(cells, 1):
        rows += runs(machine, batch_size, text, args.seed)
        print(f"{done} of {len(cells)}: {machine}, batch {batch_size}, {text}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"seed": args.seed, "ends": ENDS, "rows": [row._asdict() for row in rows]}
    (args.out / "machines.json").write_text(json.dumps(content) + "\n")
    draw(rows, args.out / "machines.png")
    print("\n".join(table(rows)))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_machines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--machines",
        type=lambda text: text.split(","),
        default=list(MACHINES),
        metavar="LIST",
        help="(default: all)",
    )
    parser.add_argument(
        "--batches",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(BATCH_SIZES),
        metavar="LIST",
        help="(default: 1,8,32)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of machines and texts (default: 0)")
    parser.add_argument("--out", type=Path, default=OUT / "machines", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := set(args.machines) - set(MACHINES):
        parser.error(f"--machines: no {sorted(unknown)[0]}; there are {', '.join(MACHINES)}")
    return args


def runs(machine: str, batch_size: int, text: str, seed: int) -> list[Row]:
    """Serve a cell from a first start, and again after a server that served other text."""
    rows = []
    first = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True), Acceptance(), Residuals(LIMITS)
    mixed = Text(batch_size, seed + 100, 1.0)
    serve(first[0], Machine(machine, seed), mixed, batch_size, ENDS[2], *first[1:])
    for start in STARTS:
        parts = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True), Acceptance(), Residuals(LIMITS)
        if start == "restart":
            for part, earlier in zip(parts, first, strict=True):
                part.load_state(earlier.state())
        policy, acceptance, residuals = parts
        words = Text(batch_size, seed + 3, TEXTS[text](batch_size))
        run = serve(
            policy, Machine(machine, seed), words, batch_size, ENDS[-1], acceptance, residuals
        )
        rows.append(row_of(machine, text, batch_size, start, run))
    return rows


def row_of(machine: str, text: str, batch_size: int, start: str, run: Served) -> Row:
    """Sum up a run."""
    windows = range(0, ENDS[-1], WINDOW)
    return Row(
        machine=machine,
        text=text,
        batch_size=batch_size,
        start=start,
        rates=[run.rate(first, last) for first, last in zip(ENDS, ENDS[1:], strict=False)],
        vs_plain=run.result.rate(ENDS[-2]) / run.plain,
        curve=[run.rate(first, first + WINDOW) for first in windows],
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Return a table of geometric means over texts and batch sizes, the least in brackets."""
    parts = [f"steps {first} to {last}" for first, last in zip(ENDS, ENDS[1:], strict=False)]
    lines = [f"| machine | start | {' | '.join(parts)} | least, of plain |", "|---" * 6 + "|"]
    machines = list(dict.fromkeys(row.machine for row in rows))
    for machine, start in product([*machines, "all"], STARTS):
        of = [row for row in rows if row.start == start and machine in (row.machine, "all")]
        rates = np.array([row.rates for row in of])
        means = np.exp(np.log(rates).mean(axis=0))
        cells = [
            f"{m:.3f} ({least:.3f})" for m, least in zip(means, rates.min(axis=0), strict=True)
        ]
        plain = min(row.vs_plain for row in of)
        lines.append(f"| {machine} | {start} | {' | '.join(cells)} | {plain:.3f} |")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rate against the step, one panel a batch size: geometric mean and range."""
    batch_sizes = sorted({row.batch_size for row in rows})
    figure = Figure(figsize=(4.0 * len(batch_sizes), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0]
    steps = np.arange(WINDOW, ENDS[-1] + 1, WINDOW)
    for axis, batch_size in zip(axes, batch_sizes, strict=True):
        for start, color in zip(STARTS, ("tab:orange", "tab:blue"), strict=True):
            curves = np.array(
                [r.curve for r in rows if (r.batch_size, r.start) == (batch_size, start)]
            )
            axis.fill_between(
                steps, *np.quantile(curves, [0.1, 0.9], axis=0), color=color, alpha=0.2
            )
            axis.plot(steps, np.exp(np.log(curves).mean(axis=0)), color=color, label=start)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_title(f"batch {batch_size}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("rate / best fixed tree of hindsight")
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
