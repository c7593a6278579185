"""Decoding speed of several ways to serve one model, measured side by side.

    python benchmarks/bench_serving.py --arms plain,static-grid,adaptive,cast:auto,cast:fixed \\
        --batches 1,8,32 --temperatures 0,1 --tasks code,hostile --repeats 3 --out DIR

All servers are up at once, or as many as fit into memory; those that are not measured sleep. A run
starts `batch` requests of the same length together and counts tokens from the moment all of them
stream until the first one ends, so every step counted has exactly `batch` requests and no prefill.
Arms take turns within a repeat, and ratios are formed within a repeat, so that a drift of the
machine cancels.

Arms: plain | static[:STEPS-TOPK-TOKENS] (SGLang's EAGLE-3, a fixed tree) | static-grid (one static
arm for each shape of --static-grid) | adaptive (SGLang's --speculative-adaptive) |
cast[:POLICY[:C1-C2-C3]]. Each takes settings: cast:auto+calibration=off gives --cast-calibration
off, static+--random-seed=1 gives --random-seed 1.

Tasks: code | hostile (random tokens) | humaneval | gsm8k | chat (two turns) | instruct |
summarise | qa | reasoning | best-of-N[:TASK] | multi-round[-ROUNDS][:TASK] | FILE.jsonl[:CATEGORY].
"""

import argparse
import itertools
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# As a script, Python puts this file's own directory where the checkout belongs.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms import STATIC_GRID, Arm, parse_arms, split
from benchmarks.cells import Cell, Group, Result, choose_prompts, take_turns, warm_up
from benchmarks.counters import profiles_in_use
from benchmarks.dialogues import Encoder
from benchmarks.ledger import Ledger
from benchmarks.pairs import (
    INFLATED_NOTE,
    OUT,
    CommandError,
    Pair,
    found_profile_covers,
    inflated_pair,
    measured_profile,
    tiny_pair,
)
from benchmarks.provenance import provenance
from benchmarks.rows import as_rows, as_table, row_fields, summarise, summary_table
from benchmarks.servers import Server, ServerError, device_kind, exit_on_sigterm, serving
from benchmarks.startup import servers_at_once, start_display
from benchmarks.tasks import Task, load_task

