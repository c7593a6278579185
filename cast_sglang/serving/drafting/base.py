"""The layers of a step's tree, however they are run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from cast_sglang.tree import Frontier

__all__ = ["Layers"]


class Layers(Protocol):
    """The layers of one step's tree, top down; layer 1, the root's children, is given."""

    def prepare(self, frontier: Frontier) -> None:
        """Take the newest layer's best nodes, before it is known how many of them are kept."""

    def fit(self, width: int) -> int:
        """Return the width to run for a width that was chosen; not smaller."""

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the draft model over the frontier's best nodes.

        Returns:
            probs [B * W, K] float32 and tokens [B * W, K] int64 of each node's best children.
        """
