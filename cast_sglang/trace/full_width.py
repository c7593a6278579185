"""Policy `full-width`: layers of full width, and the best depth and size of each step by search.

The policy compares trees with other trees offline and cannot serve: it grows the whole envelope in
every step, chooses then, and counts the time of the layers that stay alone. It is no upper bound,
since it knows no narrow layers: where drafts are dear, a chain is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import Costs, TreePolicy
from cast_sglang.policy.select_count import select_size, size_costs

__all__ = ["Choice", "FullWidthPolicy", "best_choice", "layers_kept"]


class Choice(NamedTuple):
    """A depth and a number of verified nodes."""

    num_layers: int
    num_draft_tokens: int  # N, root included
    value: float  # expected accepted tokens, less the price of the time


def best_choice(
    layer_scores: Sequence[torch.Tensor],
    draft_costs: Sequence[float],
    verify_costs: np.ndarray,
    sizes: Sequence[int],
    price: float,
) -> Choice:
    """Search all depths and sizes of a tree of full width.

    Definition: the first (d, N) that maximises
        sum of the best N - 1 scores of layers 1..d (mean over the batch)
        - price * (draft_costs[0] + ... + draft_costs[d - 2] + verify_costs[N - 1])

    Args:
        layer_scores: D tensors [B, M_d] float32, scores of each layer's candidates in any order.
        draft_costs: D - 1 costs; entry d - 1 is that of growing layer d + 1.
        verify_costs: [N] float32, cost of 1.. rows per request.
        sizes: ascending values allowed for N, each >= 2.
        price: accepted tokens per unit of cost.

    Raises:
        ValueError: no size fits into the first layer.
    """
    best: Choice | None = None
    costs = size_costs(verify_costs, sizes)
    for depth in range(1, len(layer_scores) + 1):
        scores = torch.cat(list(layer_scores[:depth]), dim=1).sort(dim=1, descending=True).values
        size, value = select_size(scores.numpy(force=True), costs, sizes, price)
        value -= price * sum(draft_costs[: depth - 1])
        if best is None or value > best.value:
            best = Choice(depth, size, value)
    if best is None or best.value == -math.inf:
        raise ValueError(f"no size of {tuple(sizes)} fits the tree")
    return best


class FullWidthPolicy(AutoPolicy):
    """Keeps every node of every layer, then searches for the best depth and size.

    As with `AutoPolicy`, the price is the rate that these trees reach, and plain decoding is a
    candidate.
    """

    takes_turns = False
    settles = False
    _layer_scores: list[torch.Tensor]  # [B, M_d] of each layer grown in this step
    _choice: Choice

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Keep the whole layer."""
        if self._layers == 1:
            self._layer_scores = [scores]
        return scores.shape[1]

    def deepen(self) -> bool:
        deepen = self._layers < self._max_layers
        self._layers += deepen
        return deepen

    def expanded(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        batch_size = len(parent_scores)
        width = len(child_probs) // batch_size
        children = parent_scores[:, :width, None] * child_probs.view(batch_size, width, -1)
        self._layer_scores.append(children.view(batch_size, -1))

    def depth(self, num_layers: int, costs: Costs | None) -> int:
        """Search for the best depth and size."""
        assert costs is not None
        view, price = self._read(costs), self.price(len(self._layer_scores[0]))
        self._choice = best_choice(
            [torch.from_numpy(self._worth(scores, view, price)) for scores in self._layer_scores],
            [float(view.growth[-1])] * (num_layers - 1),
            costs.verify,
            self._sizes,
            price,
        )
        return self._choice.num_layers

    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        self._layers = 1
        return self._choice.num_draft_tokens

    def share_out(self, scores: torch.Tensor, costs: Costs | None) -> None:
        """Treat all requests alike: the search is over depth and size."""
        return None


def layers_kept(policy: TreePolicy, num_layers: int, costs: Costs | None) -> int:
    """Return how many of a tree's layers stay; all but of trees of full width."""
    return policy.depth(num_layers, costs) if isinstance(policy, FullWidthPolicy) else num_layers
