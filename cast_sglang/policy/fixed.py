"""CAST: how wide, how deep, and how much of the tree is verified.

The three decisions of "Inference-Cost-Aware Dynamic Tree Construction for Efficient Inference in
Large Language Models" (arXiv 2510.26577), in the order in which a step takes them:

    breadth    how many nodes of a layer are kept and expanded      threshold C1
    depth      whether one more layer is grown                      threshold C2, FIFO of R ratios
    rerank     how many of all grown nodes the target verifies      threshold C3

Utility is expected accepted tokens (sums of scores, averaged over the batch). Costs are times from
the measured tables, divided by the time of one target pass over one token per request at the same
batch size and context. So each threshold is a price: accepted tokens per unit of target time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import torch

__all__ = ["Costs", "EaglePolicy", "FixedPolicy", "TreePolicy", "select_count"]


def select_count(utility: torch.Tensor, cost: torch.Tensor, price: float) -> torch.Tensor:
    """Choose how many of the best nodes are worth their cost.

    Definition: out = the smallest k in 1..K that maximises utility[k - 1] - price * cost[k - 1]

    The paper keeps extending k while the marginal utility per marginal cost since the last kept
    point exceeds `price`. Where costs increase strictly that is the same rule, since
    (u_k - u_k0) / (c_k - c_k0) > C is u_k - C c_k > u_k0 - C c_k0; and this form also holds where
    measured costs have steps or fall.

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


class Costs(Protocol):
    """What a policy reads of `costs.model.StepCosts`."""

    @property
    def draft(self) -> np.ndarray:
        """[K] float32, one draft layer of k nodes per request."""

    @property
    def verify(self) -> np.ndarray:
        """[N] float32, one verify pass of k rows per request, root included."""

    @property
    def draft_extend(self) -> np.ndarray:
        """[E] float32, the draft's pass over k rows per request after verify."""

    @property
    def plain(self) -> float:
        """One plain decoding step; nan where it was not measured."""

    @property
    def overhead(self) -> float:
        """Time of a step that no pass covers."""

    @property
    def plain_overhead(self) -> float:
        """The same of a step that verifies the root alone."""


class TreePolicy(ABC):
    """The decisions of one step. A policy carries state from step to step, so it has one owner."""

    def speculate(
        self,
        batch_size: int,
        costs: Costs | None,
        plain_extra: float = 0.0,
        catch_up: float = 0.0,
    ) -> bool:
        """Return whether to draft in this step, or to decode plainly.

        Args:
            plain_extra: what a plain step takes here beyond plain decoding, in units.
            catch_up: time in units to give the draft what plain steps have left undone.
        """
        return True

    def plain_loss(self, batch_size: int) -> float:
        """Return the share of a step's time that a plain step loses at best.

        inf where plain decoding is no candidate; else to be asked after `speculate`.
        """
        return math.inf

    def weigh(self, weights: np.ndarray | None) -> None:
        """Let the requests of this step count unequally, where the policy can.

        Args:
            weights: [B] >= 0, what a request's tokens are worth; None for all alike.
        """
        return

    def expect(self, answer_tokens: float) -> None:
        """Let the policy know how many tokens answers have lately had, in the mean; > 0."""
        return

    @abstractmethod
    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Return how many of a layer's best nodes are kept; called once per grown layer.

        Args:
            scores: [B, K] float32, the layer's best candidates, descending.
            costs: the step's costs, None for a policy that needs none.
        """

    @abstractmethod
    def deepen(self) -> bool:
        """Return whether to expand the nodes just kept and so grow one more layer."""

    def expanded(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        """Take note of the children of the nodes just expanded.

        Args:
            parent_scores: [B, n] float32, path scores of the layer's nodes, of which the first W
                were expanded.
            child_probs: [B * W, K] float32, their children's probabilities given them, as the tree
                grows by them.
        """
        return

    def depth(self, num_layers: int, costs: Costs | None) -> int:
        """Return how many of the grown layers stay, in 1..num_layers."""
        return num_layers

    def share_out(self, scores: torch.Tensor, costs: Costs | None) -> np.ndarray | None:
        """Return [B] int64, the rows to verify of each request, roots included; not all are 1.

        In place of `rerank` where the target runs requests of unequal numbers of rows. None from a
        policy that treats all requests alike.

        Args:
            scores: as for `rerank`.
        """
        return None

    @abstractmethod
    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Return N, the nodes to verify per request, root included.

        Args:
            scores: [B, n] float32, the best candidates of the whole tree, descending.
            costs: the step's costs, None for a policy that needs none.
        """

    def observe(self, batch_size: int, accepted_mean: float, time_units: float) -> None:
        """Take note of what a step with a tree brought.

        Args:
            accepted_mean: accepted drafts per request, bonus tokens not counted.
            time_units: the step's time by the costs.
        """
        return


class EaglePolicy(TreePolicy):
    """EAGLE-2/3's fixed tree: top-K in every layer, every layer, always N nodes.

    The baseline, and the special case of CAST that Theorem 4.1 of the paper names.
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

    A price of 0 switches its rule off. Utilities are sums of scores, which are never negative, so
    without a price more is never worse: C1 = 0 keeps every node of a layer, C2 = 0 grows every
    layer and C3 = 0 verifies the largest size. Only nodes that add nothing to the sum in float32
    are left out. All three at 0 are EAGLE's tree of the envelope's shape.

    Args:
        c1, c2, c3: prices of breadth, depth and rerank, >= 0.
        r: R, how many gain ratios the depth rule averages, >= 1.
        verify_sizes: ascending values allowed for N, each >= 2: the sizes for which the target has
            a captured graph (any size, on a device that runs without graphs).

    The loop that grows the tree runs on the host and needs each answer there, so a decision is one
    small copy from the device, of K or N numbers, and arithmetic on the host after it.
    """

    def __init__(
        self,
        c1: float,
        c2: float,
        c3: float,
        r: int,
        verify_sizes: tuple[int, ...],
    ) -> None:
        self.c1, self.c2, self.c3 = c1, c2, c3
        self._gain_ratios: deque[float] = deque([1.0], maxlen=r)
        self._layer: _Layer | None = None
        self._sizes = verify_sizes
        sizes = torch.tensor(verify_sizes, dtype=torch.int64)
        # N nodes are N - 1 drafts, whose utility stands at index N - 2, and N verified rows,
        # whose cost stands at index N - 1.
        self._utility_index, self._cost_index = sizes - 2, sizes - 1

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Breadth pruning (BP)."""
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
        """Depth pruning (DP): the predicted gain of one more layer per unit of its cost."""
        assert self._layer is not None
        gain_ratio = sum(self._gain_ratios) / len(self._gain_ratios)
        return gain_ratio * self._layer.utility >= self.c2 * self._layer.cost

    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Dynamic reranking (DR)."""
        assert costs is not None
        self._layer = None
        num_sizes = sum(size <= scores.shape[1] + 1 for size in self._sizes)
        if num_sizes == 0:
            raise ValueError(
                f"the smallest verify size {self._sizes[0]} is larger than the tree of "
                f"{scores.shape[1] + 1} nodes"
            )
        utility = scores.mean(dim=0).cumsum(dim=0).cpu()[self._utility_index[:num_sizes]]
        cost = torch.from_numpy(costs.verify)[self._cost_index[:num_sizes]]
        return self._sizes[int(select_count(utility, cost, self.c3)) - 1]
