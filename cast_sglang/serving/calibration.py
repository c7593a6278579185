"""Calibration: what verify accepted, fed back into the scores of the next trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from cast_sglang.acceptance import Acceptance, verify_outcomes

if TYPE_CHECKING:
    from cast_sglang.tree import Selection

__all__ = ["Calibration"]


class _Drafted(NamedTuple):
    """The verified part of a step's tree."""

    selection: Selection
    probs: torch.Tensor  # [B, N - 1], the draft's own probabilities given the parent
    widths: tuple[int, ...]
    topk: int


class Calibration:
    """Applies an `Acceptance` to the layers of a tree and teaches it by the tree's outcome.

    A step's outcome is read when the next tree has been drafted: drafting has waited for it anyway,
    so on a GPU the copies to the host wait for nothing.
    """

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self._probs: list[torch.Tensor] = []  # of the tree that grows, one entry per layer
        self._drafted: _Drafted | None = None
        self._outcome: tuple[_Drafted, torch.Tensor] | None = None

    def apply(self, probs: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the calibrated probabilities of a layer's candidates given their parents.

        Args:
            probs: [n, K] float32, request-major: the root's children, or those of a layer's nodes.
            depth: the candidates' layer, 1 for the root's children.
        """
        if depth == 1:
            self._probs.clear()
        self._probs.append(probs)
        return self.acceptance.calibrated(probs, depth)

    def selected(self, selection: Selection, widths: tuple[int, ...], topk: int) -> None:
        """Take note of what the step verifies, and learn from the step before."""
        self._learn()
        batch_size = selection.top_scores_index.shape[0]
        candidates = torch.cat([probs.reshape(batch_size, -1) for probs in self._probs], dim=1)
        # The candidate that does not exist has no probability either, and teaches nothing.
        candidates = torch.nn.functional.pad(candidates, (0, 1), value=torch.nan)
        probs = candidates.gather(1, selection.top_scores_index)
        self._drafted = _Drafted(selection, probs, widths, topk)

    def verified(self, accept_index: torch.Tensor) -> None:
        """Take note of the outcome.

        Args:
            accept_index: [B, *] int, as SGLang's verify returns it; -1 for none.
        """
        if self._drafted is not None:
            self._outcome = (self._drafted, accept_index)
            self._drafted = None

    def _learn(self) -> None:
        if self._outcome is None:
            return
        drafted, accept_index = self._outcome
        self._outcome = None
        outcomes = verify_outcomes(
            drafted.selection.parent_list.numpy(force=True),
            drafted.selection.top_scores_index.numpy(force=True),
            accept_index.numpy(force=True),
            drafted.widths,
            drafted.topk,
        )
        self.acceptance.update(
            drafted.probs.numpy(force=True).ravel(), *(part.ravel() for part in outcomes)
        )
