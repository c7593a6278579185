"""Measure S_T and S_D: choose which forward passes to time, and how often.

The engine stands behind the `Meter` protocol, and this module knows nothing else of it. A run has
three parts:

    grid       time every point of a coarse grid in shuffled rounds, so that a drift of the clock
               frequency spreads over all points instead of looking like structure
    refine     add batch sizes, contexts and token counts where linear interpolation misses a
               measured midpoint
    held out   time random points off the grid, which no table contains, to state the tables' error

Then `tables.py` smooths the times, because the times of neighbours tell of a point too.
"""

import dataclasses
import datetime
import math
import random
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, pass_us
from cast_sglang.costs.passes import NAMES, PASSES
from cast_sglang.costs.schema import (
    CostProfile,
    CostTable,
    CostTables,
    Heldout,
    HostIdentity,
    Provenance,
    ServingRecord,
)
from cast_sglang.errors import ProfileError
from cast_sglang.profiling.grid import AXES, Axes, Grid, Interval, default_grid, log_uniform, spread
from cast_sglang.profiling.journal import STEP_OVERHEAD, Journal, Point
from cast_sglang.profiling.meter import Meter, Sampling
from cast_sglang.profiling.sampler import Sampler
from cast_sglang.profiling.tables import tabulate

__all__ = [
    "Measured",
    "choose_references",
    "make_profile",
    "run_profile",
    "summarize",
]

# The coarse grid and the refinement stop after these shares of the time budget.
COARSE_SHARE = 0.4
REFINE_SHARE = 0.6
# A line in batch size and tokens has three unknowns.
LEAST_POINTS = 3
# Token counts measured at each context beyond the first.
COUNTS_BEYOND = 3


class Measured(NamedTuple):
    """The result of a run."""

    tables: CostTables
    heldout: Heldout | None
    num_points: int
    seconds: float  # time spent measuring, earlier runs of the same journal included
    sampling: dict[str, str | int | float | bool]


def run_profile(
    meter: Meter,
    *,
    grid: Grid | None = None,
    sampling: Sampling | None = None,
    budget_seconds: float | None = None,
    journal: Path | None = None,
    host: str = "",
    progress: bool = False,
    allow_partial: bool = False,
) -> Measured:
    """Measure the tables of one host.

    Args:
        meter: runs and times single forward passes.
        grid: axes before refinement; None for `default_grid`.
        sampling: how often and how precisely to time; None for the defaults.
        budget_seconds: wall time of this call, exceeded by one visit at most; None for no limit.
        journal: file to resume from and to append to; None for none.
        host: text that identifies the host and its settings; a journal of another host is refused.
        progress: show a progress bar on stderr.
        allow_partial: predict the grid points that the budget left out from those it did not, if
            each pass has `LEAST_POINTS` of them.

    Raises:
        ProfileError: the budget is too small for one visit to each grid point, the meter returned
            a time that is not positive, or the journal is damaged or of other settings.
    """
    sampling = sampling or Sampling()
    limits = meter.limits()
    grid = grid or default_grid(limits)
    settings = {
        "host": host,
        "limits": dataclasses.asdict(limits),
        "grid": grid._asdict(),
        "sampling": dataclasses.asdict(sampling),
    }
    # The device cannot serve a batch size that does not fit at the shortest context.
    batch_sizes = [b for b in grid.batch_sizes if _fits(grid, limits, b, grid.contexts[0])]
    if not batch_sizes:
        raise ProfileError("no batch size of the grid fits the device's memory")
    grid = grid._replace(batch_sizes=tuple(batch_sizes))
    references = choose_references(grid)
    with Sampler(meter, sampling, references, budget_seconds, progress) as sampler:
        if journal is None:
            return _Run(sampler, limits, grid).measure(allow_partial)
        with Journal(journal, settings) as opened:
            sampler.record_to(opened)
            return _Run(sampler, limits, grid).measure(allow_partial)


def _fits(grid: Grid, limits: Limits, batch_size: int, context: int) -> bool:
    """Return whether the device holds a batch with the most tokens that any pass adds."""
    longest = context + max(counts[-1] for counts in grid.token_counts.values())
    capacity = limits.max_tokens
    return longest <= limits.max_context and (capacity is None or batch_size * longest <= capacity)


def choose_references(grid: Grid) -> list[Point]:
    """Return two passes whose times show how fast the machine is at a moment.

    Reading the weights bounds one of them, arithmetic the other, in the middle of the grid, whose
    batch sizes fit.
    """
    batch_size, rows = (
        math.isqrt(axis[0] * axis[-1]) for axis in (grid.batch_sizes, grid.token_counts["verify"])
    )
    context = grid.contexts[0]
    return [Point("verify", 1, context, 1), Point("verify", batch_size, context, rows)]


