"""The interface of a policy: the decisions of one step, and the costs that they rest on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import numpy as np
import torch

__all__ = ["NO_PREFILL", "Costs", "Prefill", "TreePolicy"]


class Costs(Protocol):
    """Costs of a step, in units of one target pass over one row per request.

    `costs.model.StepCosts` implements it. Entry k - 1 of an array is the cost of k.
    """

    @property
    def draft(self) -> np.ndarray:
        """[K] float32, one draft layer of k nodes per request."""

    @property
    def verify(self) -> np.ndarray:
        """[N] float32, one verify pass of k rows per request, root included."""

    @property
    def draft_extend(self) -> np.ndarray:
        """[E] float32, the draft model's pass over k rows per request after verify."""

    @property
    def overhead(self) -> float:
        """Time of a step outside of its passes."""

    @property
    def plain_overhead(self) -> float:
        """The same for a plain step, which verifies the root alone."""


class Prefill(NamedTuple):
    """What the draft's passes over the prompts of a batch take, and bring."""

    units: float = 0.0  # of all passes
    answer_tokens: float = 1.0  # that a request may generate
    num_left_out: int = 0  # requests that get no drafts only as their prompts are left out


NO_PREFILL = Prefill()


class TreePolicy(ABC):
    """Decides how one step speculates. It keeps state between steps, so it has one owner.

    In a step the server calls `speculate`; then, for each layer, `breadth`, `deepen` and, after the
    draft pass, `expanded`; then `share_out` or `rerank`, and `observe`.
    """

    # Whether drafts may be drawn at random, for which it needs `settlement`.
    settles = False

    def settlement(self, batch_size: int, costs: Costs | None, is_even: bool) -> tuple[float, int]:
        """Return the least score and, root included, the most nodes that drawn requests verify.

        Both by earlier steps alone.

        Args:
            is_even: all requests have equally many rows, so that one may not make them more for
                the others.
        """
        raise NotImplementedError

    def learn_settlement(self, batch_size: int, score: float, num_rows: int) -> None:
        """Note the score of the last node that was worth its time in this step, and the rows."""
        return

    def speculate(
        self,
        batch_size: int,
        costs: Costs | None,
        catch_up: float = 0.0,
        prefill: Prefill = NO_PREFILL,
        wants_drafts: bool = True,
    ) -> bool:
        """Return whether to draft in this step; else the step decodes plainly.

        Args:
            catch_up: cost of the draft model's pass over earlier plain steps, before it drafts.
            prefill: its passes over the prompts. They are behind the running requests; those over
                prompts to come are saved where plain decoding is the rule.
            wants_drafts: False where the step decodes plainly in any case, since none of its
                requests wants drafts.
        """
        return True

    def plain_steps(self, batch_size: int) -> int:
        """Return how many steps of this batch size will be decoded plainly before one that drafts.

        What has cost the draft model work is then of no use to a request that ends before.
        """
        return 0

    def weigh(self, weights: np.ndarray | None) -> None:
        """Set how much the tokens of each request count in this step.

        Args:
            weights: [B] >= 0, worth of a token of each request; None for equal worth.
        """
        return

    def stand(self, best: torch.Tensor, left: torch.Tensor) -> None:
        """Show the policy the tree with what was copied into it, before the layer's `breadth`.

        Args:
            best: [B, n] float32, scores of the tree's best candidates, descending.
            left: [B, K] float32, of the score of each of the newest layer's best nodes, in the
                order of `breadth`, what copies leave to the children that the draft proposes.
        """
        return

    def least_score(self, batch_size: int, costs: Costs | None) -> float:
        """Return the score of a node that is worth a row of verify in the mean; 0 if unknown."""
        return 0.0

    @abstractmethod
    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Return W, how many of a layer's best nodes to keep; called once per grown layer.

        Args:
            scores: [B, K] float32, the layer's best candidates, descending.
            costs: the step's costs; None for a policy that needs none.
        """

    @abstractmethod
    def deepen(self) -> bool:
        """Return whether to expand the nodes just kept, and so grow one more layer."""

    def chain_layers(
        self, scores: torch.Tensor, costs: Costs | None, max_layers: int
    ) -> int | None:
        """Return how many layers a step's chains get, decided before their first layer runs.

        Called in place of `breadth` and `deepen` where a chain grows without being looked at.

        Args:
            scores: [B, 1] float32, of the roots' children, which are layer 1.
            max_layers: the most layers that they may get.

        Returns:
            A number in 1..max_layers; None to decide layer by layer.
        """
        return None

    def expanded(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        """Show the policy the children of the nodes just expanded.

        Args:
            parent_scores: [B, n] float32, of the layer's best nodes; the first W were expanded.
            child_probs: [B * W, K] float32, as `DraftTree.grow` returns them.
        """
        return

    def beats_plain(
        self, scores: torch.Tensor, costs: Costs | None, shares_out: bool = False
    ) -> bool:
        """Return whether verifying any candidates is worth more than the root alone.

        Asked before `share_out` or `rerank` where candidates were found without a draft model.

        Args:
            scores, costs: as of `rerank`.
            shares_out: one budget of verified rows is shared out among the requests.
        """
        return True

    def share_out(self, scores: torch.Tensor, costs: Costs | None) -> np.ndarray | None:
        """Return [B] int64, rows to verify of each request, root included; not all are 1.

        Called before `rerank`, with its arguments, if the target can run unequal numbers of rows.
        None leaves the decision to `rerank`.
        """
        return None

    @abstractmethod
    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Return N, the nodes to verify per request, root included.

        Args:
            scores: [B, n] float32, the best candidates of the whole tree, descending.
        """

    def observe(self, batch_size: int, accepted_mean: float, time_units: float) -> None:
        """Show the policy what a step with a tree accepted, and its cost.

        Args:
            accepted_mean: accepted drafts per request, bonus tokens not counted.
            time_units: the step's time by the costs, in units.
        """
        return
