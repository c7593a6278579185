"""Time single forward passes until their median is known well enough, within a time budget.

`Meter` is what the engine provides; `Sampler` decides how often it is asked.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol, Self

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cast_sglang.errors import ProfileError
from cast_sglang.journal import Journal, Point, Visit

__all__ = ["Limits", "Meter", "Sampler", "Sampling"]


class Limits(NamedTuple):
    """The largest shapes a meter can run."""

    max_batch_size: int
    max_context: int  # tokens of one request, those of the pass included
    max_verify_rows: int  # rows per request in one target pass, root included
    max_width: int  # nodes per request in one draft layer
    max_tokens: int | None = None  # tokens of all requests together; None for no limit


class Meter(Protocol):
    """Runs one forward pass of a shape and returns its time in seconds.

    `context` is the number of tokens each request holds before the pass. A call may set up its
    batch outside of the timed part.
    """

    def limits(self) -> Limits:
        """Return the largest shapes."""

    def verify(self, batch_size: int, context: int, rows: int) -> float:
        """Time one target pass over `rows` tree rows per request."""

    def draft(self, batch_size: int, context: int, width: int) -> float:
        """Time one draft layer over `width` nodes per request."""

    def draft_extend(self, batch_size: int, context: int, rows: int) -> float:
        """Time the draft model's pass over `rows` verified rows per request."""

    def plain(self, batch_size: int, context: int) -> float | None:
        """Time one plain decoding step of the target; None if it cannot be measured."""

    def step_overhead(self, batch_size: int) -> float | None:
        """Time what a step spends outside of its passes; None if it cannot be measured."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How often and how precisely each point is timed.

    A point is done when the 95 % confidence interval of its median has a half-width below
    `tolerance` of the median, or after `max_samples`.
    """

    warmup: int = 3  # untimed passes on the first visit to a point; one on each later visit
    visit_samples: int = 3  # timed passes in a row
    min_samples: int = 6
    max_samples: int = 48
    tolerance: float = 0.02
    interpolation_tolerance: float = 0.03  # relative error at which an interval is halved
    heldout_points: int = 24
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """Return settings for a first look."""
        return cls(
            warmup=2,
            max_samples=12,
            tolerance=0.05,
            interpolation_tolerance=0.1,
            heldout_points=9,
        )


