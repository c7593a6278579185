"""What each rule of CAST brings and how much its settings matter, from one trace, without a server.

    sglang serve ... --speculative-algorithm CAST --cast-trace FILE --cast-trace-full   # record
    python -m benchmarks.studies.bench_sweep FILE --profile PROFILE --out DIR

Replays the trace (`cast-sglang replay`) once for each setting of policy `fixed`: its rules switched
off by a price of 0, each price and R alone scaled up and down; once for each other policy; and once
for each of SGLang's fixed trees, chains of every length among them. All of them decide on the same
recorded steps and are timed by the same table, so the speeds differ by the setting alone: no clock
and no other text. A trace of whole envelopes (`--cast-trace-full`) knows the fate of every node
that a setting could choose. Writes `sweep.json` and `sweep.svg`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness.pairs import OUT, Pair
from benchmarks.harness.provenance import provenance
from cast_sglang.errors import CastError
from cast_sglang.policy.turns import Shape
from cast_sglang.trace.fixed_trees import FIXED_TREES, fits, replay_tree
from cast_sglang.trace.session import TraceSession, open_session
from cast_sglang.trace.summary import BatchSummary, compare

BASE = {"c1": 2.0, "c2": 2.0, "c3": 1.5, "r": 16}
RULES = {"without DR": ("c3",), "without DP": ("c2",), "without BP": ("c1",)}
FACTORS = (0.25, 0.5, 2.0, 4.0)
POLICIES = ("auto", "full-width", "eagle")
# Of a batch size that is drawn; fewer, such as those while requests end, say nothing.
FEWEST_STEPS = 20
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKERS = "osD^"
RELATIVE = "tokens/s relative to the base"


class Setting(NamedTuple):
    """One way to decide."""

    name: str
    group: str  # base | rules | c1 | c2 | c3 | r | policies | trees
    factor: float | None  # of the setting that the group is named after
    policy: str
    thresholds: Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; return the exit code."""
    args = parse_args(argv)
    try:
        session = open_session(
            args.trace, args.profile, allow_foreign=False, corrects=False, seed=0
        )
        console = Console(stderr=True)
        rows = []
        for setting in track(list(settings(args.base)), console=console, description="replaying"):
            rows += rows_of(setting, session)
        trees = [shape for shape in FIXED_TREES if fits(shape, session.trace.header)]
        for shape in track(trees, console=console, description="fixed trees"):
            setting = Setting(f"EAGLE-3 {shape}", "trees", None, "eagle", {})
            rows += [_row(setting, comparison) for comparison in _replayed(shape, session)]
        relate(rows)
        identity = session.trace.header.identity
        pair = Pair(identity.target.name, identity.draft.name)
        origin = provenance("benchmarks.studies.bench_sweep", argv, pair, "", {"base": args.base})
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "sweep.json"
        content = {"provenance": origin, "is_full": session.trace.header.is_full, "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")
        draw(rows, args.out / "sweep.svg")
    except (CastError, OSError) as error:
        print(f"bench_sweep: error: {error}", file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(rows))
    print(path)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", type=Path, help="recorded with --cast-trace")
    parser.add_argument(
        "--profile", default="auto", help="cost profile (default: search for the recording's)"
    )
    parser.add_argument(
        "--prices",
        default="2-2-1.5",
        metavar="C1-C2-C3",
        help="of the base that all settings are compared with (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=OUT / "sweep", help="gets the results")
    args = parser.parse_args(argv)
    try:
        c1, c2, c3 = (float(price) for price in args.prices.split("-"))
    except ValueError:
        parser.error(f"--prices {args.prices}: must be three numbers, such as 2-2-1.5")
    args.base = {**BASE, "c1": c1, "c2": c2, "c3": c3}
    return args


def settings(base: Mapping[str, float]) -> Iterator[Setting]:
    """Yield the base and everything that is compared with it."""
    yield Setting("base", "base", None, "fixed", base)
    switched = {**RULES, "without all three": ("c1", "c2", "c3")}
    for name, keys in switched.items():
        yield Setting(name, "rules", None, "fixed", {**base, **dict.fromkeys(keys, 0.0)})
    for key in base:
        for factor in FACTORS:
            value = factor * base[key]
            changed = {**base, key: int(value) if key == "r" else value}
            yield Setting(f"{key.upper()} {value:g}", key, factor, "fixed", changed)
    for policy in POLICIES:
        yield Setting(policy, "policies", None, policy, {})


def rows_of(setting: Setting, session: TraceSession) -> list[dict[str, Any]]:
    """Replay one setting; return a row for each batch size, and one for all (batch 0)."""
    replayed = session.replay(setting.policy, dict(setting.thresholds))
    return [_row(setting, comparison) for comparison in replayed.rows]


def _replayed(shape: Shape, session: TraceSession) -> list[BatchSummary]:
    """Replay one fixed tree; rows as of `TraceSession.replay`."""
    options = {"correct": session.corrects, "seed": session.seed}
    replay = replay_tree(session.trace, session.profile, shape, **options)
    return compare(session.trace, list(replay))


def _row(setting: Setting, comparison: BatchSummary) -> dict[str, Any]:
    side = comparison.replayed
    return {
        "setting": setting.name,
        "group": setting.group,
        "factor": setting.factor,
        "policy": setting.policy,
        "thresholds": dict(setting.thresholds),
        "batch": comparison.batch_size,
        "steps": comparison.steps,
        "tok_s": round(side.tokens_per_second, 3),
        "layers": round(side.layers, 3),
        "rows": round(side.rows, 3),
        "accept_length": round(side.accept_length, 4),
        "assumed_share": round(comparison.assumed_share, 4),
    }


def relate(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row its speed relative to the base's at its batch size, as `vs_base`."""
    base = {row["batch"]: row["tok_s"] for row in rows if row["group"] == "base"}
    for row in rows:
        row["vs_base"] = round(row["tok_s"] / base[row["batch"]], 4)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw speed against each setting's factor, and what the rules bring, per batch size."""
    steps = drawn_batches(rows)
    figure, panels = pyplot.subplots(
        2, len(steps), figsize=(6.0 * len(steps), 7.2), squeeze=False, layout="constrained"
    )
    for column, (batch, num_steps) in enumerate(steps.items()):
        ours = [row for row in rows if row["batch"] == batch]
        lines, bars = panels[0][column], panels[1][column]
        for key, color, marker in zip(BASE, COLORS, MARKERS, strict=True):
            points = [(1.0, 1.0)] + [(r["factor"], r["vs_base"]) for r in ours if r["group"] == key]
            look = {"color": color, "marker": marker, "label": key.upper()}
            lines.plot(*zip(*sorted(points), strict=True), **look)
        lines.set_xscale("log", base=2)
        lines.set_xticks([1.0, *FACTORS], [f"{f:g}" for f in (1.0, *FACTORS)])
        lines.minorticks_off()
        lines.set_title(f"Batch size {batch}: {num_steps} steps, replayed", loc="left")
        lines.set(xlabel="setting, as a multiple of its base value", ylabel=RELATIVE)
        lines.grid(axis="y", alpha=0.25)
        lines.legend(frameon=False)
        named = [row for row in ours if row["group"] in ("rules", "policies")]
        bars.barh([row["setting"] for row in named], [row["vs_base"] for row in named], color="0.6")
        bars.axvline(1.0, color="black", linewidth=0.8)
        bars.invert_yaxis()
        bars.set(xlabel=RELATIVE)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def drawn_batches(rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the steps of each batch size that has enough of them, or of the one with the most."""
    found = {r["batch"]: r["steps"] for r in rows if r["group"] == "base" and r["batch"]}
    least = min(FEWEST_STEPS, max(found.values()))
    return {batch: steps for batch, steps in sorted(found.items()) if steps >= least}


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    headings = ("setting", "batch", "tokens/s", "vs base", "layers", "rows", "accept length")
    table = Table(*headings)
    for row in sorted(rows, key=lambda row: row["batch"]):
        table.add_row(
            row["setting"],
            str(row["batch"] or "all"),
            f"{row['tok_s']:.1f}",
            f"{row['vs_base']:.3f}",
            f"{row['layers']:.2f}",
            f"{row['rows']:.1f}",
            f"{row['accept_length']:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
