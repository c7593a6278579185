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

__all__ = ["EaglePolicy", "FixedPolicy", "select_count"]


def select_count(utility: torch.Tensor, cost: torch.Tensor, price: float) -> torch.Tensor:
    """Choose how many of the best nodes are worth their cost.

    Definition: out = the smallest k in 1..K that maximises utility[k - 1] - price * cost[k - 1]

    The paper extends k while the marginal utility per marginal cost since the last kept point,
    (u_k - u_k0) / (c_k - c_k0), exceeds `price`. If costs increase strictly, this is the same rule,
    u_k - C c_k > u_k0 - C c_k0. The form used here also holds if measured costs are flat or fall.

    Args:
        utility: [..., K] float32, expected accepted tokens of the best k nodes, k = 1..K.
        cost: [K] float32, normalised time of k nodes.
        price: accepted tokens asked per unit of cost, >= 0.

    Returns:
        [...] int64 counts in 1..K.

    Effects: pure; no host sync.
    Source: CAST, Algorithm 1.
    """
    return torch.argmax(torch.add(utility, cost, alpha=-price), dim=-1) + 1


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

    def rerank(self, scores: torch.Tensor, costs: Costs | None = None) -> int:
        return min(self.num_draft_tokens, scores.shape[1] + 1)


class _Layer(NamedTuple):
    utility: float  # expected accepted tokens among the kept nodes
    cost: float  # normalised time of expanding them


class FixedPolicy(TreePolicy):
    """The paper's CAST with hand-set thresholds.

    A price of 0 switches its rule off, because scores are never negative: C1 = 0 keeps every node
    of a layer, C2 = 0 grows every layer, and C3 = 0 verifies the largest size, except for nodes
    that add nothing to the sum in float32. With all three at 0 the tree is EAGLE's.

    Args:
        c1, c2, c3: prices of breadth, deepen and rerank, >= 0.
        r: R, how many gain ratios `deepen` averages, >= 1.
        verify_sizes: ascending values allowed for N, each >= 2: the sizes for which the target has
            a captured graph (any size, on a device that runs without graphs).

    Effects: `breadth` and `rerank` each copy K or N numbers to the host, where the tree is grown.
    """

    def __init__(
        self, c1: float, c2: float, c3: float, r: int, verify_sizes: tuple[int, ...]
    ) -> None:
        self.c1, self.c2, self.c3 = c1, c2, c3
        self._gain_ratios: deque[float] = deque([1.0], maxlen=r)
        self._layer: _Layer | None = None
        self._sizes = verify_sizes
        sizes = torch.tensor(verify_sizes, dtype=torch.int64)
        # N - 1 drafts have their utility at index N - 2; N rows have their cost at index N - 1.
        self._utility_index, self._cost_index = sizes - 2, sizes - 1

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Breadth pruning (BP): the width whose utility, less its price, is largest."""
        assert costs is not None
        utility = scores.mean(dim=0).cumsum(dim=0).cpu()
        cost = torch.from_numpy(costs.draft[: scores.shape[1]])
        width = int(select_count(utility, cost, self.c1))
        layer = _Layer(float(utility[width - 1]), float(cost[width - 1]))
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
        num_sizes = sum(size <= scores.shape[1] + 1 for size in self._sizes)
        if num_sizes == 0:  # the tree has fewer nodes than the smallest size
            return scores.shape[1] + 1
        utility = scores.mean(dim=0).cumsum(dim=0).cpu()[self._utility_index[:num_sizes]]
        cost = torch.from_numpy(costs.verify)[self._cost_index[:num_sizes]]
        return self._sizes[int(select_count(utility, cost, self.c3)) - 1]