WARMUP_TOKENS = 64
MIN_TOKENS = 32
PROFILE_SECONDS = 180
# A cost profile covers what a server admits, so no more is admitted than the shipped one measured.
SERVER_FLAGS = (
    "--dtype bfloat16 --max-total-tokens 49152 --max-running-requests 32 --context-length 1024"
)
# Tokens that speculation writes beyond the end of an answer.
CONTEXT_MARGIN = 64
SMOKE = {
    "arms": ["plain", "cast:auto"],
    "batches": [1, 4],
    "tokens": 96,
    "warmup_tokens": 8,
    "requests": 4,
    "repeats": 1,
    "profile": "estimate",
    "server_flags": (
        "--dtype float32 --max-total-tokens 4096 --max-running-requests 4 --context-length 512"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = parse_args(argv)
    exit_on_sigterm()
    ledger = None
    code = 1
    try:
        pair, note = (tiny_pair(), "") if args.smoke else choose_pair(args)
        tasks = load_tasks(args, pair)
        cells = choose_cells(args, tasks)
        origin = provenance("benchmarks.bench_serving", argv, pair, note, settings(args, tasks))
        ledger = Ledger(args.out, origin, summarise)
        ledger.check_columns(row_fields())
        groups = split(choose_arms(args, pair), args.at_once or servers_at_once())
        run_groups(args, pair, groups, cells, tasks, ledger)
        code = 0
    except (CommandError, ServerError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("bench_serving: interrupted", file=sys.stderr)
        code = 130
    finally:
        if ledger is not None:
            ledger.close(is_complete=code == 0)
    if ledger is not None and ledger.rows:
        # A file or pipe has no width of its own.
        console = Console(width=None if sys.stdout.isatty() else 170)
        console.print(as_table(ledger.rows))
        console.print(summary_table(summarise(ledger.rows)))
        print(ledger.path)
    return code


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arms", type=list_of(str), default=["plain", "static", "cast"], metavar="LIST"
    )
    parser.add_argument(
        "--static-grid",
        type=list_of(str),
        default=list(STATIC_GRID),
        metavar="LIST",
        help=f"shapes of the arm static-grid (default: {','.join(STATIC_GRID)})",
    )
    parser.add_argument("--temperatures", type=list_of(float), default=[0.0], metavar="LIST")
    parser.add_argument("--tasks", type=list_of(str), metavar="LIST", help="(default: code)")
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="more tasks, each a file of JSON lines; alone, these instead of --tasks",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="longer prompts lose their beginning (default: what --context-length leaves)",
    )
    parser.add_argument(
        "--warmup-tokens",
        type=int,
        default=WARMUP_TOKENS,
        metavar="N",
        help="per answer, of every arm before each cell; arms that learn, learn from them too "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--start-at-once",
        type=int,
        metavar="N",
        help="servers that come up together (default: 2, on a GPU 1)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="servers in memory; more arms run in groups, each with a plain arm of its own "
        "(default: as many as fit)",
    )
    parser.add_argument("--profile", help="cost profile for CAST (default: search, else measure)")
    parser.add_argument("--out", type=Path, default=OUT / "bench", help="gets results and logs")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="other defaults: the unpadded tiny pair and little of everything, to see that it runs",
    )
    add_workload_options(parser)
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    check_workload(parser, args)
    if args.smoke and args.model_path is not None:
        parser.error("--smoke serves the tiny pair; leave --model-path out")
    if args.warmup_tokens < 2:
        parser.error("--warmup-tokens must be at least 2")
    if args.tasks is None:
        args.tasks = [] if args.prompts else ["code"]
    return args


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add what every study of serving speed asks: which pair, how many requests, how often."""
    parser.add_argument("--batches", type=list_of(int), default=[1, 8], metavar="LIST")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument(
        "--tokens", type=int, default=128, metavar="N", help="per answer (default: 128)"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=8,
        metavar="N",
        help="least number of requests a run, rounded up to whole batches (default: 8)",
    )
    parser.add_argument("--model-path", help="target (default: the tiny pair, padded to 170M)")
    parser.add_argument("--draft-model-path", help="its draft, with --model-path")
    parser.add_argument(
        "--server-flags",
        default=SERVER_FLAGS,
        help="for every server; room for the largest batch is needed (default: %(default)s)",
    )


def check_workload(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what `add_workload_options` cannot: the exit of a wrong command line."""
    if (args.model_path is None) != (args.draft_model_path is None):
        parser.error("--model-path and --draft-model-path go together")
    if args.tokens < MIN_TOKENS:
        parser.error(f"--tokens must be at least {MIN_TOKENS}")
    if min([*args.batches, args.requests, args.repeats]) < 1:
        parser.error("--batches, --requests and --repeats must be at least 1")


def workload_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what of `add_workload_options` belongs to a result."""
    return {
        "server_flags": args.server_flags,
        "tokens": args.tokens,
        "repeats": args.repeats,
    }


def settings(args: argparse.Namespace, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return what made the numbers what they are."""
    return {
        **workload_settings(args),
        "requests": args.requests,
        "warmup_tokens": args.warmup_tokens,
        "tasks": {task.name: task.note for task in tasks.values()},
    }


def choose_pair(args: argparse.Namespace) -> tuple[Pair, str]:
    """Return the pair to serve and what must be said about it."""
    if args.model_path is not None:
        return Pair(args.model_path, args.draft_model_path), ""
    return inflated_pair(), INFLATED_NOTE


def choose_arms(args: argparse.Namespace, pair: Pair) -> list[Arm]:
    """Return the arms; measure a cost profile first if CAST needs one and a search finds none."""
    arms = parse_arms(args.arms, pair.draft, args.profile, args.static_grid)
    needing = [arm for arm in arms if arm.kind == "cast" and "--cast-profile" not in arm.flags]
    flags = shlex.split(args.server_flags)
    if not needing or found_profile_covers(pair, flags):
        return arms
    profile = measured_profile(pair, args.out, PROFILE_SECONDS, flags)
    return parse_arms(args.arms, pair.draft, str(profile), args.static_grid)


