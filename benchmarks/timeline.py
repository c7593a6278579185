"""Time line of one decoding step on a GPU, simulated: python -m benchmarks.timeline

    python -m benchmarks.timeline --profile FILE --batch 1,4,16,64 --out DIR
    python -m benchmarks.timeline --example draft=100,verify=5000,extend=130 --out DIR

Compares SGLang's static draft graph with the ways in which a CAST step could be driven
(`benchmarks/step_designs.py` says which), before or beside measurements: which of them loses how
many microseconds a step to launches, waits and passes that are not needed. It simulates; no number
of it is a measurement.

The device times are those of a cost profile, or with --example made-up ones: a pass takes the given
time up to --knee rows, all requests together, and in proportion beyond. The knee of 206 is that of
an H200 by its data sheet, 989 TFLOP/s over 4.8 TB/s, for weights of two bytes.

DIR gets timeline.json, with the inputs, totals and spans of each design, and one picture for each
batch size.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.step_designs import (
    DESIGNS,
    HostCosts,
    PassTimes,
    Setting,
    Tree,
    program,
    useful_us,
)
from benchmarks.step_simulation import DEVICE, HOST, Timeline, simulate
from cast_sglang.cost import CostModel
from cast_sglang.errors import CastError
from cast_sglang.profiles import load_profile

NUM_STEPS = 8
# The step that is shown; those before fill the pipeline.
SHOWN_STEP = 5
KNEE_ROWS = 206
EXAMPLE_NAMES = ("draft", "verify", "extend")
STATIC = Tree(passes=4, width=4, rows=8)  # SGLang's steps 5, topk 4, 8 tokens
ENVELOPE = Tree(passes=7, width=8, rows=32)
# What CAST's policy might choose, from roomy to tight.
TREES = {1: Tree(5, 8, 24), 4: Tree(4, 6, 12), 16: Tree(3, 4, 8), 64: Tree(1, 2, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate; return the exit code."""
    args = parse_args(argv)
    try:
        batches = [simulate_batch(args, index) for index in range(len(args.batch))]
        args.out.mkdir(parents=True, exist_ok=True)
        result = {"inputs": inputs(args), "batches": batches}
        (args.out / "timeline.json").write_text(json.dumps(result, indent=1) + "\n")
        from benchmarks.timeline_figure import draw_timeline

        for batch in batches:
            draw_timeline(batch, title(args, batch), args.out / f"batch-{batch['batch']}.svg")
    except (CastError, OSError, ValueError) as error:
        print(f"timeline: error: {error}", file=sys.stderr)
        return 2
    print_table(batches)
    print(args.out / "timeline.json")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--profile", type=Path, metavar="FILE", help="cost profile")
    source.add_argument(
        "--example",
        type=read_example,
        metavar="draft=US,verify=US,extend=US",
        help="made-up device times instead",
    )
    parser.add_argument("--knee", type=int, default=KNEE_ROWS, metavar="ROWS", help="of --example")
    parser.add_argument("--context", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--batch", type=list_of_ints, default=list(TREES), metavar="LIST", help="(1,4,16,64)"
    )
    parser.add_argument(
        "--trees",
        type=lambda text: [read_tree(part) for part in text.split(",")],
        metavar="LIST",
        help="PASSES-WIDTH-ROWS of CAST's tree, one for each batch size (default: of the next "
        "smaller of " + ", ".join(f"{b}: {'-'.join(map(str, t))}" for b, t in TREES.items()) + ")",
    )
    for name, tree in (("static", STATIC), ("envelope", ENVELOPE)):
        parser.add_argument(
            f"--{name}",
            type=read_tree,
            default=tree,
            metavar="PASSES-WIDTH-ROWS",
            help=f"(default: {'-'.join(map(str, tree))})",
        )
    parser.add_argument(
        "--no-overlap", action="store_true", help="without SGLang's overlap schedule"
    )
    for field in dataclasses.fields(HostCosts):
        option = f"--host-{field.name.replace('_', '-')}"
        parser.add_argument(
            option, type=float, default=field.default, metavar="US", help="(default: %(default)s)"
        )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    if min(args.batch) < 1:
        parser.error("--batch must be at least 1")
    if args.trees is None:
        args.trees = [TREES[max(b for b in TREES if b <= batch)] for batch in args.batch]
    if len(args.trees) != len(args.batch):
        parser.error(f"--trees has {len(args.trees)} trees for {len(args.batch)} batch sizes")
    for tree in args.trees:
        if tree.passes > args.envelope.passes or tree.width > args.envelope.width:
            parser.error(f"--trees: {'-'.join(map(str, tree))} is larger than --envelope")
    return args


def simulate_batch(args: argparse.Namespace, index: int) -> dict[str, Any]:
    """Simulate every design at one batch size."""
    batch = args.batch[index]
    setting = Setting(
        times=pass_times(args, batch),
        host=host_costs(args),
        tree=args.trees[index],
        envelope=args.envelope,
        static=args.static,
        has_overlap=not args.no_overlap,
    )
    designs = [describe(setting, design) for design in DESIGNS]
    return {"batch": batch, "tree": setting.tree._asdict(), "designs": designs}


