"""The start of a benchmark's servers: how many fit, and showing that they come up."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.harness.arms import Arm
from benchmarks.harness.servers import device_kind

# What a server of the padded tiny pair takes for itself at batch 32: half of it for imports, a
# quarter for the cache, which fills up. Six of 3.9 GB did not fit into 24.
SERVER_BYTES = 4_200_000_000
# Left free: where memory runs out, a server that allocates more per step is slowed down more.
SPARE_BYTES = 2_000_000_000


def servers_at_once() -> int:
    """Return how many servers fit into memory together; on a GPU their flags must see to that."""
    if device_kind() == "cuda":
        return sys.maxsize
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    free = int(available.split()[1]) * 1024 - SPARE_BYTES
    return max(2, free // SERVER_BYTES)


def start_display(
    prefix: str, total: int
) -> Callable[[Sequence[Arm]], contextlib.AbstractContextManager[None]]:
    """Return what shows, on stderr, servers while they start and how long it took."""
    num_up = 0

    @contextlib.contextmanager
    def shown(arms: Sequence[Arm]) -> Iterator[None]:
        nonlocal num_up
        start, console = time.monotonic(), Console(stderr=True)
        names = ", ".join(arm.name for arm in arms)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        shown_live = console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not shown_live) as bar:
            bar.add_task(
                f"{prefix}{num_up} of {total} servers are up; starting {names}", total=None
            )
            yield
        num_up += len(arms)
        seconds = time.monotonic() - start
        console.print(
            f"{prefix}{num_up} of {total} servers are up: {names} after {seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )

    return shown
