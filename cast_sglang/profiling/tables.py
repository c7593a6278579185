"""From measurements to a cost table: smoothed, and complete where a part was measured."""

from collections.abc import Collection
from itertools import product

import numpy as np

from cast_sglang.costs.schema import CostTable
from cast_sglang.profiling.grid import Axes
from cast_sglang.profiling.journal import Point
from cast_sglang.profiling.sampler import Sampler
from cast_sglang.profiling.smoothing import smooth

__all__ = ["tabulate"]


def tabulate(sampler: Sampler, operation: str, axes: Axes, heldout: Collection[Point]) -> CostTable:
    """Lay the smoothed times of everything measured out on a table's grid.

    Args:
        axes: the grid; at the first context everything is measured, at others at least a part.
        heldout: measured points that must not contribute.
    """
    measured = [point for point in sampler.points(operation) if point not in heldout]
    error = np.array([sampler.standard_error(point) for point in measured])
    median_us = np.array([sampler.median_us(point) for point in measured])
    smoothed = smooth(_shapes(measured), median_us, error)
    # Neighbours may correct a measurement within its error, not overrule it.
    smoothed = np.clip(smoothed, median_us * (1 - 2 * error), median_us * (1 + 2 * error))
    known = dict(zip(measured, smoothed, strict=True))

    shape = tuple(map(len, axes))
    time_us, spread_us = np.zeros(shape), np.zeros(shape)
    samples = np.zeros(shape, dtype=int)
    for index in np.ndindex(*shape):
        values = (axis[i] for axis, i in zip(axes, index, strict=True))
        if (point := Point(operation, *values)) in known:
            _, spread_us[index], samples[index] = sampler.summary(point)
            time_us[index] = known[point]
    _fill(time_us, samples > 0, np.asarray(axes.num_tokens))
    return CostTable(
        batch_sizes=axes.batch_size,
        contexts=axes.context,
        token_counts=axes.num_tokens,
        time_us=np.round(time_us, 3).tolist(),
        spread_us=np.round(spread_us, 3).tolist(),
        samples=samples.tolist(),
    )


def _fill(time_us: np.ndarray, is_measured: np.ndarray, counts: np.ndarray) -> None:
    """Complete [B, C, N] times in place; of the first context all are measured.

    What a longer context adds to the first one is interpolated between the measured counts.
    """
    for b, c in product(range(time_us.shape[0]), range(1, time_us.shape[1])):
        here = np.nonzero(is_measured[b, c])[0]
        if len(here):
            added = np.interp(counts, counts[here], time_us[b, c, here] - time_us[b, 0, here])
            filled = time_us[b, 0] + added
        else:
            # Does not fit the device, so it is never asked for exactly; continue the rows.
            rise = time_us[b, c - 1] - time_us[b, c - 2] if c >= 2 else 0.0
            filled = time_us[b, c - 1] + np.maximum(rise, 0.0)
        time_us[b, c] = np.where(is_measured[b, c], time_us[b, c], filled)


def _shapes(points: list[Point]) -> np.ndarray:
    """Return [P, 3] batch sizes, contexts and tokens."""
    return np.array([point[1:] for point in points], dtype=float)
