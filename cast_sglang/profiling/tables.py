"""Make a cost table from measurements: smooth them, and fill in the points that lack one.

Neighbouring shapes take similar times, and a noisy machine measures each of them badly. So a
Gaussian process over the logarithms of shape and time weighs a measurement against its neighbours.
It passes through precise measurements, steps of tiles included, and averages noisy ones.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2 and 5.
"""

from collections.abc import Collection
from itertools import product

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from cast_sglang.costs.schema import CostTable
from cast_sglang.profiling.grid import Axes
from cast_sglang.profiling.journal import Point
from cast_sglang.profiling.sampler import Sampler

__all__ = ["smooth", "tabulate"]

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
        axes: the grid, of which all points of the first context were measured and some of the
            others.
        heldout: measured points that must not contribute.
    """
    measured = [point for point in sampler.points(operation) if point not in heldout]
    error = np.array([sampler.standard_error(point) for point in measured])
    median_us = np.array([sampler.median_us(point) for point in measured])
    smoothed = smooth(_shapes(measured), median_us, error)
    # Neighbours may move a time within its error, no further.
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
    """Fill the gaps of [B, C, N] times in place; the first context has none.

    The time that a longer context adds to the first one is interpolated between measured counts.
    """
    for b, c in product(range(time_us.shape[0]), range(1, time_us.shape[1])):
        here = np.nonzero(is_measured[b, c])[0]
        if len(here):
            added = np.interp(counts, counts[here], time_us[b, c, here] - time_us[b, 0, here])
            filled = time_us[b, 0] + added
        else:
            # The shape exceeds the device's memory, so no step runs it; continue the rows.
            rise = time_us[b, c - 1] - time_us[b, c - 2] if c >= 2 else 0.0
            filled = time_us[b, c - 1] + np.maximum(rise, 0.0)
        time_us[b, c] = np.where(is_measured[b, c], time_us[b, c], filled)


def _shapes(points: list[Point]) -> np.ndarray:
    """Return [P, 3], the batch size, context and tokens of each point."""
    return np.array([point[1:] for point in points], dtype=float)


def smooth(shapes: np.ndarray, time_us: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Estimate the times of shapes from noisy measurements of all of them.

    Args:
        shapes: [P, 3] measured shapes (batch size, context, tokens), each >= 1.
        time_us: [P] their times, positive.
        noise: [P] relative standard errors of the times, >= 0.

    Returns:
        [P] times in microseconds.
    """
    x, y = np.log(shapes), np.log(time_us)
    x -= x.mean(axis=0)
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
    estimate: np.ndarray = np.exp(mean + _kernel(x, x, parameters) @ weights)
    return estimate


def _kernel(a: np.ndarray, b: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Return [P, Q] covariances: a power law, a smooth deviation from it, and rough steps."""
    height, *lengths, step_height, step_length = np.exp(parameters)
    distance = a[:, None] - b[None]  # [P, Q, 3]
    trend = 1.0 + a @ b.T
    smooth_part = np.exp(-0.5 * ((distance / np.array(lengths)) ** 2).sum(-1))
    steps = np.exp(-np.abs(distance / step_length).sum(-1))
    return TREND_SCALE**2 * trend + height**2 * smooth_part + step_height**2 * steps
