"""Correction: serving times its passes and scales the cost tables by what it finds.

A table is measured once; then clocks, neighbours and drivers change. Each timed pass of a served
step gives one ratio, measured to predicted time. `Residuals` keeps the ratios by pass, bucket of
batch sizes and bucket of token counts, and their median scales the table there.

The median of a few noisy passes is less exact than the table it corrects, and a policy chooses the
size that noise makes look cheap. So all buckets of a pass and batch size share one factor, which is
the speed of the device now; a bucket departs from it only as far as its own noise does not explain.

A policy never chooses a bucket that the table makes look dear, so serving alone would never find
out that it is cheap. So `Residuals` counts a bucket that was not measured as cheap as the table's
own error allows beside those that were. Where that makes it the best choice it is run, and its time
becomes known. Rarely, a step also tries another bucket than its policy chose (`exploration.py`).
"""

import bisect
import math
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits
from cast_sglang.costs.model import MAX_CACHED_STEPS, CostModel, StepCosts
from cast_sglang.costs.noise import MIN_SAMPLES, WINDOW, median_and_spread, median_error, shrink
from cast_sglang.costs.passes import NAMES
from cast_sglang.costs.plain_ratio import PlainRatio

__all__ = ["CorrectedCosts", "Residual", "Residuals"]

# A full window takes one pass in STRIDE, so that it spans many seconds: the median over one slow
# moment would make the bucket in use look dearer than its neighbours. An empty window takes all
# passes, and the fuller it gets the fewer, so that rare buckets are known soon.
STRIDE = 8
# Steps between two corrections of the costs; each takes some hundred microseconds.
REFRESH_EVERY = 64
# A scale beyond this comes from a broken measurement, not from drift.
MAX_SCALE = 4.0
# A scale that moved by less than this factor since it was last applied keeps its old value.
DEADBAND = 0.02
# The server reports a bucket that is off by more than this factor over a full window.
REPORT_BEYOND = 1.25


class Residual(NamedTuple):
    """One bucket that serving measured."""

    operation: str  # of `passes.NAMES`
    batch_sizes: tuple[int, int]  # first and last of the bucket
    tokens: tuple[int, int]  # rows or nodes per request, first and last of the bucket
    ratio: float  # median of measured / predicted
    samples: int  # in the window


