"""Sampler: times forward passes until their medians are precise or the time budget ends.

The engine provides a `Meter`; the sampler decides how often to ask it, and removes the drift of the
machine. Clocks and neighbours make all passes of one second slower than those of the next, on a
virtual machine by half. So the sampler times a few reference passes before and after each visit to
a point, and the visit counts relative to them.
"""

import dataclasses
import math
import random
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Self

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
from cast_sglang.profiling.journal import STEP_OVERHEAD, Journal, Point, Visit
from cast_sglang.profiling.meter import Meter, Sampling

__all__ = ["Sampler"]

# A visit times fewer passes if they are long, since a long pass averages its own noise.
LONG_VISIT_SECONDS = 0.15
# Visits within this time share their references, since drift is slower.
REFERENCE_SECONDS = 0.5


class Sampler:
    """Holds the measurements of points so far, and adds to them.

    A context manager, which shows its progress bar inside `with`.

    Args:
        references: points to time around each visit; together they should slow down with the
            machine, so one is bound by memory and one by arithmetic.
        budget_seconds: wall time from entry, exceeded by one visit at most; None for no limit.
        progress: show a progress bar with the time left on stderr.
    """

    def __init__(
        self,
        meter: Meter,
        sampling: Sampling,
        references: Sequence[Point],
        budget_seconds: float | None = None,
        progress: bool = False,
    ) -> None:
        self.sampling = sampling
        self.seconds = 0.0
        self._meter = meter
        self._references = references
        self._budget_seconds = math.inf if budget_seconds is None else budget_seconds
        self._visits: dict[Point, list[Visit]] = {}
        self._reference_us: list[list[float]] = []  # times of all references, for each visit
        self._before_us: list[float] = []  # times of the references when they were last timed
        self._references_at = 0.0  # when that was
        self._open: list[tuple[Point, list[float], float]] = []  # visits since then
        self._values: dict[Point, list[float]] = {}  # visits without drift, until new ones come
        self._scatter: float | None = None  # relative standard error of one visit
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
        """Load the visits of a journal, say so, and append each new visit to it."""
        self._journal = journal
        for visit in journal.visits:
            self._add(visit)
        if journal.visits and not self._bar.disable:
            self._bar.console.print(
                f"resumed: {len(self._visits)} points were measured before, in "
                f"{self.seconds:.0f} s ({journal.path})",
                soft_wrap=True,
            )

    @property
    def is_recorded(self) -> bool:
        """Whether a journal keeps the visits, so that another run can resume."""
        return self._journal is not None

    def supports(self, point: Point) -> bool:
        """Return whether the meter can time an optional operation; tries one of its points."""
        if point.operation not in self._supported:
            self._supported[point.operation] = self._seconds(point) is not None
        return self._supported[point.operation]

    def visit_once(self, stage: str, points: Collection[Point], share: float) -> bool:
        """Visit the points without a visit in shuffled order; return whether all have one then.

        Args:
            stage: text of the progress bar.
            share: of the budget, after which this stage ends.
        """
        self._visit_round(stage, [point for point in points if not self.has(point)], share)
        return self.num_measured(points) == len(points)

    def visit_again(self, stage: str, points: Collection[Point], share: float) -> bool:
        """Visit each point that is not done once more; return False if the budget ended before."""
        due = [point for point in dict.fromkeys(points) if not self._is_done(point)]
        return self._visit_round(stage, due, share)

    def visit_until_precise(
        self,
        stage: str,
        points: Collection[Point],
        share: float,
        always: Collection[Point] = (),
    ) -> None:
        """Visit points in shuffled rounds until all are done or the share of the budget is spent.

        Args:
            always: points to visit in every round until they are done; of the other points, a
                round visits those with the fewest visits.
        """
        while pending := [point for point in points if not self._is_done(point)]:
            fewest = min(map(self._num_visits, pending))
            due = [point for point in pending if self._num_visits(point) == fewest]
            due += [point for point in always if not self._is_done(point)]
            if not self._visit_round(f"{stage}, {len(pending)} to go", due, share):
                return
        while pending := [point for point in always if not self._is_done(point)]:
            if not self._visit_round(stage, pending, share):
                return

    def has(self, point: Point) -> bool:
        return point in self._visits

    def num_measured(self, points: Iterable[Point]) -> int:
        return sum(self.has(point) for point in points)

    def median_us(self, point: Point) -> float:
        return float(np.median(self._steady_us(point)))

    def summary(self, point: Point) -> tuple[float, float, int]:
        """Return the median and the inter-quartile range in microseconds, and how many passes."""
        low, median, high = np.quantile(self._steady_us(point), [0.25, 0.5, 0.75])
        num_passes = sum(len(visit.times_us) for visit in self._visits[point])
        return float(median), float(high - low), num_passes

    def precision(self, point: Point) -> float:
        """Return the relative half-width of the median's 95 % confidence interval.

        Source: order statistics. The number of values below the median is binomial(n, 1/2), so the
        ranks n/2 -+ 0.98 sqrt(n) enclose it in 95 of 100 cases, whatever the distribution. Fewer
        than six visits have no such ranks; their whole range counts.
        """
        values_us = sorted(self._steady_us(point))
        n = len(values_us)
        reach = 0.98 * math.sqrt(n)
        low, high = max(math.floor(n / 2 - reach), 0), min(math.ceil(n / 2 + reach), n - 1)
        return (values_us[high] - values_us[low]) / 2 / float(np.median(values_us))

    def points(self, operation: str) -> list[Point]:
        """Return the measured points of one operation, sorted."""
        return sorted(point for point in self._visits if point.operation == operation)

    def standard_error(self, point: Point) -> float:
        """Return the relative standard error of the point's median, from the scatter of all points.

        The few visits to one point do not show how much they scatter; those to all points do.
        """
        if self._scatter is None:
            deviations = [
                abs(value / self.median_us(other) - 1)
                for other in self._visits
                if len(self._steady_us(other)) >= 3
                for value in self._steady_us(other)
            ]
            # For normal values, the step from median deviation to standard error of a median.
            self._scatter = 1.48 * 1.25 * float(np.median(deviations or [0.0]))
        return self._scatter / math.sqrt(len(self._steady_us(point)))

    def describe(self) -> dict[str, str | int | float | bool]:
        """Return the settings and counts of what was measured, for the provenance."""
        references = np.array(self._reference_us or [[1.0]])
        drift = np.exp(np.log(references / np.median(references, axis=0)).mean(axis=1))
        return {
            **dataclasses.asdict(self.sampling),
            "points": len(self._visits),
            "samples": sum(self.summary(point)[2] for point in self._visits),
            "resumed_visits": len(self._journal.visits) if self._journal else 0,
            "imprecise_points": sum(
                self.precision(point) > self.sampling.tolerance for point in self._visits
            ),
            # The machine's time in its slowest tenth of visits, over that in its fastest tenth.
            "drift": round(float(np.divide(*np.quantile(drift, [0.9, 0.1]))), 3),
        }

    def _steady_us(self, point: Point) -> list[float]:
        """Return the point's visits in microseconds, scaled to the machine's median speed."""
        if point not in self._values:
            reference_us = np.median(self._reference_us, axis=0) if self._references else [1.0]
            values = [
                (
                    float(np.median(visit.times_us) / _drift(visit, reference_us)),
                    _change(visit) <= self.sampling.max_drift,
                )
                for visit in self._visits[point]
            ]
            steady = [value for value, is_steady in values if is_steady]
            # If the machine was unsteady in all visits, all of them count.
            self._values[point] = steady or [value for value, _ in values]
        return self._values[point]

    def _num_visits(self, point: Point) -> int:
        return len(self._visits.get(point, ()))

    def _is_done(self, point: Point) -> bool:
        num_visits = self._num_visits(point)
        if num_visits < self.sampling.min_visits:
            return False
        if num_visits >= self.sampling.max_visits:
            return True
        return self.precision(point) <= self.sampling.tolerance

    def _visit_round(self, stage: str, points: Collection[Point], share: float) -> bool:
        """Visit each point in shuffled order; return False if the budget ended before."""
        points = list(points)
        self._rng.shuffle(points)
        self._bar.reset(self._task, description=stage, total=len(points))
        ended = False
        for point in points:
            ended = (time.monotonic() - self._start) / self._budget_seconds >= share
            if ended:
                break
            self._visit(point)
            self._bar.advance(self._task)
        self._close_visits()
        # New visits move the median of the references, to which every point is scaled.
        self._values.clear()
        self._scatter = None
        return not ended

    def _visit(self, point: Point) -> None:
        begin = time.monotonic()
        if not self._before_us:
            self._time_references()
            self._before_us = self._time_references()
            self._references_at = time.monotonic()
        if point not in self._warm:
            self._warm.add(point)
            for _ in range(self.sampling.warmup - 1):
                self._run(point)
        # Even a warm shape gets one untimed pass, as the references left other data in the caches;
        # in a long pass that does not show.
        first_us = self._timed_us(point)
        num_passes = min(self.sampling.visit_passes, int(LONG_VISIT_SECONDS * 1e6 / first_us))
        times_us = [self._timed_us(point) for _ in range(num_passes)] or [first_us]
        self._open.append((point, times_us, time.monotonic() - begin))
        if time.monotonic() - self._references_at >= REFERENCE_SECONDS:
            self._close_visits()

    def _close_visits(self) -> None:
        """Time the references, and record the visits since they were last timed."""
        if not self._open:
            return
        begin = time.monotonic()
        after_us = self._time_references()
        self._references_at = time.monotonic()
        share = (self._references_at - begin) / len(self._open)
        for point, times_us, seconds in self._open:
            visit = Visit(point, times_us, self._before_us, after_us, round(seconds + share, 6))
            if self._journal:
                self._journal.append(visit)
            self._add(visit)
        self._open.clear()
        self._before_us = after_us

    def _time_references(self) -> list[float]:
        return [self._timed_twice_us(reference) for reference in self._references]

    def _timed_twice_us(self, reference: Point) -> float:
        times_us = [self._timed_us(reference), self._timed_us(reference)]
        if max(times_us) > (1 + self.sampling.max_drift) * min(times_us):
            # One of the two was disturbed, which would spoil all visits up to the next references.
            times_us.append(self._timed_us(reference))
        return float(np.median(times_us))

    def _seconds(self, point: Point) -> float | None:
        if point.operation == STEP_OVERHEAD:
            return self._meter.step_overhead(point.batch_size)
        seconds: float | None = getattr(self._meter, point.operation)(*point[1:])
        return seconds

    def _run(self, point: Point) -> float:
        seconds = self._seconds(point)
        if seconds is None or not 0.0 < seconds < math.inf:
            raise ProfileError(f"the meter returned {seconds!r} seconds for {point}")
        return seconds

    def _timed_us(self, point: Point) -> float:
        return round(self._run(point) * 1e6, 3)

    def _add(self, visit: Visit) -> None:
        self._visits.setdefault(visit.point, []).append(visit)
        self._values.pop(visit.point, None)
        self._reference_us.append(
            [math.sqrt(b * a) for b, a in zip(visit.before_us, visit.after_us, strict=True)]
        )
        self.seconds += visit.seconds


def _drift(visit: Visit, reference_us: Sequence[float]) -> float:
    """Return how much slower than in the median the machine was around the visit."""
    around = [*visit.before_us, *visit.after_us]
    usual = [*reference_us, *reference_us]
    logs = [math.log(us / u) for us, u in zip(around, usual, strict=False)]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def _change(visit: Visit) -> float:
    """Return the largest relative change of a reference during the visit."""
    pairs = zip(visit.before_us, visit.after_us, strict=True)
    return max((abs(math.log(after / before)) for before, after in pairs), default=0.0)
