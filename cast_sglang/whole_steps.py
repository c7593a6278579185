"""Whole steps: what plain ones take against those with a tree.

Whether drafting pays at all is a matter of a few percent at large batches, less than what a shared
machine's speed wanders within seconds. So times of the two kinds of steps are compared only where
they lie close together: each step of one kind with the last ones of the other, both relative to
what the costs say. A change of speed is in both and cancels.
"""

import math
from collections import deque

import numpy as np

__all__ = ["WholeSteps", "shrink"]

WINDOW = 32
MIN_SAMPLES = 4
# Steps before one in which it looks for the other kind.
NEIGHBOURS = 16
# Standard errors by which a measured value may differ from the expected without being believed.
NOISE = 2.0
# A ratio that moved less than this since it was last applied is left alone.
DEADBAND = 0.01


class WholeSteps:
    """What a plain step takes, relative to its costs, where one with a tree takes what its own say.

    Args:
        num_buckets: of batch sizes.
    """

    def __init__(self, num_buckets: int) -> None:
        self._recent = [deque[tuple[bool, float]](maxlen=NEIGHBOURS) for _ in range(num_buckets)]
        self._windows = [deque[float](maxlen=WINDOW) for _ in range(num_buckets)]
        # Logarithms, 0 where too little was seen.
        self._measured = np.zeros(num_buckets)
        self._known = self._measured.copy()

    def record(self, bucket: int, is_plain: bool, ratio: float) -> None:
        """Count one step.

        Args:
            is_plain: whether it verified the root alone.
            ratio: measured over predicted time; ignored unless positive and finite.
        """
        if not 0.0 < ratio < math.inf:
            return
        own, recent, window = math.log(ratio), self._recent[bucket], self._windows[bucket]
        others = [other for kind, other in recent if kind != is_plain]
        recent.append((is_plain, own))
        if len(others) < MIN_SAMPLES:
            return
        difference = own - sorted(others)[len(others) // 2]
        window.append(difference if is_plain else -difference)
        if len(window) >= MIN_SAMPLES:
            self._measured[bucket] = _believed(window)

    def state(self) -> np.ndarray:
        """Return what was recorded, for the other ranks of a tensor-parallel group."""
        return self._measured

    def refresh(self, state: np.ndarray | None = None) -> bool:
        """Apply what was recorded, here or by rank 0; return whether that changes anything."""
        if state is not None:
            self._measured = state.copy()
        moved = np.abs(self._measured - self._known) > DEADBAND
        self._known = np.where(moved, self._measured, self._known)
        return bool(moved.any())

    def plain_ratio(self, bucket: int) -> float:
        """Return it as of the last refresh, 1 where too little was seen."""
        return math.exp(self._known[bucket])


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


def _believed(values: deque[float]) -> float:
    """Return the median of some differences, as far as it is not noise."""
    ranked, count = sorted(values), len(values)
    spread = (ranked[3 * count // 4] - ranked[count // 4]) / 1.349
    error = 1.25 * spread / math.sqrt(count)
    return float(shrink(np.array(ranked[count // 2]), np.array(error)))