def summarize(
    measured: Measured, output: str | Path, serving: ServingRecord | None = None
) -> dict[str, str | int | float | None]:
    """Return the facts of a run, for the last line of `cast-sglang profile`.

    `resumed_visits` counts what an earlier run measured; 0 says that this run did not resume.
    """
    heldout = measured.heldout
    return {
        "output": str(output),
        "seconds": round(measured.seconds, 1),
        "points": measured.num_points,
        "serving_steps": serving.steps if serving else 0,
        "serving_median_ratio": serving.median_ratio if serving else None,
        "serving_median_error": serving.median_error if serving else None,
        "serving_p95_error": serving.p95_error if serving else None,
        "resumed_visits": measured.sampling["resumed_visits"],
        "heldout_points": heldout.points if heldout else 0,
        "heldout_median_error": heldout.median_error if heldout else None,
        "heldout_p95_error": heldout.p95_error if heldout else None,
    }


def make_profile(
    result: Measured | CostTables, identity: HostIdentity, command: str
) -> CostProfile:
    """Join tables with their provenance, and mark tables that nobody measured as estimated."""
    measured = result if isinstance(result, Measured) else None
    tables = measured.tables if measured else result
    facts = {field: getattr(identity, field) for field in HostIdentity.__struct_fields__}
    provenance = Provenance(
        **facts,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seconds=round(measured.seconds, 1) if measured else 0.0,
        sampling=measured.sampling if measured else {},
        heldout=measured.heldout if measured else None,
        estimated=measured is None,
    )
    fields = {field: getattr(tables, field) for field in CostTables.__struct_fields__}
    return CostProfile(**fields, provenance=provenance)


