"""Make a cost table from measurements: smooth them, and complete what they leave open.

Neighbouring shapes take similar times, and a noisy machine measures each of them badly. So a
Gaussian process over the logarithms of shape and time weighs a measurement against its neighbours.
It passes through precise measurements, steps of tiles included, and averages noisy ones.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2 and 5.

What was not measured is interpolated or extrapolated, and no time of a table is below that of a
smaller batch or a shorter context (`complete`). Such a table would make larger loads look free.
"""

from collections.abc import Collection
from itertools import product

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize, nnls

from cast_sglang.costs.schema import CostTable
from cast_sglang.profiling.grid import Axes
from cast_sglang.profiling.journal import Point
from cast_sglang.profiling.sampler import Sampler

__all__ = ["complete", "smooth", "tabulate"]

# Prior of the kernel's parameters: mean and standard deviation of their logarithms. Lengths are in
# factors of e of batch size, context and tokens, heights in factors of e of time.
PRIOR = {
    "height": (np.log(0.5), 1.0),
    "length of batch size": (np.log(1.5), 0.7),
    "length of context": (np.log(2.5), 0.7),
    "length of tokens": (np.log(1.5), 0.7),
    # Steps of tiles and of captured sizes are small and rough, so their kernel is not smooth.
    "height of steps": (np.log(0.05), 1.0),
    "length of steps": (np.log(0.7), 0.7),
}
# Steepness of the power law from which the process deviates.
TREND_SCALE = 1.0
# Smaller relative errors count as this one; they would make the covariance singular.
LEAST_NOISE = 2e-3


def tabulate(sampler: Sampler, operation: str, axes: Axes, heldout: Collection[Point]) -> CostTable:
    """Return the table of one operation, with smoothed times.

    Args:
        axes: the grid. Points of the first context that were not measured are predicted.
        heldout: measured points that must not contribute.
    """
    measured = [point for point in sampler.points(operation) if point not in heldout]
    error = np.array([sampler.standard_error(point) for point in measured])
    median_us = np.array([sampler.median_us(point) for point in measured])
    missing = [
        point
        for b, n in product(axes.batch_size, axes.num_tokens)
        if not sampler.has(point := Point(operation, b, axes.context[0], n))
    ]
    if missing:
        # Too little time for a second visit: nobody knows how much these times scatter.
        error = np.maximum(error, sampler.sampling.tolerance)
    smoothed, predicted = smooth(_shapes(measured), median_us, error, _shapes(missing))
    # Neighbours may move a time within its error, no further.
    smoothed = np.clip(smoothed, median_us * (1 - 2 * error), median_us * (1 + 2 * error))
    known = dict(zip([*measured, *missing], [*smoothed, *predicted], strict=True))

    shape = tuple(map(len, axes))
    time_us, spread_us = np.zeros(shape), np.zeros(shape)
    samples = np.zeros(shape, dtype=int)
    for index in np.ndindex(*shape):
        values = (axis[i] for axis, i in zip(axes, index, strict=True))
        if (point := Point(operation, *values)) in known:
            time_us[index] = known[point]
            if sampler.has(point):
                _, spread_us[index], samples[index] = sampler.summary(point)
    time_us = complete(time_us, time_us > 0, axes)
    return CostTable(
        batch_sizes=axes.batch_size,
        contexts=axes.context,
        token_counts=axes.num_tokens,
        time_us=np.round(time_us, 3).tolist(),
        spread_us=np.round(spread_us, 3).tolist(),
        samples=samples.tolist(),
    )


def complete(time_us: np.ndarray, is_measured: np.ndarray, axes: Axes) -> np.ndarray:
    """Return times of every cell that never fall with the batch size or the context.

    Where measured times fall, each becomes the geometric mean of the longest one at no larger shape
    and the shortest one at no smaller shape; all other measured times stay. Between two measured
    token counts, what the context adds to the first one is interpolated.

    Where nothing was measured, a pass over B requests of n tokens adds B * context * (a + b * n) to
    its time at the first context: attention reads each request's keys and values once and
    multiplies them by each of its tokens, and no other part of a pass depends on the context. a and
    b are fitted by least squares, in which the longest passes weigh most; they are the nearest to
    what is missing.

    Args:
        time_us: [B, C, N] microseconds, positive where measured.
        is_measured: [B, C, N] bool, true in all of the first context.
        axes: values of the three axes.

    Returns:
        [B, C, N] microseconds. A cell that was not measured lies between the measured cells at no
        larger and at no smaller batch sizes and contexts.
    """
    batch_sizes, contexts, counts = (np.asarray(axis, dtype=float) for axis in axes)
    time_us = np.sqrt(np.prod(_bounds(time_us, is_measured), axis=0))
    first = time_us[:, :1]
    reads = batch_sizes[:, None] * (contexts - contexts[0])  # [B, C] more than at the first context
    estimate = first + _fit_context(time_us - first, is_measured, reads, counts)
    for b, c in np.argwhere(is_measured.any(axis=2)):
        here = np.nonzero(is_measured[b, c])[0]
        added = np.interp(counts, counts[here], (time_us - first)[b, c, here])
        estimate[b, c] = first[b, 0] + added
    for axis in (0, 1):
        estimate = np.maximum.accumulate(estimate, axis=axis)
    return np.clip(estimate, *_bounds(time_us, is_measured))


