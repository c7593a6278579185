"""Correction: serving times its passes and scales the cost tables by what it finds.

A table is measured once; then clocks, neighbours and drivers change, and passes that follow each
other take other times than passes of one kind. Each timed pass gives one ratio, measured to
predicted time. `Residuals` takes its logarithm for a sum of parts:

    the speed of the moment, the same for all passes, which comes and goes within seconds
    how far off the pass is everywhere
    at batch sizes of this octave
    around this number of tokens
    at this very number

Each part has a variance, what is not known of it. A surprise is shared out among the parts by their
variances (a Kalman filter that keeps no covariances). So the speed of the moment ends in no table,
what holds for a whole table is learned from any of its entries, and an entry departs from it as far
as its own measurements say. What was not measured for long becomes uncertain again.

What whole steps take beyond their passes is learned beside it: a part of every step, one of every
layer, and one of every step that drafts. So each kind of step is tied to measured ones of its kind.

Source: Kalman, "A new approach to linear filtering and prediction problems" (Journal of Basic
Engineering 82, 1960).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits
from cast_sglang.costs.model import MAX_CACHED_STEPS, CostModel, StepCosts
from cast_sglang.costs.passes import NAMES
from cast_sglang.ops.compiled import compiled

__all__ = ["CorrectedCosts", "Residual", "Residuals"]

# Standard deviations of the parts before anything is measured, as logarithms. On a machine with two
# cores passes took 1.25 to 1.8 times what their table said, and layers of two nodes 2.4 times. On
# the simulated machines of the tests, 0.15 and 0.2 for bucket and size lose 1 % in the first 100
# steps and 0.6 % after 500; half of either made no difference.
DEVIATIONS = {"pass": 0.35, "octave": 0.2, "bucket": 0.1, "size": 0.1}
# By how much the speed of the moment changes from one pass to the next: it follows within some
# ten passes, and a plateau of seconds has hundreds.
DRIFT = 0.02
# Noise of one pass until its own is known: that of the same machine.
NOISE = 0.15
# A surprise counts up to this many standard deviations: more comes from a broken measurement.
MAX_SURPRISE = 3.0
# Steps after which a part that was not measured is as uncertain as at first. Four times as many
# made no difference on the simulated machines.
HORIZON = 2048
# The same of the time outside of passes, in target passes: of a step, of a layer, and what a step
# that drafts takes more, of which no more is known; and the noise of a whole step relative to its
# time, which is that of its passes. A wider part of a layer took up errors of passes there, and no
# second layer was grown any more.
REST_DEVIATIONS = (0.2, 0.02, 0.2)
STEP_NOISE = 0.15
# A layer takes no less than its passes. A step, and one that drafts against it, may take so many
# target passes less, where passes overlap: twice as many leave time, as its verify takes about one.
MAX_OVERLAP = 0.25
LEAST_REST = (-MAX_OVERLAP, 0.0, -MAX_OVERLAP)

# Steps between two corrections of the costs; one takes about as long as a decision.
REFRESH_EVERY = 16
# A scale beyond this comes from a broken measurement, not from drift.
MAX_SCALE = 4.0
# The server reports a bucket that is off by more than this factor after as many passes.
REPORT_BEYOND = 1.25
REPORT_AFTER = 32


class Residual(NamedTuple):
    """One bucket that serving measured."""

    operation: str  # of `passes.NAMES`
    batch_sizes: tuple[int, int]  # first and last of the bucket
    tokens: tuple[int, int]  # rows or nodes per request, first and last of the bucket
    ratio: float  # measured / predicted, without the speed of the moment
    samples: int  # passes


class Residuals:
    """How far the times of passes are off the table, by pass and size.

    Batch sizes fall into octaves (1, 2, 3-4, 5-8, ...), token counts into half octaves (1, 2, 3,
    4, 5-6, 7-8, 9-12, ...), in which each count has a part of its own.

    Args:
        limits: the largest batch, and the most rows per request.

    Attributes:
        version: increases when the scales change.
    """

    def __init__(self, limits: Limits) -> None:
        self._batch_edges = _edges(limits.max_batch_size, halves=False)
        self._token_edges = _edges(limits.max_verify_rows, halves=True)
        octaves, num_sizes = len(NAMES) * len(self._batch_edges), limits.max_verify_rows
        counts = (len(NAMES), octaves, octaves * len(self._token_edges), octaves * num_sizes)
        # The parts of each kind lie one after the other in the arrays of parts.
        self._starts = np.cumsum((0, *counts))
        self._prior = np.repeat(np.square(list(DEVIATIONS.values())), counts)
        self._places = self._place_parts(num_sizes)
        self.version = 0
        self.reset()

    def reset(self) -> None:
        """Forget all measurements, so that the tables hold unscaled."""
        self._means = np.zeros(self._starts[-1])
        self._variances = self._prior.copy()
        # The speed of the moment, its variance, and the variance of the noise.
        self._moment = np.array([0.0, DRIFT**2, NOISE**2])
        num_octaves = len(self._batch_edges)
        # Time outside of passes by octave, and its covariance; as of `rest`.
        self._rest = np.zeros((num_octaves, 3))
        prior = np.diag(np.square(REST_DEVIATIONS))
        self._rest_covariances = np.tile(prior, (num_octaves, 1, 1))
        self._samples = np.zeros(self._starts[3] - self._starts[2], dtype=np.int64)
        self._known = self._means.copy(), self._rest.copy()  # as of the last refresh
        self.version += 1

    def record(self, operation: str, batch_size: int, num_tokens: int, ratio: float) -> None:
        """Learn from one timed pass.

        Args:
            operation: of `passes.NAMES`.
            ratio: measured over predicted time; ignored unless positive and finite.
        """
        if not 0.0 < ratio < math.inf:
            return
        learned = self._means, self._variances, self._samples, self._starts, self._places
        which = NAMES.index(operation), self.batch_bucket(batch_size), num_tokens
        _share_out_surprise(*learned, *which, self._moment, math.log(ratio))

    def record_step(
        self, batch_size: int, num_layers: int, measured: float, expected: float
    ) -> None:
        """Learn from a whole step what it takes beyond its passes.

        Args:
            num_layers: of the step's tree; 0 for a plain step.
            measured: time of the step, in units of the table.
            expected: the same by the costs in use; both ignored unless positive and finite.
        """
        if not (0.0 < measured < math.inf and 0.0 < expected < math.inf):
            return
        octave = self.batch_bucket(batch_size)
        rest, known, covariance = (
            part[octave] for part in (self._rest, self._known[1], self._rest_covariances)
        )
        of_passes = self._variances[: len(NAMES)], self._moment
        _learn_rest(rest, known, covariance, *of_passes, num_layers, measured, expected)

    def values(self) -> tuple[np.ndarray, ...]:
        """Return what was learned, for the other ranks of a tensor-parallel group."""
        return self._means, self._rest

    def state(self) -> dict[str, Any]:
        """Return what was learned, but for the speed of the moment, as JSON can hold it."""
        parts = zip(DEVIATIONS, self._tables(), strict=True)
        state: dict[str, Any] = {name: np.round(table, 4).tolist() for name, table in parts}
        return {**state, "rest": np.round(self._rest, 4).tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Start from what `state()` returned, also of a server with another largest batch or tree.

        What was learned counts as a first guess, as uncertain as the tables are at first: passes
        may take other times by now.

        Raises:
            ValueError: `state` is not valid; nothing is changed then.
        """
        loaded = []
        for name, table in zip((*DEVIATIONS, "rest"), [*self._tables(), self._rest], strict=True):
            try:
                values = np.array(state[name], dtype=np.float64)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"corrections: {name} is missing or is no table") from error
            if values.ndim != table.ndim or not np.isfinite(values).all():
                raise ValueError(f"corrections: {name} must be a table of finite numbers")
            loaded.append(values)
        self.reset()
        for table, values in zip([*self._tables(), self._rest], loaded, strict=True):
            both = tuple(slice(min(sizes)) for sizes in zip(table.shape, values.shape, strict=True))
            table[both] = values[both]
        np.maximum(self._rest, LEAST_REST, out=self._rest)
        self._known = self._means.copy(), self._rest.copy()

    def _tables(self) -> list[np.ndarray]:
        """Return the parts of each kind: [passes], [.., octaves], [.., .., buckets or sizes]."""
        passes, octaves = len(NAMES), len(self._batch_edges)
        shapes = ((passes,), (passes, octaves), (passes, octaves, -1), (passes, octaves, -1))
        return [
            self._means[start:end].reshape(shape)
            for start, end, shape in zip(self._starts, self._starts[1:], shapes, strict=False)
        ]

    def refresh(self, values: tuple[np.ndarray, ...] | None = None) -> None:
        """Apply what this rank, or rank 0, learned.

        Args:
            values: of rank 0, so that all ranks scale alike; None for this rank's own.
        """
        means, rest = self.values() if values is None else values
        self._known = means.copy(), rest.copy()
        self._variances += self._prior * (REFRESH_EVERY / HORIZON)
        np.minimum(self._variances, self._prior, out=self._variances)
        self.version += 1

    def scales(self, operation: str, batch_size: int, num_counts: int) -> np.ndarray:
        """Return [num_counts] float32, the factors on the table's times of 1.. tokens."""
        known = self._known[0][self._places_of(operation, batch_size)].sum(axis=0)
        limit = math.log(MAX_SCALE)
        # Beyond the largest size all are as that one.
        counts = known.take(np.arange(num_counts), mode="clip")
        return np.exp(counts.clip(-limit, limit)).astype(np.float32)

    def rest(self, batch_size: int) -> tuple[float, float, float]:
        """Return times beyond the table, in its units: of a step, of each layer, of drafting."""
        step, layer, drafted = self._known[1][self.batch_bucket(batch_size)].tolist()
        return step, layer, drafted

    def __iter__(self) -> Iterator[Residual]:
        """Yield the buckets that have samples."""
        shape = len(NAMES), len(self._batch_edges), len(self._token_edges)
        for index in np.flatnonzero(self._samples).tolist():
            which, batch, token = (int(part) for part in np.unravel_index(index, shape))
            batch_sizes, tokens = _span(self._batch_edges, batch), _span(self._token_edges, token)
            places = self._places[which, batch, :, tokens[0] - 1 : tokens[1]]
            ratio = math.exp(self._means[places].sum(axis=0).mean())
            yield Residual(NAMES[which], batch_sizes, tokens, ratio, int(self._samples[index]))

    def suspects(self) -> list[Residual]:
        """Return the buckets that are off by more than a quarter, worst first."""
        beyond = math.log(REPORT_BEYOND)
        found = [r for r in self if r.samples >= REPORT_AFTER and abs(math.log(r.ratio)) > beyond]
        return sorted(found, key=lambda residual: -abs(math.log(residual.ratio)))

    def batch_bucket(self, batch_size: int) -> int:
        """Return the index of the bucket that holds a batch size."""
        batch = bisect.bisect_left(self._batch_edges, batch_size)
        return min(batch, len(self._batch_edges) - 1)

    def _places_of(self, operation: str, batch_size: int) -> np.ndarray:
        """Return [4, sizes], the indices of the parts of passes over 1.. tokens."""
        places: np.ndarray = self._places[NAMES.index(operation), self.batch_bucket(batch_size)]
        return places

    def _place_parts(self, num_sizes: int) -> np.ndarray:
        """Return [passes, octaves, 4, sizes] int64, the indices of the parts of every pass."""
        octaves, buckets = len(self._batch_edges), len(self._token_edges)
        row = np.arange(len(NAMES) * octaves).reshape(len(NAMES), octaves, 1)
        sizes = np.arange(num_sizes)
        tokens = np.searchsorted(self._token_edges, sizes + 1)
        parts = row // octaves, row, row * buckets + tokens, row * num_sizes + sizes
        return self._starts[:4, None] + np.stack(np.broadcast_arrays(*parts), axis=2)