def load_tasks(args: argparse.Namespace, pair: Pair) -> dict[str, Task]:
    """Return the tasks by name, their prompts cut to what fits into the context."""
    flags = shlex.split(args.server_flags)
    room = args.prompt_tokens
    if room is None and "--context-length" in flags[:-1]:
        context = int(flags[flags.index("--context-length") + 1])
        room = context - args.tokens - CONTEXT_MARGIN
    encoder = Encoder(pair.target, room, "--trust-remote-code" in flags)
    specs = [*args.tasks, *map(str, args.prompts)]
    tasks = {task.name: task for task in (load_task(spec, encoder) for spec in specs)}
    if len(tasks) < len(specs):
        raise ValueError("--tasks and --prompts: each task at most once")
    return tasks


def choose_cells(args: argparse.Namespace, tasks: Mapping[str, Task]) -> list[Cell]:
    """Return the cells; a task that draws several samples of a prompt has none at temperature 0.

    Raises:
        ValueError: no cell is left.
    """
    cells = [
        Cell(batch, temperature, task.name)
        for task, temperature, batch in itertools.product(
            tasks.values(), args.temperatures, args.batches
        )
        if temperature > 0 or not task.samples
    ]
    if not cells:
        raise ValueError(f"{', '.join(tasks)}: samples differ only at --temperatures above 0")
    return cells


def run_groups(
    args: argparse.Namespace,
    pair: Pair,
    groups: Sequence[Sequence[Arm]],
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    ledger: Ledger,
) -> None:
    """Serve and measure one group of arms after the other; put every cell into the ledger."""
    done: dict[Cell, list[Group]] = {cell: [] for cell in cells}
    profiles: dict[str, str | None] = {}
    # Several that start together would each take what the others leave of a GPU's memory.
    start_at_once = args.start_at_once or (1 if device_kind() == "cuda" else 2)
    for number, arms in enumerate(groups, start=1):
        told = f"group {number} of {len(groups)}: " if len(groups) > 1 else ""
        on_start = start_display(told, len(arms))
        logs = args.out / "logs" / (f"group-{number}" if told else "")
        flags = shlex.split(args.server_flags)
        with serving(arms, pair.target, logs, flags, on_start, start_at_once) as servers:
            profiles |= profiles_in_use(arms, servers)
            ledger.describe(profiles=profiles, num_groups=len(groups))
            for cell, results in measure(args, arms, servers, cells, tasks):
                done[cell].append(Group(arms, results))
                ledger.describe(prompt_tokens=prompt_tokens(done))
                ledger.put(cell, as_rows(cell, done[cell]), is_final=number == len(groups))


def prompt_tokens(done: Mapping[Cell, Sequence[Group]]) -> list[dict[str, Any]]:
    """Return the mean prompt length of each cell, for predictions of what its steps take."""
    lengths = {
        cell: [a.num_prompt_tokens for a in groups[0].results[groups[0].arms[0].name].answers]
        for cell, groups in done.items()
        if groups
    }
    return [
        {**cell._asdict(), "mean": round(statistics.mean(found), 1)}
        for cell, found in lengths.items()
        if found
    ]


def measure(
    args: argparse.Namespace,
    arms: Sequence[Arm],
    servers: Mapping[str, Server],
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
) -> Iterator[tuple[Cell, dict[str, Result]]]:
    """Measure every arm in every cell and yield each cell with its results, by the arm's name."""
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(cells) * args.repeats * len(arms))
        for cell in cells:
            dialogues = choose_prompts(tasks[cell.task].dialogues, cell.batch, args.requests)
            warm_up(arms, servers, cell, dialogues, args.warmup_tokens)
            results = take_turns(
                args.repeats, args.tokens, arms, servers, cell, dialogues, progress, bar
            )
            told = ", ".join(
                f"{name} {statistics.median(result.tok_s):.1f}" for name, result in results.items()
            )
            progress.console.print(
                f"{cell.task} T={cell.temperature:g} batch {cell.batch}, tokens/s: {told}",
                highlight=False,
                soft_wrap=True,
            )
            yield cell, results


def list_of(kind: type) -> Any:
    """Return a parser of options such as 1,8."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


if __name__ == "__main__":
    sys.exit(main())
