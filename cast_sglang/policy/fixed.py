"""The paper's CAST: three rules decide how wide and deep the tree is, and how much is verified.

From "Inference-Cost-Aware Dynamic Tree Construction for Efficient Inference in Large Language
Models" (arXiv 2510.26577), in the order of a step:

    breadth    how many nodes of a layer are kept and expanded      threshold C1
    deepen     whether one more layer is grown                      threshold C2, FIFO of R ratios
    rerank     how many of all grown nodes the target verifies      threshold C3

Utility is expected accepted tokens: the sum of the nodes' scores, averaged over the batch. Costs
are measured times divided by the time of one target pass over one token per request, at the same
batch size and context. So a threshold is a price: accepted tokens per unit of target time.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch

from cast_sglang.policy.base import Costs, TreePolicy
from cast_sglang.policy.select_count import select_count, select_size, size_costs

__all__ = ["EaglePolicy", "FixedPolicy"]


class EaglePolicy(TreePolicy):
    """The baseline, EAGLE-2/3's tree: K nodes in every layer, all layers, always N nodes verified.

    It is a special case of CAST (Theorem 4.1 of the paper).
    """

    def __init__(self, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def breadth(self, scores: torch.Tensor, costs: Costs | None = None) -> int:
        return scores.shape[1]

    def deepen(self) -> bool:
        return True

    def chain_layers(self, scores: torch.Tensor, costs: Costs | None, max_layers: int) -> int:
        return max_layers

    def rerank(self, scores: torch.Tensor, costs: Costs | None = None) -> int:
        return min(self.num_draft_tokens, scores.shape[1] + 1)


class _Layer(NamedTuple):
    utility: float  # expected accepted tokens among the kept nodes
    cost: float  # normalised time of expanding them


class FixedPolicy(TreePolicy):
    """The paper's CAST with hand-set thresholds.

    A price of 0 switches its rule off, because scores are never negative: C1 = 0 keeps every node
    of a layer, C2 = 0 grows every layer, and C3 = 0 verifies the largest size, except for nodes of
    score 0. With all three at 0 the tree is EAGLE's.

    Args:
        c1, c2, c3: prices of breadth, deepen and rerank, >= 0.
        r: R, how many gain ratios `deepen` averages, >= 1.
        verify_sizes: ascending values allowed for N, each >= 2: the sizes for which the target has
            a captured graph (any size, on a device that runs without graphs).

    Effects: `breadth` and `rerank` copy the scores to the host if they are elsewhere.
    """

    def __init__(
        self, c1: float, c2: float, c3: float, r: int, verify_sizes: tuple[int, ...]
    ) -> None:
        self.c1, self.c2, self.c3 = c1, c2, c3
        self._gain_ratios: deque[float] = deque([1.0], maxlen=r)
        self._layer: _Layer | None = None
        self._sizes = verify_sizes

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Breadth pruning (BP): the width whose utility, less its price, is largest."""
        assert costs is not None
        cost = costs.draft
        width, value = select_count(scores.numpy(force=True), cost, self.c1)
        layer = _Layer(value + self.c1 * float(cost[width - 1]), float(cost[width - 1]))
        if self._layer is not None:
            self._gain_ratios.append(layer.utility / max(self._layer.utility, 1e-12))
        self._layer = layer
        return width

    def deepen(self) -> bool:
        """Depth pruning (DP): whether the predicted utility of one more layer is worth its cost."""
        assert self._layer is not None
        gain_ratio = sum(self._gain_ratios) / len(self._gain_ratios)
        return gain_ratio * self._layer.utility >= self.c2 * self._layer.cost

    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Dynamic reranking (DR): the allowed size whose utility, less its price, is largest."""
        assert costs is not None
        self._layer = None
        cost = size_costs(costs.verify, self._sizes)
        return select_size(scores.numpy(force=True), cost, self._sizes, self.c3)[0]
