"""Smooth measured times: what all points of a table say about each of its entries.

Times of neighbouring shapes are related, and each is known only as well as the machine let it be
measured. A Gaussian process over the logarithms of shape and time weighs both: where measurements
are precise it passes through them, tile steps included; where they scatter it averages neighbours.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2 and 5.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

__all__ = ["smooth"]

# The prior of the kernel's parameters, in logarithms: mean and standard deviation. Lengths are in
# factors of e of batch size, context and tokens; heights in factors of e of time.
PRIOR = {
    "height": (np.log(0.5), 1.0),
    "length of batch size": (np.log(1.5), 0.7),
    "length of context": (np.log(2.5), 0.7),
    "length of tokens": (np.log(1.5), 0.7),
    # Tiles and captured sizes: small, and rough, so their kernel is not smooth.
    "height of steps": (np.log(0.05), 1.0),
    "length of steps": (np.log(0.7), 0.7),
}
# How steep the power law may be that the process deviates from.
TREND_SCALE = 1.0
# Relative errors below this are not believed; they would make the covariance singular.
LEAST_NOISE = 2e-3


def smooth(shapes: np.ndarray, time_us: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Estimate what shapes cost from noisy times of all of them.

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
        """Return the negative logarithm of the posterior of the parameters."""
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
