"""Decoding speed of several ways to serve one model, measured side by side.

    python benchmarks/bench_serving.py --out DIR
    python benchmarks/bench_serving.py --arms plain,static-grid,adaptive,cast:auto,cast:fixed \\
        --batches 1,8,32 --temperatures 0,1 --tasks code,hostile --repeats 3 --out DIR

Without options it measures all arms at batch 1, 8 and 32 (on a GPU also 64), greedy, on held-out
source: roughly 40 minutes on two CPU cores. --full takes every batch size, temperature 0 and 1 and
all tasks, hours; --smoke takes less than three minutes.

All servers are up at once, or as many as fit into memory; those that are not measured sleep. A run
keeps `batch` requests running: one that ends makes room for the next. Tokens count from the moment
the first ones all stream until there is no next one, so ramp and drain are dropped, every arm
serves the same text, and the prefill of the next request is part of what is measured. Answers are
of half to one and a half times --tokens, so that they do not all end at once.
Arms take turns within a repeat, and ratios are formed within a repeat, so that a drift of the
machine cancels.

--cold N adds a cold cell to each such warm one: what an arm does in the first steps of its server's
life. N times, all servers are started anew and each serves one run, short enough that the arm that
gains most tokens a step takes about 100 steps; all arms serve the same text. No server finds what
another one has learned. CAST's cost profile is that of --profile, or one that comes with the
package, or one that the server measures before its first request.

Arms: plain | static[:STEPS-TOPK-TOKENS] (SGLang's EAGLE-3, a fixed tree) | static-grid (one static
arm for each shape of --static-grid) | adaptive (SGLang's --speculative-adaptive) |
cast[:POLICY[:C1-C2-C3]]. Each takes settings: cast:auto+calibration=off gives --cast-calibration
off, static+--random-seed=1 gives --random-seed 1.

Tasks: code | edit | table | quote | agent (much to copy) | hostile (random tokens) |
humaneval | humaneval-chat | gsm8k | mt-bench (two turns) |
sharegpt-instruct | sharegpt-summarise | sharegpt-qa | chat (two turns) | instruct | summarise |
qa | reasoning | best-of-N[:TASK] | multi-round[-ROUNDS][:TASK] | FILE.jsonl[:CATEGORY].
What mt-bench and sharegpt-* need is fetched once.

DIR gets results.json and results.csv, to which every run is added, after each cell. An arm that
fails is left out from there on, and the exit code is 1; the other arms go on. --resume goes on with
a run that was cut short or lost an arm.
"""

import argparse
import contextlib
import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# As a script, Python puts this file's own directory where the checkout belongs.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
from rich.console import Console

from benchmarks.harness.arms import Arm, parse_arms, split
from benchmarks.harness.cells import COLD, WARM, Cell, Group
from benchmarks.harness.dialogues import Encoder
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.options import parse_args, settings
from benchmarks.harness.pairs import (
    PAIRS,
    TINY,
    CommandError,
    Pair,
    found_profile_covers,
    measured_profile,
    tiny_pair,
)
from benchmarks.harness.phases import Launch, measure_cold, measure_warm
from benchmarks.harness.provenance import provenance
from benchmarks.harness.rows import (
    Row,
    as_table,
    cell_of,
    compared,
    measured,
    row_fields,
    rows_of,
    summarise,
    summary_table,
)
from benchmarks.harness.servers import ServerError, exit_on_sigterm
from benchmarks.harness.startup import servers_at_once
from benchmarks.harness.tasks import Task, load_task

PROFILE_SECONDS = 180
# Tokens that speculation writes beyond the end of an answer.
CONTEXT_MARGIN = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = parse_args(argv, __doc__)
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
        if args.resume:
            ledger.resume(cell_of)
        groups = choose_groups(args, choose_arms(args, pair), ledger)
        code = 0 if run_groups(args, pair, groups, cells, tasks, ledger) else 1
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


