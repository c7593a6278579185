"""Decisions: everything that a step decides, from the policy, the costs and what lacks samples.

The worker looks costs up and begins a step; growing and drafting ask for widths, layers and rows.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cast_sglang.costs.model import extend_units, plain_extra
from cast_sglang.policy.auto import KEEP_UP_SHARE, AutoPolicy

if TYPE_CHECKING:
    from cast_sglang.costs.correction import CorrectedCosts, Residuals
    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.costs.model import CostModel, StepCosts
    from cast_sglang.policy.base import TreePolicy

__all__ = ["Decisions", "Plan"]


class Plan(NamedTuple):
    """What a step begins with."""

    drafts: bool  # grow and verify a tree; False to decode plainly
    catch_up: float  # units to bring the draft up to date first, 0 where it stays behind


class Decisions:
    """The decisions of the steps of one server, one step after another.

    Each step calls `begin_step`. A step with a tree then calls `width` for each layer until that is
    None, `expanded` when a layer has been run, `depth`, and `rows`. `end_step` follows when the
    step's results have reached the host, perhaps some steps later.

    Args:
        policy: what to ask.
        verify_sizes: ascending values allowed for N.
        max_width: K, nodes per request in a layer.
        max_missing: rows of a request that the backlog keeps for the draft.
        is_ragged: requests of unequal numbers of rows can run in one pass.
        shares_out: one budget of verified nodes for the batch.
        graph_sizes: rows per request that have a verify graph; None where all passes are eager.
        layer_costs: the drafter's, see `drafting.base.Drafter`.

    Attributes:
        table: the step's costs as measured; None without a profile.
        costs: the same as corrected while serving.
        weights: [B], what a token of each request is worth; None for 1 each.
        seconds: host time of the decisions about the step's tree.
    """

    def __init__(
        self,
        policy: TreePolicy,
        *,
        verify_sizes: tuple[int, ...],
        max_width: int,
        max_missing: int,
        is_ragged: bool,
        shares_out: bool,
        graph_sizes: GraphSizes | None,
        layer_costs: Callable[[StepCosts], StepCosts],
    ) -> None:
        self.policy = policy
        self.verify_sizes = verify_sizes
        self.is_ragged, self.shares_out = is_ragged, shares_out
        self.table: StepCosts | None = None
        self.costs: StepCosts | None = None
        self.weights: np.ndarray | None = None
        self.seconds = 0.0
        self._max_width, self._max_missing = max_width, max_missing
        self._graph_sizes = graph_sizes
        self._layer_costs = layer_costs
        self._model: CostModel | None = None
        self._corrected: CorrectedCosts | None = None
        self._residuals: Residuals | None = None
        self._is_timed = False
        self._num_layers = 1

    def use_costs(
        self, model: CostModel, corrected: CorrectedCosts, residuals: Residuals | None
    ) -> None:
        """Decide by these costs from the next `look_up` on.

        Args:
            residuals: choose other sizes now and then where these lack samples; None for never.
        """
        self._model, self._corrected, self._residuals = model, corrected, residuals

    def look_up(
        self,
        batch_size: int,
        context: float,
        weights: np.ndarray | None,
        answer_tokens: float | None,
    ) -> None:
        """Look up what the running requests cost and what they are worth.

        Args:
            context: mean length of the requests, in tokens.
            weights: [B] as above.
            answer_tokens: mean length of the answers that have ended; None before the first.
        """
        if answer_tokens is not None:
            self.policy.expect(answer_tokens)
        self.weights = weights
        self.policy.weigh(weights)
        if self._model is not None and self._corrected is not None:
            self.table = self._layer_costs(self._model.step_costs(batch_size, context))
            self.costs = self._layer_costs(self._corrected.step_costs(batch_size, context))

    def begin_step(
        self, batch_size: int, may_draft: bool, missing_rows: int, is_timed: bool
    ) -> Plan:
        """Decide whether to draft.

        Args:
            may_draft: a request wants drafts, and there is room for them.
            missing_rows: the most rows that the draft lacks of a request.
            is_timed: the step's passes are timed; only then it pays to try another size.
        """
        self._is_timed, self._num_layers, self.seconds = is_timed, 1, 0.0
        costs = self.costs
        if costs is None:
            return Plan(may_draft, 0.0)
        catch_up = extend_units(costs, missing_rows)
        drafts = may_draft and self.policy.speculate(
            batch_size, costs, plain_extra(costs), catch_up
        )
        if drafts and self._residuals is not None and is_timed:
            loss = self.policy.plain_loss(batch_size)
            drafts = not self._residuals.explore_plain(batch_size, loss)
        is_cheap = catch_up <= KEEP_UP_SHARE * missing_rows * costs.verify[0]
        is_due = drafts or (missing_rows == self._max_missing and is_cheap)
        return Plan(drafts, catch_up if is_due else 0.0)

    def width(self, scores: torch.Tensor) -> int | None:
        """Return how many of the newest layer's best nodes to expand; None to stop growing.

        Args:
            scores: [B, K] float32, on the host, descending.
        """
        began = time.perf_counter()
        width = self.policy.breadth(scores, self.costs)
        grows = self.policy.deepen()
        residuals, costs = self._residuals, self.costs
        # In the first layer alone: what a width takes does not depend on the layer.
        may_try = grows and self._num_layers == 1 and self._is_timed
        if may_try and residuals is not None and costs is not None:
            allowed = range(1, self._max_width + 1)
            width = residuals.explore("draft", len(scores), width, allowed, costs.draft)
        self._num_layers += 1
        self.seconds += time.perf_counter() - began
        return width if grows else None

    def expanded(self, parent_scores: torch.Tensor, probs: torch.Tensor) -> None:
        """Hand the policy the children of the nodes just expanded; see `TreePolicy.expanded`."""
        began = time.perf_counter()
        self.policy.expanded(parent_scores, probs)
        self.seconds += time.perf_counter() - began

    def depth(self, num_layers: int) -> int:
        """Return how many of the grown layers stay, in 1..num_layers."""
        began = time.perf_counter()
        depth = self.policy.depth(num_layers, self.costs)
        self.seconds += time.perf_counter() - began
        return depth

    def rows(self, scores: torch.Tensor) -> tuple[int, np.ndarray | None]:
        """Return N, the rows to verify per request, and [B] the rows of each where they differ.

        Args:
            scores: [B, n] float32, on the host, as for `TreePolicy.rerank`.
        """
        began = time.perf_counter()
        rows = self._rows(scores)
        self.seconds += time.perf_counter() - began
        return rows

    def _rows(self, scores: torch.Tensor) -> tuple[int, np.ndarray | None]:
        num_rows = self.policy.share_out(scores, self.costs) if self.shares_out else None
        if num_rows is None:
            size = min(self.policy.rerank(scores, self.costs), scores.shape[1] + 1)
        else:
            size = math.ceil(num_rows.mean())
        if self._residuals is not None and self.costs is not None and self._is_timed:
            num_sizes = bisect.bisect_right(self.verify_sizes, scores.shape[1] + 1)
            sizes = self.verify_sizes[:num_sizes] or (size,)
            costs = self.costs.verify
            explored = self._residuals.explore("verify", len(scores), size, sizes, costs)
            if explored != size:
                size, num_rows = explored, None
        if num_rows is None and self._graph_sizes is not None:
            fitting = self._graph_sizes.fit(len(scores), size, scores.shape[1] + 1)
            size = size if fitting is None else fitting
        if num_rows is None and self.is_ragged and self.weights is not None:
            num_rows = np.where(self.weights > 0.0, size, 1)
        if num_rows is None or num_rows.min() == num_rows.max():
            return size, None
        return int(num_rows.max()), num_rows

    def end_step(self, batch_size: int, accepted_mean: float, time_units: float) -> None:
        """Hand the policy what a step with a tree brought; see `TreePolicy.observe`."""
        self.policy.observe(batch_size, accepted_mean, time_units)

    def price(self, batch_size: int) -> float | None:
        """Return the policy's price; None for a policy without one."""
        return self.policy.price(batch_size) if isinstance(self.policy, AutoPolicy) else None