def _bounds(time_us: np.ndarray, is_measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the longest measured time at no larger shape, and the shortest at no smaller one.

    Both are [B, C, N]; shapes are compared by batch size and context, at the same token count. The
    second is infinite where there is none.
    """
    below = np.where(is_measured, time_us, 0.0)
    above = np.where(is_measured, time_us, np.inf)[::-1, ::-1]
    for axis in (0, 1):
        below = np.maximum.accumulate(below, axis=axis)
        above = np.minimum.accumulate(above, axis=axis)
    return below, above[::-1, ::-1]


def _fit_context(
    added_us: np.ndarray, is_measured: np.ndarray, reads: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return [B, C, N], what a longer context adds by the model of `complete`.

    Args:
        added_us: [B, C, N] what it adds to the first context where measured.
        reads: [B, C] tokens of context of all requests, less those of the first context.
        counts: [N] tokens per request.
    """
    products = reads[..., None] * counts
    terms = np.stack([np.broadcast_to(reads[..., None], products.shape), products], axis=-1)
    is_beyond = is_measured & (products > 0)
    if not is_beyond.any():
        return np.zeros_like(added_us)
    scale = terms.max(axis=(0, 1, 2))
    rates, _ = nnls(terms[is_beyond] / scale, added_us[is_beyond])
    fitted: np.ndarray = terms @ (rates / scale)
    return fitted


def _shapes(points: list[Point]) -> np.ndarray:
    """Return [P, 3], the batch size, context and tokens of each point."""
    return np.array([point[1:] for point in points], dtype=float).reshape(-1, 3)


def smooth(
    shapes: np.ndarray, time_us: np.ndarray, noise: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the times of shapes from noisy measurements of some of them.

    Args:
        shapes: [P, 3] measured shapes (batch size, context, tokens), each >= 1.
        time_us: [P] their times, positive.
        noise: [P] relative standard errors of the times, >= 0.
        wanted: [Q, 3] shapes that were not measured.

    Returns:
        [P] and [Q] times in microseconds, of the measured and of the other shapes.
    """
    x, y = np.log(shapes), np.log(time_us)
    center = x.mean(axis=0)
    x -= center
    mean = y.mean()
    variance = np.maximum(noise, LEAST_NOISE) ** 2
    prior, width = np.array(list(PRIOR.values())).T

    def covariance(parameters: np.ndarray) -> np.ndarray:
        return _kernel(x, x, parameters) + np.diag(variance)

    def misfit(parameters: np.ndarray) -> float:
        """Return the negative logarithm of the parameters' posterior."""
        factor = cho_factor(covariance(parameters), lower=True)
        explained = 0.5 * (y - mean) @ cho_solve(factor, y - mean)
        penalty = 0.5 * (((parameters - prior) / width) ** 2).sum()
        return float(explained + np.log(np.diag(factor[0])).sum() + penalty)

    bounds = list(zip(prior - 3 * width, prior + 3 * width, strict=True))
    parameters = minimize(misfit, prior, method="L-BFGS-B", bounds=bounds).x
    weights = cho_solve(cho_factor(covariance(parameters), lower=True), y - mean)

    def estimate(at: np.ndarray) -> np.ndarray:
        times_us: np.ndarray = np.exp(mean + _kernel(at, x, parameters) @ weights)
        return times_us

    return estimate(x), estimate(np.log(wanted) - center)


def _kernel(a: np.ndarray, b: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Return [P, Q] covariances: a power law, a smooth deviation from it, and rough steps."""
    height, *lengths, step_height, step_length = np.exp(parameters)
    distance = a[:, None] - b[None]  # [P, Q, 3]
    trend = 1.0 + a @ b.T
    smooth_part = np.exp(-0.5 * ((distance / np.array(lengths)) ** 2).sum(-1))
    steps = np.exp(-np.abs(distance / step_length).sum(-1))
    return TREND_SCALE**2 * trend + height**2 * smooth_part + step_height**2 * steps