def choose_pair(args: argparse.Namespace) -> tuple[Pair, str]:
    """Return the pair to serve and what must be said about it."""
    if args.model_path is not None:
        return Pair(args.model_path, args.draft_model_path), ""
    known = PAIRS[args.pair or TINY]
    return known.load(), known.note


def choose_arms(args: argparse.Namespace, pair: Pair) -> list[Arm]:
    """Return the arms; measure a cost profile first if CAST needs one and a search finds none."""
    arms = ask_arms(args, pair, args.profile)
    needing = [arm for arm in arms if arm.kind == "cast" and "--cast-profile" not in arm.flags]
    flags = shlex.split(args.server_flags)
    if not needing or found_profile_covers(pair, flags):
        return arms
    profile = measured_profile(pair, args.out, PROFILE_SECONDS, flags)
    return ask_arms(args, pair, str(profile))


def ask_arms(args: argparse.Namespace, pair: Pair, profile: str | None) -> list[Arm]:
    """Return the arms that the command line asks for, CAST's with this cost profile."""
    return parse_arms(args.arms, pair.draft, profile, args.static_grid)


def load_tasks(args: argparse.Namespace, pair: Pair) -> dict[str, Task]:
    """Return the tasks by name, their prompts cut to what fits into the context."""
    flags = shlex.split(args.server_flags)
    room = args.prompt_tokens
    if room is None and "--context-length" in flags[:-1]:
        context = int(flags[flags.index("--context-length") + 1])
        room = context - 3 * args.tokens // 2 - CONTEXT_MARGIN
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
    phases = (WARM, COLD) if args.cold else (WARM,)
    cells = [
        Cell(batch, temperature, task.name, phase)
        for phase, task, temperature, batch in itertools.product(
            phases, tasks.values(), args.temperatures, args.batches
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
) -> bool:
    """Serve and measure one group of arms after the other; put every cell into the ledger.

    Cold cells come after all warm ones, whose accept lengths say how long a cold run is.

    Returns:
        Whether no arm failed. What was measured before, in a run that is resumed, is left out.
    """
    names = [[arm.name for arm in group] for group in groups]
    ledger.describe(groups=names, num_groups=len(groups), failures=[])
    # Fresh servers get no profile that this benchmark measured: each start is a first one.
    as_asked = {arm.name: arm for arm in ask_arms(args, pair, args.profile)}
    for phase, measure in ((WARM, measure_warm), (COLD, measure_cold)):
        for number, group in enumerate(groups, start=1):
            arms = [as_asked[arm.name] if phase == COLD else arm for arm in group]
            missing = [
                cell
                for cell in cells
                if cell.phase == phase and not is_measured(ledger.rows, cell, number, arms)
            ]
            if not missing:
                continue
            prefix = f"group {number} of {len(groups)}: " if len(groups) > 1 else ""
            launch = Launch(args, pair, arms, prefix)
            # Its servers are stopped whatever ends the loop.
            with contextlib.closing(measure(launch, missing, tasks, ledger)) as found:
                for cell, results in found:
                    new = measured(cell, Group(arms, results), number)
                    others = [row for row in rows_of(ledger.rows, cell) if row["group"] != number]
                    rows = compared(sorted([*others, *new], key=lambda row: row["group"]))
                    ledger.put(cell, rows, is_final=number == len(groups))
    return not ledger.provenance["failures"]


def choose_groups(args: argparse.Namespace, arms: Sequence[Arm], ledger: Ledger) -> list[list[Arm]]:
    """Return the groups of arms that fit into memory, or those of the run that is resumed."""
    named = {arm.name: arm for arm in arms}
    if earlier := ledger.provenance.get("groups"):
        return [[named[name] for name in group] for group in earlier]
    return split(arms, args.at_once or servers_at_once())


def is_measured(rows: Sequence[Row], cell: Cell, number: int, arms: Sequence[Arm]) -> bool:
    """Say whether a cell has a row of every arm of a group."""
    found = {row["arm"] for row in rows_of(rows, cell) if row["group"] == number}
    return all(arm.name in found for arm in arms)


if __name__ == "__main__":
    sys.exit(main())
