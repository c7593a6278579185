"""Measure S_T and S_D: which forward passes to time, how often, and when a time is good enough.

The engine is behind the `Meter` protocol; nothing here knows of it. A run has three parts:

    grid       every point of a coarse grid, visited in shuffled rounds, so that a drift of the
               clock frequency spreads over all points instead of looking like structure
    refine     token counts are added where linear interpolation misses a measured midpoint
    held out   random points off the grid, never in the tables, to state the tables' error
"""

import dataclasses
import datetime
import random
from collections.abc import Iterable
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cast_sglang.cost import CostModel
from cast_sglang.errors import ProfileError
from cast_sglang.grid import Grid, Interval, default_grid, log_uniform, spread
from cast_sglang.journal import Journal, Point, journal_path
from cast_sglang.metering import Limits, Meter, Sampler, Sampling
from cast_sglang.profile_schema import (
    CostProfile,
    CostTable,
    CostTables,
    Heldout,
    HostIdentity,
    Provenance,
)
from cast_sglang.profiles import save_profile

__all__ = ["Measured", "run_profile", "summarize", "write_profile"]

TABLES = ("verify", "draft", "draft_extend")
# Shares of the time budget after which the coarse grid and the refinement stop improving.
COARSE_SHARE = 0.6
REFINE_SHARE = 0.85


class Measured(NamedTuple):
    """Outcome of a run."""

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
) -> Measured:
    """Measure the tables of one host.

    Args:
        meter: runs and times single forward passes.
        grid: axes before refinement; None for `default_grid`.
        sampling: how often and how precisely; None for the defaults.
        budget_seconds: wall time of this call, kept to within one visit; None for no limit.
        journal: file of measurements to resume from and append to; None for none.
        host: text that identifies the host and its settings; a journal of another is refused.
        progress: show a progress bar on stderr.

    Raises:
        ProfileError: the budget is too small for one visit to each grid point, the meter returned
            a time that is not positive, or the journal does not fit.
    """
    sampling = sampling or Sampling()
    limits = meter.limits()
    grid = grid or default_grid(limits)
    settings = {
        "host": host,
        "limits": limits._asdict(),
        "grid": grid._asdict(),
        "sampling": dataclasses.asdict(sampling),
    }
    with Sampler(meter, sampling, budget_seconds, progress) as sampler:
        if journal is None:
            return _Run(sampler, limits, grid).measure()
        with Journal(journal, settings) as opened:
            sampler.record_to(opened)
            return _Run(sampler, limits, grid).measure()


def summarize(measured: Measured, output: str | Path) -> dict[str, str | int | float | None]:
    """Return the facts of a run, for the last line of `cast-sglang profile`."""
    heldout = measured.heldout
    return {
        "output": str(output),
        "seconds": round(measured.seconds, 1),
        "points": measured.num_points,
        "heldout_points": heldout.points if heldout else 0,
        "heldout_median_error": heldout.median_error if heldout else None,
        "heldout_p95_error": heldout.p95_error if heldout else None,
    }


def write_profile(
    measured: Measured, identity: HostIdentity, output: str | Path, command: str
) -> CostProfile:
    """Save what was measured with its provenance, and drop the journal it came from.

    Raises:
        ProfileError: the tables are not valid or the file cannot be written.
    """
    facts = {field: getattr(identity, field) for field in identity.__struct_fields__}
    provenance = Provenance(
        **facts,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seconds=round(measured.seconds, 1),
        sampling=measured.sampling,
        heldout=measured.heldout,
    )
    tables = {field: getattr(measured.tables, field) for field in CostTables.__struct_fields__}
    profile = CostProfile(**tables, provenance=provenance)
    save_profile(profile, output)
    journal_path(output).unlink(missing_ok=True)
    return profile