class CorrectedCosts:
    """Costs of a step as `CostModel` gives them, corrected by what serving measured."""

    def __init__(self, model: CostModel, residuals: Residuals) -> None:
        self._model = model
        self._residuals = residuals
        self._version = -1
        self._cache: dict[tuple[int, int], StepCosts] = {}

    def step_costs(self, batch_size: int, context: float) -> StepCosts:
        """Return the costs of a step; arguments and errors as in `CostModel.step_costs`.

        The unit is the corrected time of verifying one row. What scales all passes alike, of which
        one can hardly tell for how long it holds, so moves no price.
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
        step, layer, drafted = self._residuals.rest(batch_size)
        # The draft's first layer comes out of draft extend; every further one is a pass of its own.
        scaled["draft"] = scaled["draft"] + np.float32(layer)
        unit = scaled["verify"][0]
        return StepCosts(
            **{name: costs / unit for name, costs in scaled.items()},
            unit_us=raw.unit_us * float(unit),
            overhead=(raw.overhead + step + layer + drafted) / float(unit),
            plain_overhead=(raw.plain_overhead + step) / float(unit),
        )


@compiled("void(f8[:], f8[:], i8[:], i8[:], i8[:, :, :, :], i8, i8, i8, f8[:], f8)")
def _share_out_surprise(
    means: np.ndarray,
    variances: np.ndarray,
    samples: np.ndarray,
    starts: np.ndarray,
    places: np.ndarray,
    operation: int,
    octave: int,
    num_tokens: int,
    moment: np.ndarray,
    log_ratio: float,
) -> None:
    """Move the parts of one pass, and the speed of the moment, towards what was measured.

    Args:
        means, variances: [parts] float64.
        samples: [buckets] int64, passes of each bucket, which are the third kind of parts.
        starts: [5] int64, where the parts of each kind begin.
        places: [passes, octaves, 4, sizes] int64, the parts of every pass.
        operation, octave, num_tokens: of this pass.
        moment: [3] float64, the speed of the moment, its variance, and the variance of the noise.
        log_ratio: of measured to predicted time.
    """
    parts = places[operation, octave, :, min(max(num_tokens, 1), places.shape[3]) - 1]
    samples[parts[2] - starts[2]] += 1
    moment[1] += DRIFT**2
    expected, known = moment[0], moment[1]
    for place in parts:
        expected += means[place]
        known += variances[place]
    total = known + moment[2]
    most = MAX_SURPRISE * math.sqrt(total)
    surprise = min(max(log_ratio - expected, -most), most)
    moment[0] += moment[1] * surprise / total
    moment[1] -= moment[1] * moment[1] / total
    for place in parts:
        means[place] += variances[place] * surprise / total
        variances[place] -= variances[place] * variances[place] / total
    # The noise is what the parts do not explain, over some hundred passes.
    moment[2] += 0.01 * (max(surprise * surprise - known, 1e-4) - moment[2])


@compiled("void(f8[:], f8[:], f8[:, :], f8[:], f8[:], f8, f8, f8)")
def _learn_rest(
    rest: np.ndarray,
    known: np.ndarray,
    covariance: np.ndarray,
    variances: np.ndarray,
    moment: np.ndarray,
    num_layers: float,
    measured: float,
    expected: float,
) -> None:
    """Do the work of `Residuals.record_step`.

    Args:
        rest, known: [3] float64, as of `Residuals.rest`; of now, and as in the expected time.
        covariance: [3, 3] float64, of `rest`.
        variances: float64, of how far off each pass is everywhere.
        moment: as of `_share_out_surprise`.
    """
    parts = np.array([1.0, num_layers, 1.0 if num_layers > 0.0 else 0.0])
    passes = expected - (known * parts).sum()
    surprise = measured / math.exp(moment[0]) - passes - (rest * parts).sum()
    scale = 1.0
    for part in range(3):
        prior = REST_DEVIATIONS[part] ** 2
        covariance[part, part] += prior / HORIZON
        # What steps of equal layers cannot tell apart is no less certain than at first.
        scale = min(scale, prior / covariance[part, part])
    covariance *= scale
    gain = (covariance * parts).sum(axis=1)
    # As long as the passes are not known, nor is what is left of the step.
    noise = STEP_NOISE**2 + variances.max() + moment[1]
    variance = (gain * parts).sum() + noise * expected**2
    most = MAX_SURPRISE * math.sqrt(variance)
    rest += gain / variance * min(max(surprise, -most), most)
    covariance -= np.outer(gain, gain) / variance
    rest[:] = np.maximum(rest, np.array(LEAST_REST))


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
