"""The two phases of the serving benchmark: warm servers, and the first steps of fresh ones."""

import argparse
import contextlib
import itertools
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.arms import Arm
from benchmarks.harness.cells import (
    WARM,
    Cell,
    Result,
    choose_prompts,
    cold_load,
    gather,
    take_turn,
    warm_up,
)
from benchmarks.harness.counters import profiles_in_use
from benchmarks.harness.dialogues import Dialogue
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.pairs import Pair
from benchmarks.harness.rows import cell_of, rows_of
from benchmarks.harness.servers import Server, device_kind, serving
from benchmarks.harness.startup import start_display
from benchmarks.harness.tasks import Task
from benchmarks.harness.turns import OnFailure, rounds

Found = Iterator[tuple[Cell, dict[str, Result]]]


class Launch(NamedTuple):
    """A group of arms, and what it takes to start their servers."""

    args: argparse.Namespace
    pair: Pair
    arms: Sequence[Arm]
    prefix: str  # names the group to people; empty if there is only one

    def serve(
        self, arms: Sequence[Arm], at_once: int, profiles: Path | None = None
    ) -> contextlib.AbstractContextManager[dict[str, Server]]:
        """Start the servers of some arms of the group, as `serving` does."""
        logs = self.args.out / "logs" / self.prefix.split(" of ")[0].replace(" ", "-")
        flags = shlex.split(self.args.server_flags)
        on_start = start_display(self.prefix, len(arms))
        return serving(arms, self.pair.target, logs, flags, on_start, at_once, profiles)


class Turns:
    """The turns of a group's arms; an arm that fails is left out from there on.

    It may have lost its server.

    Args:
        num_turns: in all, for the progress that is shown.
    """

    def __init__(self, launch: Launch, ledger: Ledger, num_turns: int) -> None:
        self.standing = list(launch.arms)
        self.progress = Progress(console=Console(stderr=True))
        self._bar = self.progress.add_task("", total=num_turns)
        self._args, self._ledger = launch.args, ledger

    def rounds(
        self,
        cell: Cell,
        servers: Mapping[str, Server],
        requests: Sequence[Dialogue],
        num_tokens: int,
        first: int = 0,
    ) -> Iterator[dict[str, Result]]:
        """Yield rounds of a cell, see `turns.rounds`."""

        def take(arm: Arm, number: int) -> Result:
            self.progress.update(self._bar, description=f"{name_of(cell)} {arm.name}", advance=1)
            time.sleep(self._args.cooldown)
            return take_turn(arm, servers[arm.name], cell, requests, num_tokens)

        return rounds(self.standing, take, self.leave_out(cell), first)

    def leave_out(self, cell: Cell) -> OnFailure:
        """Return what is done about an arm that fails in a cell."""

        def leave(arm: Arm, error: Exception) -> None:
            self.standing.remove(arm)
            failure = {"arm": arm.name, **cell._asdict(), "error": str(error)}
            self._ledger.describe(failures=[*self._ledger.provenance["failures"], failure])
            self._tell(f"{name_of(cell)}: {arm.name} failed and is left out from here on: {error}")

        return leave

    def tell_speeds(self, cell: Cell, results: Mapping[str, Result]) -> None:
        """Show how fast each arm was."""
        speeds = (f"{name} {statistics.median(r.tok_s):.1f}" for name, r in results.items())
        self._tell(f"{name_of(cell)}, tokens/s: {', '.join(speeds)}")

    def _tell(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


def measure_warm(
    launch: Launch, cells: Sequence[Cell], tasks: Mapping[str, Task], ledger: Ledger
) -> Found:
    """Measure every arm in every cell and yield each cell with its results, by the arm's name."""
    args, arms = launch.args, launch.arms
    turns = Turns(launch, ledger, len(cells) * args.repeats * len(arms))
    # Several that start together would each take what the others leave of a GPU's memory.
    at_once = args.start_at_once or (1 if device_kind() == "cuda" else 2)
    with launch.serve(arms, at_once) as servers, turns.progress:
        note_profiles(ledger, "profiles", arms, servers)
        for cell in cells:
            requests = choose_prompts(tasks[cell.task].dialogues, cell.batch, args.requests)
            leave_out = turns.leave_out(cell)
            warm_up(turns.standing, servers, cell, requests, args.warmup_tokens, leave_out)
            if not turns.standing:
                return
            taken = turns.rounds(cell, servers, requests, args.tokens)
            results = gather(itertools.islice(taken, args.repeats))
            turns.tell_speeds(cell, results)
            describe_prompts(ledger, cell, results)
            if results:
                yield cell, results


def measure_cold(
    launch: Launch, cells: Sequence[Cell], tasks: Mapping[str, Task], ledger: Ledger
) -> Found:
    """Measure every arm in every cell by the first steps of servers started for nothing else.

    Each start is a first one: the server finds a cost profile that was named by --profile or comes
    with this package, else it measures one before its first request.
    """
    args = launch.args
    turns = Turns(launch, ledger, len(cells) * args.cold * len(launch.arms))
    for cell in cells:
        warm = rows_of(ledger.rows, cell._replace(phase=WARM))
        accept_length = max((row["accept_length"] or 1.0 for row in warm), default=1.0)
        dialogues = tasks[cell.task].dialogues
        per_place, num_tokens = cold_load(accept_length / dialogues[0].num_turns, args.tokens)
        requests = choose_prompts(dialogues, cell.batch, per_place * cell.batch)
        taken = []
        for number in range(args.cold):
            if not turns.standing:
                return
            arms = list(turns.standing)
            with contextlib.ExitStack() as stack:
                profiles = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                # One at a time: whatever one measures, it has the machine to itself.
                servers = stack.enter_context(launch.serve(arms, 1, profiles))
                note_profiles(ledger, "cold_profiles", arms, servers)
                stack.enter_context(turns.progress)
                taken.append(next(turns.rounds(cell, servers, requests, num_tokens, number)))
        results = gather(taken)
        turns.tell_speeds(cell, results)
        if results:
            yield cell, results


def note_profiles(
    ledger: Ledger, field: str, arms: Sequence[Arm], servers: Mapping[str, Server]
) -> None:
    """State the cost profiles that the servers use."""
    known = ledger.provenance.get(field, {})
    ledger.describe(**{field: known | profiles_in_use(arms, servers)})


def name_of(cell: Cell) -> str:
    """Return a cell's name for people."""
    phase = "" if cell.phase == WARM else f" {cell.phase}"
    return f"{cell.task} T={cell.temperature:g} batch {cell.batch}{phase}"


def describe_prompts(ledger: Ledger, cell: Cell, results: Mapping[str, Result]) -> None:
    """State the mean prompt length of a cell, for predictions of what its steps take."""
    described = ledger.provenance.get("prompt_tokens", [])
    lengths = [a.num_prompt_tokens for result in results.values() for a in result.answers]
    if lengths and all(cell_of(entry) != cell for entry in described):
        entry = {**cell._asdict(), "mean": round(statistics.mean(lengths), 1)}
        ledger.describe(prompt_tokens=[*described, entry])
