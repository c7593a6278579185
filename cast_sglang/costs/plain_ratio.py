"""PlainRatio: how long plain steps take beside steps with a tree, compared as whole steps.

At large batches a few percent decide whether drafting pays. A shared machine's speed wanders by
more than that within seconds. So each step is compared only with steps of the other kind just
before it, both relative to what the costs predict: a change of speed is in both and cancels.
"""

import math
from collections import deque

import numpy as np

from cast_sglang.costs.noise import MIN_SAMPLES, WINDOW, median_and_spread, median_error, shrink

__all__ = ["PlainRatio"]

# A step is compared with those of the other kind among this many before it.
NEIGHBOURS = 16
# A ratio that moved by less since it was last applied keeps its old value.
DEADBAND = 0.01


class PlainRatio:
    """Learns the ratio of measured to predicted time of plain steps, over that of other steps.

    Args:
        num_buckets: buckets of batch sizes; each has a ratio of its own.
    """

    def __init__(self, num_buckets: int) -> None:
        self._recent = [deque[tuple[bool, float]](maxlen=NEIGHBOURS) for _ in range(num_buckets)]
        self._windows = [deque[float](maxlen=WINDOW) for _ in range(num_buckets)]
        # [num_buckets] logarithms; 0 where too few steps were recorded.
        self._measured = np.zeros(num_buckets)
        self._known = self._measured.copy()

    def record(self, bucket: int, is_plain: bool, ratio: float) -> None:
        """Compare one step with its neighbours of the other kind.

        Args:
            is_plain: whether the step verified the root alone.
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
        """Apply what this rank, or rank 0, recorded; return whether a ratio changed.

        Args:
            state: of rank 0; None for this rank's own.
        """
        if state is not None:
            self._measured = state.copy()
        moved = np.abs(self._measured - self._known) > DEADBAND
        self._known = np.where(moved, self._measured, self._known)
        return bool(moved.any())

    def of(self, bucket: int) -> float:
        """Return the ratio as of the last refresh; 1 where too few steps were recorded."""
        return math.exp(self._known[bucket])
