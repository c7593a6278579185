"""Noise: the median of a few measurements, how far off it may be, and how much of it to believe."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["MIN_SAMPLES", "WINDOW", "median_and_spread", "median_error", "shrink"]

# Measurements that count: the last ones.
WINDOW = 32
# With fewer samples nothing is believed.
MIN_SAMPLES = 4
# Standard errors by which a value must differ from the expected one to be believed.
NOISE = 2.0


def median_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Return the median, and the standard deviation of a normal distribution of these quartiles.

    Args:
        values: at least one.
    """
    ranked = sorted(values)
    count = len(ranked)
    spread = (ranked[3 * count // 4] - ranked[count // 4]) / 1.349
    return ranked[count // 2], spread


def median_error(spread: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the standard error of the median of normal values.

    Args:
        spread: standard deviation of the values.
        samples: number of values.
    """
    return 1.25 * spread / np.sqrt(samples)


def shrink(departed: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the part of a difference that noise does not explain.

    Definition: out = departed * max(0, 1 - (NOISE * error / departed)^2)

    A difference within the noise becomes 0, one far beyond it stays nearly whole. Soft thresholding
    would subtract the noise in full and leave every value short by it.

    Args:
        departed: measured minus expected.
        error: >= 0, standard errors of the measured.

    Source: Breiman, "Better subset regression using the nonnegative garrote" (Technometrics 37,
    1995).
    """
    noise = np.minimum(NOISE * error / np.maximum(np.abs(departed), 1e-12), 1.0)
    return departed * (1.0 - noise**2)