class _Run:
    """One run through grid, refinement and held-out points.

    A longer context adds time to the attention alone, which is smooth in the tokens. So beyond the
    shortest context a run measures only the first, the middle and the last token count.
    """

    def __init__(self, sampler: Sampler, limits: Limits, grid: Grid) -> None:
        self._sampler = sampler
        self._fits = partial(_fits, grid, limits)
        self._names = tuple(name for name in NAMES if name in grid.token_counts)
        self._axes = {
            operation: Axes(list(grid.batch_sizes), list(grid.contexts), list(values))
            for operation, values in grid.token_counts.items()
        }
        self._heldout = self._choose_heldout()

    def measure(self, allow_partial: bool = False) -> Measured:
        sampler = self._sampler
        overhead = (STEP_OVERHEAD,) if self._supports(STEP_OVERHEAD) else ()
        coarse = [p for operation in (*self._names, *overhead) for p in self._points(operation)]
        # The held-out points take part in every round: if they were measured at another time than
        # the tables, their error would contain the drift of the machine.
        heldout = sorted(self._heldout)
        sampler.visit_once("grid", [*coarse, *heldout], share=1.0)
        measured = sampler.num_measured(coarse)
        if measured < len(coarse) and not (allow_partial and self._has_enough()):
            advice = "; run the same command again to resume, with a larger --budget-seconds"
            raise ProfileError(
                f"the time budget ended after {measured} of {len(coarse)} grid points"
                f"{advice if sampler.is_recorded else ''}"
            )
        # One visit cannot tell structure from noise.
        sampler.visit_again("grid", [*coarse, *heldout], share=COARSE_SHARE)
        self._refine()
        points = [p for operation in (*self._names, *overhead) for p in self._points(operation)]
        # The error of a table is known no better than the held-out points, so they get more visits.
        sampler.visit_until_precise("precision", points, share=1.0, always=heldout)

        tables = self._tables()
        return Measured(
            tables=tables,
            heldout=self._heldout_error(tables),
            num_points=len(points),
            seconds=sampler.seconds,
            sampling={**sampler.describe(), "heldout_standard_error": self._heldout_noise()},
        )

    def _has_enough(self) -> bool:
        """Return whether each pass was measured at shapes enough to predict the others."""
        overheads = self._points(STEP_OVERHEAD) if self._supports(STEP_OVERHEAD) else []
        measured = [self._sampler.num_measured(self._points(name)) for name in self._names]
        return min(measured) >= LEAST_POINTS and (
            not overheads or self._sampler.num_measured(overheads) > 0
        )

    def _supports(self, operation: str) -> bool:
        return self._sampler.supports(self._points(operation)[0])

    def _points(self, operation: str) -> list[Point]:
        """Return the points that a table needs with its present axes."""
        if operation == STEP_OVERHEAD:
            return [Point(operation, b, 1, 1) for b in self._axes["verify"].batch_size]
        batch_sizes, contexts, counts = self._axes[operation]
        first = [Point(operation, b, contexts[0], n) for b, n in product(batch_sizes, counts)]
        beyond = product(batch_sizes, contexts[1:], spread(counts, COUNTS_BEYOND))
        return first + [Point(operation, *point) for point in beyond if self._fits(*point[:2])]

    def _refine(self) -> None:
        """Halve the intervals whose middle lies off the line, the worst first."""
        pending = [
            Interval(operation, axis, low, high)
            for operation in self._names
            for axis in AXES
            for low, high in pairwise(getattr(self._axes[operation], axis))
        ]
        tolerance = self._sampler.sampling.interpolation_tolerance
        while pending := [interval for interval in pending if self._probes(interval)]:
            probes = {interval: self._probes(interval) for interval in pending}
            every_probe = [point for points in probes.values() for point in points]
            if not self._sampler.visit_once("refine", every_probe, share=REFINE_SHARE):
                return
            # The largest of many errors is mostly noise, so these points are visited again.
            suspects = [
                point
                for interval, points in probes.items()
                for point in points
                if self._line_error(interval, point) > tolerance
            ]
            for _ in range(self._sampler.sampling.min_visits - 1):
                self._sampler.visit_again("refine", suspects, share=REFINE_SHARE)
            errors = {
                i: max(self._line_error(i, p) for p in points) for i, points in probes.items()
            }
            pending = []
            for interval in sorted(errors, key=lambda interval: -errors[interval]):
                if errors[interval] > tolerance and self._split(interval):
                    pending += interval.split()

    def _split(self, interval: Interval) -> bool:
        """Add the middle to its axis, unless the budget is over or a held-out point lies there."""
        axis = getattr(self._axes[interval.operation], interval.axis)
        before = list(axis)
        axis[:] = sorted({*axis, *interval.middle})
        points = self._points(interval.operation)
        if self._heldout.isdisjoint(points) and self._sampler.visit_once(
            "refine", points, share=REFINE_SHARE
        ):
            return True
        axis[:] = before
        return False

    def _probes(self, interval: Interval) -> list[Point]:
        """Return a few points at the interval's middle that show whether times are linear in it."""
        batch_sizes, contexts, counts = self._axes[interval.operation]
        ends = [counts[0], counts[-1]]
        shapes = {
            # Caches overflow by the product of batch size and context, so probe both ends.
            "batch_size": [
                *product(interval.middle, contexts[:1], spread(counts, 3)),
                *product(interval.middle, contexts[-1:], ends),
            ],
            "context": product((batch_sizes[0], batch_sizes[-1]), interval.middle, ends),
            "num_tokens": product(spread(batch_sizes, 3), contexts[:1], interval.middle),
        }[interval.axis]
        probes = [Point(interval.operation, *point) for point in shapes]
        # A probe needs both of its ends; values that another split just added may lack them.
        return [
            probe
            for probe in probes
            if self._fits(probe.batch_size, probe.context)
            and all(self._sampler.has(end) for end in interval.ends(probe)[:2])
        ]

    def _line_error(self, interval: Interval, point: Point) -> float:
        """Return the relative distance from the interval's line, less three standard errors."""
        sampler = self._sampler
        low, high, share = interval.ends(point)
        line = (1 - share) * sampler.median_us(low) + share * sampler.median_us(high)
        measured = sampler.median_us(point)
        noise = math.hypot(
            sampler.standard_error(point),
            (1 - share) * sampler.standard_error(low),
            share * sampler.standard_error(high),
        )
        return abs(line - measured) / measured - 3 * noise

    def _choose_heldout(self) -> set[Point]:
        """Draw points within the grid's range that are in no table, the same at each resume."""
        rng = random.Random(self._sampler.sampling.seed)
        chosen: set[Point] = set()
        num_wanted = self._sampler.sampling.heldout_points
        grid = {point for operation in self._names for point in self._points(operation)}
        for _ in range(50 * num_wanted):
            if len(chosen) == num_wanted:
                break
            operation = self._names[len(chosen) % len(self._names)]
            point = Point(operation, *(log_uniform(rng, axis) for axis in self._axes[operation]))
            if self._fits(point.batch_size, point.context) and point not in grid:
                chosen.add(point)
        return chosen

    def _heldout_error(self, tables: CostTables) -> Heldout | None:
        measured = [point for point in sorted(self._heldout) if self._sampler.has(point)]
        if not measured:
            return None
        model = CostModel(tables, Limits.of_tables(tables))
        errors = []
        for point in measured:
            costs = model.step_costs(point.batch_size, point.context)
            predicted_us = pass_us(costs, point.operation, point.num_tokens)
            time_us = self._sampler.median_us(point)
            errors.append(abs(predicted_us - time_us) / time_us)
        median, p95 = np.quantile(errors, [0.5, 0.95])
        return Heldout(
            points=len(errors), median_error=round(float(median), 5), p95_error=round(float(p95), 5)
        )

    def _heldout_noise(self) -> float:
        """Return the standard error of the held-out points, below which no table error falls."""
        errors = [self._sampler.standard_error(p) for p in self._heldout if self._sampler.has(p)]
        return round(float(np.median(errors)), 5) if errors else 0.0

    def _tabulate(self, operation: str) -> CostTable:
        return tabulate(self._sampler, operation, self._axes[operation], self._heldout)

    def _tables(self) -> CostTables:
        overhead = None
        if self._supports(STEP_OVERHEAD):
            overhead = self._overhead_us(self._points(STEP_OVERHEAD))
        tables = {
            each.table: self._tabulate(each.name) for each in PASSES if each.name in self._names
        }
        return CostTables(**tables, step_overhead_us=overhead)

    def _overhead_us(self, points: list[Point]) -> list[float]:
        """Return the times of the points; one that was not measured has that of the nearest."""
        known = [index for index, point in enumerate(points) if self._sampler.has(point)]
        return [
            round(self._sampler.median_us(points[min(known, key=lambda k: abs(k - index))]), 3)
            for index in range(len(points))
        ]