def describe(setting: Setting, design: str) -> dict[str, Any]:
    """Simulate a design and return totals and spans of a step in steady state."""
    host = setting.host
    whole = simulate(program(setting, design, NUM_STEPS), host.read_us, host.latency_us)
    ends = [span.end_us for span in whole.spans if (span.track, span.name) == (DEVICE, "extend")]
    begin, end = ends[SHOWN_STEP - 1], ends[SHOWN_STEP]
    step = whole.cut(begin, end)
    period, useful = end - begin, useful_us(setting, design)
    busy = step.total_us(DEVICE)
    return {
        "design": design,
        "step_us": round(period, 1),
        "useful_us": round(useful, 1),
        "lost_us": round(period - useful, 1),
        "lost_share": round((period - useful) / period, 4),
        "device_idle_us": round(period - busy, 1),
        "surplus_us": round(step.total_us(DEVICE, "surplus"), 1),
        "policy_us": round(step.total_us(DEVICE, "policy"), 1),
        "host_launch_us": round(step.total_us(HOST, "launch"), 1),
        "host_work_us": round(step.total_us(HOST, "work"), 1),
        "host_wait_us": round(step.total_us(HOST, "wait"), 1),
        "host_wait_share": round(step.total_us(HOST, "wait") / period, 4),
        "spans": relative(step, begin),
    }


def relative(timeline: Timeline, begin_us: float) -> list[list[Any]]:
    """Return spans as lists, from the begin of the step."""
    return [
        [s.track, s.kind, s.name, round(s.begin_us - begin_us, 2), round(s.end_us - begin_us, 2)]
        for s in timeline.spans
    ]


def pass_times(args: argparse.Namespace, batch: int) -> PassTimes:
    """Return device times from the profile or the example."""
    if args.example is not None:

        def flat(name: str) -> Any:
            return lambda rows: args.example[name] * max(1.0, batch * rows / args.knee)

        return PassTimes(*(flat(name) for name in EXAMPLE_NAMES))
    most = [*args.trees, args.envelope, args.static]
    model = CostModel(
        load_profile(args.profile),
        max_batch_size=batch,
        max_context=args.context,
        max_verify_tokens=max(tree.rows for tree in most),
        max_width=max(tree.width for tree in most),
        max_extend_rows=max(tree.passes for tree in most) + 2,
    )
    costs = model.step_costs(batch, args.context)
    tables = (costs.draft, costs.verify, costs.draft_extend)
    times = [[float(cost) * costs.unit_us for cost in table] for table in tables]
    draft, verify, extend = times
    return PassTimes(
        lambda n: draft[n - 1],
        lambda n: verify[n - 1],
        lambda n: extend[n - 1],
    )


def host_costs(args: argparse.Namespace) -> HostCosts:
    """Return the host's times from the command line."""
    names = [field.name for field in dataclasses.fields(HostCosts)]
    return HostCosts(**{name: getattr(args, f"host_{name}") for name in names})


def inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers rest on."""
    source: dict[str, Any] = {"profile": str(args.profile)}
    if args.example is not None:
        source = {"example": args.example, "knee_rows": args.knee, "is_measured": False}
    return {
        **source,
        "context": args.context,
        "host": dataclasses.asdict(host_costs(args)),
        "static": args.static._asdict(),
        "envelope": args.envelope._asdict(),
        "overlap": not args.no_overlap,
    }


def title(args: argparse.Namespace, batch: dict[str, Any]) -> str:
    """Return the title of a picture."""
    source = "made-up device times" if args.example is not None else args.profile.stem
    tree = "-".join(map(str, batch["tree"].values()))
    return f"One step, simulated, batch {batch['batch']}, CAST's tree {tree}; {source}"


def print_table(batches: Sequence[dict[str, Any]]) -> None:
    """Show the totals to a person."""
    from rich.console import Console
    from rich.table import Table

    columns = ("step_us", "useful_us", "lost_us", "device_idle_us", "surplus_us", "host_wait_share")
    table = Table("batch", "design", *columns, title="Simulated, microseconds per step")
    for batch in batches:
        for row in batch["designs"]:
            cells = (
                f"{row[name]:.0%}" if "share" in name else f"{row[name]:.0f}" for name in columns
            )
            table.add_row(str(batch["batch"]), row["design"], *cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def read_tree(text: str) -> Tree:
    """Read PASSES-WIDTH-ROWS."""
    sizes = text.split("-")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no PASSES-WIDTH-ROWS such as 4-4-8")
    return Tree(*map(int, sizes))


def read_example(text: str) -> dict[str, float]:
    """Read draft=US,verify=US,extend=US."""
    try:
        found = {name: float(us) for name, us in (part.split("=") for part in text.split(","))}
    except ValueError:
        found = {}
    if sorted(found) != sorted(EXAMPLE_NAMES) or not all(us > 0 for us in found.values()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like draft=100,verify=5000,extend=130, in microseconds"
        )
    return found


def list_of_ints(text: str) -> list[int]:
    """Read numbers such as 1,4."""
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