class _Run:
    """One pass through grid, refinement and held-out points."""

    def __init__(self, sampler: Sampler, limits: Limits, grid: Grid) -> None:
        self._sampler = sampler
        self._limits = limits
        self._tolerance = sampler.sampling.interpolation_tolerance
        self._counts = {
            "verify": sorted({1, *grid.verify_rows}),
            "draft": sorted(grid.draft_widths),
            "draft_extend": sorted(grid.verify_rows),
        }
        self._most_rows = max(self._counts["verify"][-1], self._counts["draft"][-1])
        self._contexts = sorted(grid.contexts)
        # A batch size that does not fit at the shortest context cannot be served.
        self._batch_sizes = [
            b for b in sorted(grid.batch_sizes) if self._fits(b, self._contexts[0])
        ]
        if not self._batch_sizes:
            raise ProfileError("no batch size of the grid fits the device's memory")
        self._cells = [
            cell for cell in product(self._batch_sizes, self._contexts) if self._fits(*cell)
        ]
        self._heldout = self._choose_heldout()

    def measure(self) -> Measured:
        sampler = self._sampler
        coarse = [p for operation in TABLES for p in self._points(operation)]
        for operation in ("plain", "step_overhead"):
            if self._supports(operation):
                coarse += self._points(operation)
        if not sampler.measure("grid", coarse, share=COARSE_SHARE, first_share=1.0):
            raise ProfileError(
                f"the time budget ended after {sampler.num_measured(coarse)} of {len(coarse)} grid "
                f"points; run the same command again to resume, with a larger --budget-seconds"
            )
        self._refine()
        table_points = [p for operation in TABLES for p in self._points(operation)]
        sampler.measure("precision", table_points, share=REFINE_SHARE)
        sampler.measure("held out", sorted(self._heldout), share=1.0)

        tables = self._tables()
        return Measured(
            tables=tables,
            heldout=self._heldout_error(tables),
            num_points=sampler.num_measured({*coarse, *table_points}),
            seconds=sampler.seconds,
            sampling=sampler.describe(),
        )

    def _supports(self, operation: str) -> bool:
        return self._sampler.supports(self._points(operation)[0])

    def _fits(self, batch_size: int, context: int) -> bool:
        longest = context + self._most_rows
        capacity = self._limits.max_tokens
        return longest <= self._limits.max_context and (
            capacity is None or batch_size * longest <= capacity
        )

    def _points(self, operation: str, counts: Iterable[int] | None = None) -> list[Point]:
        if operation == "step_overhead":
            return [Point(operation, batch_size, 1, 1) for batch_size in self._batch_sizes]
        counts = self._counts.get(operation, [1]) if counts is None else counts
        return [Point(operation, *cell, count) for count in counts for cell in self._cells]

    def _refine(self) -> None:
        """Halve the intervals of token counts whose middle is not on the line; worst first."""
        sampler = self._sampler
        pending = [
            Interval(operation, low, high)
            for operation in TABLES
            for low, high in pairwise(self._counts[operation])
        ]
        while pending := [interval for interval in pending if interval.middle]:
            probes = {
                interval: [p for count in interval.middle for p in self._probes(interval, count)]
                for interval in pending
            }
            every_probe = [point for points in probes.values() for point in points]
            if not sampler.measure("refine", every_probe, share=REFINE_SHARE):
                return
            errors = {
                i: max(self._line_error(i, p) for p in points) for i, points in probes.items()
            }
            pending = []
            for interval in sorted(errors, key=lambda interval: -errors[interval]):
                points = self._points(interval.operation, interval.middle)
                if errors[interval] <= self._tolerance or not self._heldout.isdisjoint(points):
                    continue
                if not sampler.measure("refine", points, share=REFINE_SHARE):
                    return
                counts = self._counts[interval.operation]
                self._counts[interval.operation] = sorted({*counts, *interval.middle})
                pending += interval.split()

    def _probes(self, interval: Interval, count: int) -> list[Point]:
        """Cells that show the staircase of token counts: few, but across the batch sizes."""
        return [Point(interval.operation, *cell, count) for cell in spread(self._cells, 4)]

    def _line_error(self, interval: Interval, point: Point) -> float:
        """Return the relative distance from the interval's line, less what noise explains."""
        sampler, (_, low, high) = self._sampler, interval
        left = sampler.median_us(point._replace(num_tokens=low))
        right = sampler.median_us(point._replace(num_tokens=high))
        line = left + (right - left) * (point.num_tokens - low) / (high - low)
        measured = sampler.median_us(point)
        return abs(line - measured) / measured - sampler.precision(point)

    def _choose_heldout(self) -> set[Point]:
        """Draw points inside the grid's range that no table will hold; the same for each resume."""
        rng = random.Random(self._sampler.sampling.seed)
        chosen: set[Point] = set()
        num_wanted = self._sampler.sampling.heldout_points
        for _ in range(50 * num_wanted):
            if len(chosen) == num_wanted:
                break
            operation = TABLES[len(chosen) % len(TABLES)]
            counts = self._counts[operation]
            batch_size = log_uniform(rng, self._batch_sizes)
            context = log_uniform(rng, self._contexts)
            point = Point(operation, batch_size, context, log_uniform(rng, counts))
            in_grid = (batch_size, context) in self._cells and point.num_tokens in counts
            if self._fits(batch_size, context) and not in_grid:
                chosen.add(point)
        return chosen

    def _heldout_error(self, tables: CostTables) -> Heldout | None:
        measured = [point for point in sorted(self._heldout) if self._sampler.has(point)]
        if not measured:
            return None
        model = CostModel(
            tables,
            max_batch_size=self._batch_sizes[-1],
            max_context=self._contexts[-1],
            max_verify_tokens=self._counts["verify"][-1],
            max_width=self._counts["draft"][-1],
        )
        errors = []
        for point in measured:
            costs = model.step_costs(point.batch_size, point.context)
            predicted_us = getattr(costs, point.operation)[point.num_tokens - 1] * costs.unit_us
            time_us = self._sampler.median_us(point)
            errors.append(abs(float(predicted_us) - time_us) / time_us)
        median, p95 = np.quantile(errors, [0.5, 0.95])
        return Heldout(
            points=len(errors), median_error=round(float(median), 5), p95_error=round(float(p95), 5)
        )

    def _tables(self) -> CostTables:
        plain = self._table("plain") if self._supports("plain") else None
        overhead = None
        if self._supports("step_overhead"):
            points = self._points("step_overhead")
            overhead = [round(self._sampler.median_us(point), 3) for point in points]
        return CostTables(
            target=self._table("verify"),
            draft=self._table("draft"),
            draft_extend=self._table("draft_extend"),
            plain=plain,
            step_overhead_us=overhead,
        )

    def _table(self, operation: str) -> CostTable:
        counts = self._counts.get(operation, [1])
        shape = (len(self._batch_sizes), len(self._contexts), len(counts))
        time_us, spread_us = np.zeros(shape), np.zeros(shape)
        samples = np.zeros(shape, dtype=int)
        axes = (self._batch_sizes, self._contexts, counts)
        for index in np.ndindex(*shape):
            batch_size, context, count = (axis[i] for axis, i in zip(axes, index, strict=True))
            if (batch_size, context) in self._cells:
                point = Point(operation, batch_size, context, count)
                time_us[index], spread_us[index], samples[index] = self._sampler.summary(point)
            else:
                # Does not fit the device, so it is never asked for exactly; continue the row.
                b, c, n = index
                before = time_us[b, max(c - 2, 0) : c, n]
                rise = before[-1] - before[0] if c >= 2 else 0.0
                time_us[index], spread_us[index] = (
                    before[-1] + max(rise, 0.0),
                    spread_us[b, c - 1, n],
                )
        return CostTable(
            batch_sizes=self._batch_sizes,
            contexts=self._contexts,
            token_counts=counts,
            time_us=np.round(time_us, 3).tolist(),
            spread_us=np.round(spread_us, 3).tolist(),
            samples=samples.tolist(),
        )