class Residuals:
    """Median ratios of measured to predicted time, by pass and bucket.

    Batch sizes fall into octaves (1, 2, 3-4, 5-8, ...), token counts into half octaves (1, 2, 3,
    4, 5-6, 7-8, 9-12, ...). Finer buckets would take long to learn, coarser ones would blur the
    steps of a table.

    Args:
        limits: the largest batch, and the most rows per request, which end the last buckets.
        table_error: relative error of the table's times, in [0, 1).
    """

    def __init__(self, limits: Limits, table_error: float = 0.0) -> None:
        self._table_error = table_error
        self._batch_edges = _edges(limits.max_batch_size, halves=False)
        self._token_edges = _edges(limits.max_verify_rows, halves=True)
        shape = (len(NAMES), len(self._batch_edges), len(self._token_edges))
        self._shape = shape
        self.version = 0  # increases when the scales change
        self.reset()

    def reset(self) -> None:
        """Forget all measurements, so that the tables hold unscaled."""
        self._windows: dict[tuple[int, int, int], deque[float]] = {}
        self._recorded: Counter[tuple[int, int, int]] = Counter()
        self._ratios = np.ones(self._shape)
        self._spreads = np.zeros(self._shape)  # standard deviations of the logarithms
        self._samples = np.zeros(self._shape, dtype=np.int64)
        self._known_samples = self._samples.copy()  # as of the last refresh, equal on all ranks
        self._scales = np.ones(self._shape)
        self._plain_ratio = PlainRatio(len(self._batch_edges))
        self._last_steps: list[tuple[int, bool, float]] = []  # since the last refresh
        self.version += 1

    def record(self, operation: str, batch_size: int, num_tokens: int, ratio: float) -> None:
        """Add the ratio of one timed pass to its bucket.

        Args:
            operation: of `passes.NAMES`.
            ratio: measured over predicted time; ignored unless positive and finite.
        """
        if not 0.0 < ratio < math.inf:
            return
        batch, token = self.batch_bucket(batch_size), self.token_bucket(num_tokens)
        key = (NAMES.index(operation), batch, token)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = deque(maxlen=WINDOW)
        self._recorded[key] += 1
        if self._recorded[key] % min(2 ** (len(window) * 4 // WINDOW), STRIDE):
            return
        window.append(math.log(ratio))
        median, self._spreads[key] = median_and_spread(window)
        self._ratios[key] = math.exp(median)
        self._samples[key] = len(window)

    def record_step(self, batch_size: int, is_plain: bool, ratio: float) -> None:
        """Add the ratio of one whole step; arguments as of `PlainRatio.record`."""
        self._last_steps.append((self.batch_bucket(batch_size), is_plain, ratio))

    def plain_ratio(self, batch_size: int) -> float:
        """Return measured over predicted time of plain steps, over that of steps with a tree."""
        return self._plain_ratio.of(self.batch_bucket(batch_size))

    def state(self) -> tuple[np.ndarray, ...]:
        """Return what was recorded, for the other ranks of a tensor-parallel group."""
        self._take_steps()
        return self._ratios, self._spreads, self._samples, self._plain_ratio.state()

    def refresh(self, state: tuple[np.ndarray, ...] | None = None) -> bool:
        """Apply what this rank, or rank 0, recorded; return whether a scale changed.

        Args:
            state: of rank 0, so that all ranks scale alike; None for this rank's own.
        """
        self._take_steps()
        plain = None
        if state is not None:
            self._ratios, self._spreads, self._samples, plain = (array.copy() for array in state)
        self._known_samples = self._samples.copy()
        ratios = _shrink_to_common(self._ratios, self._spreads, self._samples)
        filled = _fill_unmeasured(ratios, self._samples, self._table_error)
        scales = np.clip(filled, 1 / MAX_SCALE, MAX_SCALE)
        moved = np.abs(np.log(scales / self._scales)) > DEADBAND
        if not self._plain_ratio.refresh(plain) and not moved.any():
            return False
        self._scales = np.where(moved, scales, self._scales)
        self.version += 1
        return True

    def _take_steps(self) -> None:
        for step in self._last_steps:
            self._plain_ratio.record(*step)
        self._last_steps.clear()

    def scales(self, operation: str, batch_size: int, num_counts: int) -> np.ndarray:
        """Return [num_counts] float32, the factors on the table's times of 1.. tokens."""
        row = self._scales[NAMES.index(operation), self.batch_bucket(batch_size)]
        counts = np.arange(1, num_counts + 1)
        index = np.searchsorted(self._token_edges, counts)
        return row[np.minimum(index, len(row) - 1)].astype(np.float32)

    def samples(self, operation: str, batch_size: int) -> np.ndarray:
        """Return [T] int64, how many samples each bucket of token counts had at the last refresh.

        The numbers are equal on all ranks of a tensor-parallel group.
        """
        return self._known_samples[NAMES.index(operation), self.batch_bucket(batch_size)]

    def __iter__(self) -> Iterator[Residual]:
        """Yield the buckets that have samples."""
        for index in zip(*np.nonzero(self._samples), strict=True):
            which, batch, token = (int(i) for i in index)
            yield Residual(
                NAMES[which],
                _span(self._batch_edges, batch),
                _span(self._token_edges, token),
                float(self._ratios[index]),
                int(self._samples[index]),
            )

    def suspects(self) -> list[Residual]:
        """Return the buckets that are off by more than a quarter in a full window, worst first."""
        beyond = math.log(REPORT_BEYOND)
        found = [r for r in self if r.samples == WINDOW and abs(math.log(r.ratio)) > beyond]
        return sorted(found, key=lambda residual: -abs(math.log(residual.ratio)))

    def token_bucket(self, num_tokens: int) -> int:
        """Return the index of the bucket that holds a number of rows or nodes per request."""
        token = bisect.bisect_left(self._token_edges, num_tokens)
        return min(token, len(self._token_edges) - 1)

    def batch_bucket(self, batch_size: int) -> int:
        """Return the index of the bucket that holds a batch size."""
        batch = bisect.bisect_left(self._batch_edges, batch_size)
        return min(batch, len(self._batch_edges) - 1)


class CorrectedCosts:
    """Costs of a step as `CostModel` gives them, scaled by what serving measured."""

    def __init__(self, model: CostModel, residuals: Residuals) -> None:
        self._model = model
        self._residuals = residuals
        self._version = -1
        self._cache: dict[tuple[int, int], StepCosts] = {}

    def step_costs(self, batch_size: int, context: float) -> StepCosts:
        """Return the costs of a step; arguments and errors as in `CostModel.step_costs`.

        The unit is the corrected S_T(B)[c][1]. So a table that is off by one factor throughout
        gives the same trees as the right one.
        """
        if self._residuals.version != self._version or len(self._cache) >= MAX_CACHED_STEPS:
            self._version = self._residuals.version
            self._cache.clear()
        key = (batch_size, math.ceil(context / CONTEXT_BUCKET_TOKENS))
        costs = self._cache.get(key)
        if costs is None:
            costs = self._cache[key] = self._corrected(batch_size, context)
        return costs

    def _corrected(self, batch_size: int, context: float) -> StepCosts:
        raw = self._model.step_costs(batch_size, context)
        scaled = {}
        for name in NAMES:
            costs = getattr(raw, name)
            scaled[name] = costs * self._residuals.scales(name, batch_size, len(costs))
        unit = float(self._residuals.scales("verify", batch_size, 1)[0])
        overhead = raw.overhead / unit
        plain = (1.0 + overhead) * self._residuals.plain_ratio(batch_size)
        return StepCosts(
            **{name: costs / np.float32(unit) for name, costs in scaled.items()},
            unit_us=raw.unit_us * unit,
            overhead=overhead,
            plain_overhead=plain - 1.0,
        )


def _shrink_to_common(ratios: np.ndarray, spreads: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Move each bucket towards the common ratio of its pass and batch size, by its own noise.

    Definition: log out = common + shrink(log ratio - common, error)
        common = median of the log ratios, each weighted by its number of samples
        error = standard error of the bucket's median, by max(own spread, median spread)

    Args:
        ratios, spreads, samples: [passes, batch buckets, token buckets].
    """
    shrunk = ratios.copy()
    for row in np.ndindex(ratios.shape[:2]):
        known = samples[row] >= MIN_SAMPLES
        if not known.any():
            continue
        logs, counts = np.log(ratios[row][known]), samples[row][known]
        order = np.argsort(logs)
        middle = np.searchsorted(np.cumsum(counts[order]), counts.sum() / 2)
        common = logs[order][middle]
        spread = np.maximum(spreads[row][known], np.median(spreads[row][known]))
        error = median_error(spread, counts)
        shrunk[row][known] = np.exp(common + shrink(logs - common, error))
    return shrunk


def _fill_unmeasured(ratios: np.ndarray, samples: np.ndarray, table_error: float) -> np.ndarray:
    """Give each bucket with too few samples the ratio of the nearest one of the same batch sizes.

    Tables are wrong over regions, where a kernel changed or another process shares a cache. Each
    entry also has an error of its own, which counts in favour of the bucket, so that it is tried;
    not so in that of one token, as `Exploration.explore_plain` tries a lone root.
    """
    known = samples >= MIN_SAMPLES
    filled = np.ones_like(ratios)
    index = np.arange(ratios.shape[2])
    for row in np.ndindex(ratios.shape[:2]):
        if known[row].any():
            measured = index[known[row]]
            nearest = np.abs(index[:, None] - measured).argmin(axis=1)
            filled[row] = ratios[row][measured[nearest]]
            is_favoured = ~known[row]
            is_favoured[0] = False
            filled[row][is_favoured] *= 1.0 - table_error
    return filled


def _edges(limit: int, *, halves: bool) -> list[int]:
    """Return the last value of each bucket up to `limit`: of octaves, or of half octaves."""
    edges = [1]
    while edges[-1] < limit:
        octave = 1 << edges[-1].bit_length()
        half = octave - octave // 4
        edges.append(half if halves and half > edges[-1] else octave)
    edges[-1] = limit
    return edges


def _span(edges: list[int], bucket: int) -> tuple[int, int]:
    """Return the first and the last value of a bucket."""
    return (edges[bucket - 1] + 1 if bucket else 1), edges[bucket]
