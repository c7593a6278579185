"""Drift: notice that drafts are accepted far less than calibration remembers.

A draft that no longer fits its target, after an update of weights or because it is that of another
model, stays as sure of its tokens as before and is rejected. Text that is hard to draft does not
look like that: there the draft is less sure, and calibration expects less.
"""

from __future__ import annotations

import numpy as np

from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.outcomes import VerifiedNodes

__all__ = ["COLLAPSED", "Drift"]

# Accepted nodes that a window expects. With chances near one half their standard deviation is 3,
# so what counts as a collapse below is almost four of them away.
WINDOW = 16.0
# Passes that a window has at least. Requests of one pass are often alike, such as samples of one
# prompt, and their nodes then count as one.
LEAST_PASSES = 32
# Of what is expected, what counts as a collapse and what ends it. A draft that was never calibrated
# is overconfident, but not by so much: see `policy.acceptance`.
COLLAPSED, RECOVERED = 1 / 3, 2 / 3


class Drift:
    """Teaches curves, and compares the nodes that are accepted with those that were expected.

    The curves in use follow a collapse within some hundred nodes and would soon expect nothing. So
    what is remembered are those of the last window that was as expected.

    Args:
        acceptance: has the curves.

    Attributes:
        ratio: accepted over expected nodes of the last window; None before there was one.
        is_collapsed: from a window below COLLAPSED to one above RECOVERED.
    """

    def __init__(self, acceptance: Acceptance) -> None:
        self.ratio: float | None = None
        self.is_collapsed = False
        self._acceptance = acceptance
        self._remembered: np.ndarray | None = None  # curves, taken with the first nodes
        self._expected = self._accepted = 0.0  # of the window that is open
        self._passes = 0

    def update(self, nodes: VerifiedNodes, kinds: np.ndarray) -> bool:
        """Learn from the nodes of one verify pass; return whether they ended a window.

        Args:
            kinds: [B] int64, the kind of each request.
        """
        if self._remembered is None:
            self._remembered = self._acceptance.curves()
        expected, accepted = self._acceptance.update(nodes, kinds, self._remembered)
        self._expected += expected
        self._accepted += accepted
        self._passes += 1
        if self._expected < WINDOW or self._passes < LEAST_PASSES:
            return False
        self.ratio = self._accepted / self._expected
        self._expected, self._accepted, self._passes = 0.0, 0.0, 0
        self.is_collapsed = self.ratio < (RECOVERED if self.is_collapsed else COLLAPSED)
        if not self.is_collapsed:
            self._remembered = self._acceptance.curves()
        return True