class Sampler:
    """Measurements of points so far, and the loop that adds to them.

    A context manager: its progress bar is shown inside `with`, if at all.

    Args:
        budget_seconds: wall time from entry, kept to within one visit; None for no limit.
        progress: show a progress bar with the time left on stderr.
    """

    def __init__(
        self,
        meter: Meter,
        sampling: Sampling,
        budget_seconds: float | None = None,
        progress: bool = False,
    ) -> None:
        self.sampling = sampling
        self.seconds = 0.0
        self._passes: dict[str, Callable[[Point], float | None]] = {
            "verify": lambda point: meter.verify(*point[1:]),
            "draft": lambda point: meter.draft(*point[1:]),
            "draft_extend": lambda point: meter.draft_extend(*point[1:]),
            "plain": lambda point: meter.plain(point.batch_size, point.context),
            "step_overhead": lambda point: meter.step_overhead(point.batch_size),
        }
        self._budget_seconds = math.inf if budget_seconds is None else budget_seconds
        self._times_us: dict[Point, list[float]] = {}
        self._warm: set[Point] = set()
        self._rng = random.Random(sampling.seed)
        self._journal: Journal | None = None
        self._supported: dict[str, bool] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("points"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        self._task = self._bar.add_task("start", total=None)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def record_to(self, journal: Journal) -> None:
        """Take over what the journal holds, and append each new visit to it."""
        self._journal = journal
        for visit in journal.visits:
            self._add(visit)

    def supports(self, point: Point) -> bool:
        """Return whether the meter can time an optional operation, by trying one of its points."""
        if point.operation not in self._supported:
            self._supported[point.operation] = self._passes[point.operation](point) is not None
        return self._supported[point.operation]

    def measure(
        self, stage: str, points: Collection[Point], share: float, first_share: float | None = None
    ) -> bool:
        """Visit points in shuffled rounds until each is done.

        Args:
            stage: what the progress bar says.
            share: part of the budget after which this stage ends.
            first_share: the same for points that have no samples yet; None for `share`.

        Returns:
            Whether every point has samples.
        """
        first_share = share if first_share is None else first_share
        pending = self._not_done(points)
        self._bar.reset(self._task, description=stage, total=len(pending))
        visited = True
        while pending and visited:
            self._rng.shuffle(pending)
            visited = False
            for point in pending:
                if self._elapsed_share() < (share if self.has(point) else first_share):
                    self._visit(point)
                    visited = True
                    self._bar.advance(self._task, self._is_done(point))
            pending = self._not_done(pending)
        return self.num_measured(points) == len(points)

    def has(self, point: Point) -> bool:
        return point in self._times_us

    def num_measured(self, points: Iterable[Point]) -> int:
        return sum(self.has(point) for point in points)

    def median_us(self, point: Point) -> float:
        return float(np.median(self._times_us[point]))

    def summary(self, point: Point) -> tuple[float, float, int]:
        """Return median and inter-quartile range in microseconds, and the number of samples."""
        times_us = self._times_us[point]
        low, median, high = np.quantile(times_us, [0.25, 0.5, 0.75])
        return float(median), float(high - low), len(times_us)

    def precision(self, point: Point) -> float:
        """Return the relative half-width of the median's 95 % confidence interval.

        Source: order statistics; the count below the median is binomial(n, 1/2), so the ranks
        n/2 -+ 0.98 sqrt(n) enclose it in 95 of 100 cases whatever the distribution.
        """
        times_us = sorted(self._times_us[point])
        n = len(times_us)
        reach = 0.98 * math.sqrt(n)
        low, high = max(math.floor(n / 2 - reach), 0), min(math.ceil(n / 2 + reach), n - 1)
        return (times_us[high] - times_us[low]) / 2 / float(np.median(times_us))

    def describe(self) -> dict[str, str | int | float | bool]:
        """Return the settings and what became of them, for the provenance."""
        return {
            **dataclasses.asdict(self.sampling),
            "points": len(self._times_us),
            "samples": sum(len(times_us) for times_us in self._times_us.values()),
            "imprecise_points": sum(
                self.precision(point) > self.sampling.tolerance for point in self._times_us
            ),
        }

    def _elapsed_share(self) -> float:
        return (time.monotonic() - self._start) / self._budget_seconds

    def _not_done(self, points: Iterable[Point]) -> list[Point]:
        return [point for point in points if not self._is_done(point)]

    def _is_done(self, point: Point) -> bool:
        num_samples = len(self._times_us.get(point, ()))
        if num_samples < self.sampling.min_samples:
            return False
        if num_samples >= self.sampling.max_samples:
            return True
        return self.precision(point) <= self.sampling.tolerance

    def _visit(self, point: Point) -> None:
        begin = time.monotonic()
        run = self._passes[point.operation]
        # Even a known shape gets one untimed pass: the previous point left other caches behind.
        for _ in range(1 if point in self._warm else self.sampling.warmup):
            run(point)
        self._warm.add(point)
        times_us = [self._timed(run, point) for _ in range(self.sampling.visit_samples)]
        visit = Visit(point, times_us, seconds=round(time.monotonic() - begin, 6))
        if self._journal:
            self._journal.append(visit)
        self._add(visit)

    def _timed(self, run: Callable[[Point], float | None], point: Point) -> float:
        seconds = run(point)
        if seconds is None or not 0.0 < seconds < math.inf:
            raise ProfileError(f"the meter returned {seconds!r} seconds for {point}")
        return round(seconds * 1e6, 3)

    def _add(self, visit: Visit) -> None:
        self._times_us.setdefault(visit.point, []).extend(visit.times_us)
        self.seconds += visit.seconds
