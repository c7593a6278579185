"""Whole steps: what plain ones take against those with a tree.

Whether drafting pays at all is a matter of a few percent at large batches, less than what a shared
machine's speed wanders within seconds. So times of the two kinds of steps are compared only where
they lie close together: each step of one kind with the last ones of the other, both relative to
what the costs say. A change of speed is in both and cancels.
"""

import math
from collections import deque

import numpy as np

from cast_sglang.costs.noise import MIN_SAMPLES, WINDOW, median_and_spread, median_error, shrink

__all__ = ["WholeSteps"]

# Steps before one in which it looks for the other kind.
NEIGHBOURS = 16
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
        difference = own - median_and_spread(others)[0]
        window.append(difference if is_plain else -difference)
        if len(window) >= MIN_SAMPLES:
            median, spread = median_and_spread(window)
            error = median_error(np.array(spread), np.array(len(window)))
            self._measured[bucket] = shrink(np.array(median), error)

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
