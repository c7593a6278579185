"""Exploration: rarely, a step runs another size than its policy chose, so that its time is known.

A policy never chooses a size that the table makes look dear, so serving alone would never find out
that it is cheap. `Exploration` therefore tries, now and then, a size of which too few passes were
timed. A try waits until what it may lose is a hundredth of the steps since the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cast_sglang.costs.correction import Residuals
from cast_sglang.costs.noise import MIN_SAMPLES

__all__ = ["Exploration"]

# Timed steps between two tries, at least: of a bucket that lacks samples, and of a neighbour whose
# samples may be old.
EXPLORE_EVERY = 16
REVISIT_EVERY = 256
# Share of the timed steps that tries may lose.
EXPLORE_SHARE = 0.01
# The same of tries of plain decoding once its time is known.
REVISIT_SHARE = EXPLORE_SHARE / 4

_PLAIN = "plain"  # under which tries of plain decoding count, beside those of each pass


class Exploration:
    """Decides which size a timed step tries in place of the chosen one.

    All ranks of a tensor-parallel group decide alike: they count the same steps, and `Residuals`
    gives them the number of samples that rank 0 had at the last refresh.

    Args:
        residuals: what is known of each bucket.
    """

    def __init__(self, residuals: Residuals) -> None:
        self._residuals = residuals
        self.reset()

    def reset(self) -> None:
        """Forget when what was tried."""
        # By pass, or plain decoding, and bucket of batch sizes.
        self._steps: dict[tuple[str, int], int] = {}
        self._last_tried: dict[tuple[str, int], int] = {}
        # By pass, bucket of batch sizes and bucket of token counts.
        self._tried: dict[tuple[str, int, int], int] = {}

    def explore(
        self,
        operation: str,
        batch_size: int,
        chosen: int,
        sizes: Sequence[int],
        costs: np.ndarray,
    ) -> int:
        """Return the size to run: the chosen one, or now and then one of another bucket.

        Call it once in each step whose passes are timed.

        Args:
            operation: of `passes.NAMES`.
            chosen: the policy's number of rows or nodes per request, one of `sizes`.
            sizes: the numbers that this step can run, ascending.
            costs: [>= sizes[-1]] float32, the pass's costs of 1.. tokens.
        """
        batch = self._residuals.batch_bucket(batch_size)
        waited = self._wait(operation, batch)
        if waited < EXPLORE_EVERY:
            return chosen
        token = self._residuals.token_bucket(chosen)
        largest = {self._residuals.token_bucket(size): size for size in sizes}
        samples = self._residuals.samples(operation, batch_size)
        others = [other for other in largest if other != token and samples[other] < MIN_SAMPLES]
        if not others and waited >= REVISIT_EVERY:
            others = [other for other in (token - 1, token + 1) if other in largest]
        if not others:
            return chosen

        # The nearest, and of two as near the one that was tried less lately.
        def order(other: int) -> tuple[int, int]:
            return abs(other - token), self._tried.get((operation, batch, other), 0)

        other = min(others, key=order)
        tried = largest[other]
        # A dearer number takes more time, and a smaller one brings less, at worst in proportion.
        loss = max(float(costs[tried - 1] / costs[chosen - 1]) - 1.0, 1.0 - tried / chosen)
        if waited * EXPLORE_SHARE < loss:
            return chosen
        step = self._steps[operation, batch]
        self._last_tried[operation, batch] = self._tried[operation, batch, other] = step
        return tried

    def explore_plain(self, batch_size: int, loss: float) -> bool:
        """Return whether to decode plainly once, so that the time of a lone root gets known.

        Drafting is judged by the time of a plain step. A server that always drafts would never find
        out that a plain step takes less than in its table. Call it once in each timed step that
        would draft.

        Args:
            loss: share of a step's time that a plain step loses.
        """
        batch = self._residuals.batch_bucket(batch_size)
        waited = self._wait(_PLAIN, batch)
        is_known = self._residuals.samples("verify", batch_size)[0] >= MIN_SAMPLES
        share = REVISIT_SHARE if is_known else EXPLORE_SHARE
        if waited < EXPLORE_EVERY or waited * share < loss:
            return False
        self._last_tried[_PLAIN, batch] = self._steps[_PLAIN, batch]
        return True

    def _wait(self, kind: str, batch: int) -> int:
        """Count one more step; return how many passed since the last try."""
        step = self._steps[kind, batch] = self._steps.get((kind, batch), 0) + 1
        return step - self._last_tried.get((kind, batch), 0)
