"""What a step asks a policy, and what a policy reads of the costs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch

__all__ = ["Costs", "TreePolicy"]


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
    def overhead(self) -> float:
        """Time of a step outside of its passes."""

    @property
    def plain_overhead(self) -> float:
        """The same of a plain step, which verifies the root alone."""


class TreePolicy(ABC):
    """The decisions of one step. A policy carries state from step to step, so it has one owner."""

    def speculate(self, batch_size: int, costs: Costs | None, catch_up: float = 0.0) -> bool:
        """Return whether to draft in this step, or to decode plainly.

        Args:
            catch_up: units that the draft needs to catch up on plain steps before it drafts.
        """
        return True

    def plain_loss(self, batch_size: int) -> float:
        """Return the share of a step's time that a plain step loses; call it after `speculate`.

        inf where plain decoding is no candidate.
        """
        return math.inf

    def weigh(self, weights: np.ndarray | None) -> None:
        """Let the requests of this step count unequally, if the policy can.

        Args:
            weights: [B] >= 0, worth of a token of each request; None for equal worth.
        """
        return

    def expect(self, answer_tokens: float) -> None:
        """Tell the policy the mean number of tokens of the last answers, > 0."""
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
        """Show the policy the children of the nodes just expanded.

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
        """Show the policy what a step with a tree accepted, and how long it took.

        Args:
            accepted_mean: accepted drafts per request, bonus tokens not counted.
            time_units: the step's time by the costs.
        """
        return
