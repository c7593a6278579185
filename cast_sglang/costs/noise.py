"""Evidence: what the last few of some noisy measurements say, and how much of it is believed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["MIN_SAMPLES", "WINDOW", "median_and_spread", "median_error", "shrink"]

WINDOW = 32
# Fewer samples say nothing.
MIN_SAMPLES = 4
# Standard errors by which a measured value may differ from the expected without being believed.
NOISE = 2.0


def median_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Return the median and the standard deviation, from the quartiles as of a normal one.

    Args:
        values: at least one.
    """
    ranked = sorted(values)
    count = len(ranked)
    spread = (ranked[3 * count // 4] - ranked[count // 4]) / 1.349
    return ranked[count // 2], spread


def median_error(spread: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the standard error of medians of so many samples of this spread."""
    return 1.25 * spread / np.sqrt(samples)


def shrink(departed: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return how far measured values are believed to be from the expected ones.

    Definition: out = departed * max(0, 1 - (NOISE * error / departed)^2)

    Nothing where noise may explain it, nearly all where it is far beyond: to take the noise off in
    full, as soft thresholding does, would leave every value short by it.

    Args:
        departed: measured minus expected.
        error: >= 0, standard errors of the measured.

    Source: Breiman, "Better subset regression using the nonnegative garrote" (Technometrics 37,
    1995).
    """
    noise = np.minimum(NOISE * error / np.maximum(np.abs(departed), 1e-12), 1.0)
    return departed * (1.0 - noise**2)
