"""Decider: what one step does. The server and replay both ask it, so that they decide alike.

A policy chooses by scores and costs. What surrounds a policy is here: whether the draft catches up
first, which sizes have a captured graph, and how far the requests may still go.

The order of calls in a step:

    begin_step      draft a tree, or decode plainly
    width           for each layer: how many nodes to expand, or no more layer
    expanded            what the expanded nodes' children are; or `launched`, once, behind the last
    rows            what is verified of the tree; `rows_or_plain` where no layer was drafted
    end_step        what the step brought; on a server some steps later
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cast_sglang.costs.model import extend_row_units, extend_units
from cast_sglang.policy.auto import LEAST_CUT, AutoPolicy
from cast_sglang.policy.base import Prefill
from cast_sglang.policy.octaves import PROBE_SHARE

if TYPE_CHECKING:
    import torch

    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.costs.model import StepCosts
    from cast_sglang.policy.base import TreePolicy

__all__ = ["Arriving", "Decider", "Plan", "PromptFacts", "StepFacts", "VerifyRows"]

# What a later answer loses by each token of the one before it that the draft has not seen, in plain
# steps: a twelfth of its passes (docs/results.md), which take 1.5 plain steps for 4 tokens or so.
LATER_LOSS = 0.03
# Steps over which the share of those that draft is told: some answers.
SHARE_STEPS = 1024


class Arriving(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return them when they are there."""


class PromptFacts(NamedTuple):
    """What the prompts of a step's requests take of the draft; means over the requests."""

    prompt_rows: float = 0.0  # that the draft may leave out
    answer_tokens: float = 1.0  # that a request may generate
    prompt_row_us: float | None = None  # what a row takes, as measured; None where it is not
    num_left_out: int = 0  # requests that get no drafts only as their prompts are left out
    reuse: float = 0.0  # share of the last prompts' tokens that were found in the cache


class StepFacts(NamedTuple):
    """What a step is decided by."""

    batch_size: int
    costs: StepCosts | None  # None for a policy that needs none
    weights: np.ndarray | None  # [B], what a request's tokens are worth; None for all alike
    missing_rows: int  # the most rows that the draft of any request has not seen
    max_layers: int  # of the tree; 0 where nothing may be drafted
    max_rows: int  # verified per request, root included
    is_drawn: np.ndarray | None = None  # [B] bool, whose drafts are drawn at random; None for none
    max_nodes: int | None = None  # that the draft may run per request; None for any number
    prompts: PromptFacts = PromptFacts()
    copy_depth: int = 0  # of a copied node; 0 where nothing is copied


class Plan(NamedTuple):
    """What a step begins with."""

    drafts: bool  # a tree is grown; else the step decodes plainly
    # Units that bringing the draft up to date takes; 0 where it stays behind, nan if not known.
    catch_up: float


class VerifyRows(NamedTuple):
    """What a step verifies."""

    num_draft_tokens: int  # N, rows of the request that has most, root included
    num_rows: np.ndarray | None  # [B], rows of each request where they differ


class Decider:
    """Decides the steps of one server, or of one replay.

    Args:
        policy: chooses trees; has no other owner.
        max_missing: rows that are kept for a draft that stays behind.
        topk: K, nodes that a layer may have.
        verify_graphs: sizes of verify that have a graph; None where passes run without.
        width_graphs: widths of a draft layer that have a graph; None where layers run without.
        is_ragged: requests of unequal numbers of rows run in one pass.
        shares_out: one budget of verified rows is shared out among the requests.
        plans_chains: trees are chains, and the host decides how long before their first layer runs,
            so that it need not wait for any.

    Attributes:
        seconds: host time spent deciding since the step began.
        planned: layers that the chain of this step gets; None where each layer is decided when the
            one above it is known.
    """

    def __init__(
        self,
        policy: TreePolicy,
        *,
        max_missing: int,
        topk: int,
        verify_graphs: GraphSizes | None = None,
        width_graphs: GraphSizes | None = None,
        is_ragged: bool = False,
        shares_out: bool = False,
        plans_chains: bool = False,
    ) -> None:
        self.policy = policy
        self.verify_graphs, self.width_graphs = verify_graphs, width_graphs
        self.seconds = 0.0
        self._max_missing, self._topk = max_missing, topk
        self._is_ragged, self._shares_out = is_ragged, shares_out
        self._plans_chains = plans_chains
        self.planned: int | None = None
        self._launched: Arriving | None = None
        self._facts: StepFacts  # begin_step comes first
        self._num_layers = 0  # of the tree that grows
        self._num_nodes = 0  # of it, that were run
        self._cut, self._most_rows = 0.0, 0  # of drawn requests in this step
        self._drafting = 0.0  # share of the last steps that drafted

    def begin_step(self, facts: StepFacts) -> Plan:
        """Decide whether to draft, and whether the draft is brought up to date first.

        A plain step leaves the draft as it is, but for rows that it would miss later; see
        `_keeps_up`. Without costs it takes them when no more are kept.
        """
        began = time.perf_counter()
        self._facts, self._num_layers, self._num_nodes = facts, 1, 0
        self.planned = self._launched = None
        policy, costs, batch_size = self.policy, facts.costs, facts.batch_size
        policy.weigh(facts.weights)
        wants_drafts = facts.weights is None or bool(facts.weights.any())
        drafts, catch_up = wants_drafts and facts.max_layers > 0 and facts.max_rows > 1, 0.0
        if costs is not None:
            catch_up = extend_units(costs, facts.missing_rows)
            if drafts or not wants_drafts:
                asked = batch_size, costs, catch_up, _prefill(facts, costs), wants_drafts
                drafts = policy.speculate(*asked) and drafts
            if not drafts and not self._keeps_up(facts, catch_up / float(costs.verify[0])):
                catch_up = 0.0
        elif not drafts and 0 < facts.missing_rows == self._max_missing:
            catch_up = math.nan
        self._drafting += (drafts - self._drafting) / SHARE_STEPS
        if drafts and facts.is_drawn is not None:
            self._cut, self._most_rows = policy.settlement(
                batch_size, costs, is_even=not self._is_ragged
            )
        self.seconds = time.perf_counter() - began
        return Plan(drafts, catch_up)

    def _keeps_up(self, facts: StepFacts, plain_steps: float) -> bool:
        """Return whether the draft takes the rows that it lacks though nothing is drafted.

        A request's tokens stay in the prefix cache, where a later turn may find them and draft
        behind them. And where the rows that are kept are full, the oldest would be lost; that may
        take the share of plain decoding that tries of speculation may lose.

        Args:
            plain_steps: what it takes.
        """
        share = LATER_LOSS * facts.prompts.reuse * self._drafting
        if facts.missing_rows == self._max_missing:
            share = max(share, PROBE_SHARE)
        return plain_steps <= share * facts.missing_rows

    def plain_steps(self, batch_size: int) -> int:
        """Return how many steps of this batch size will be decoded plainly before one that drafts.

        By what all ranks of a server know alike, like every decision here.
        """
        return self.policy.plain_steps(batch_size)

    def least_scores(self) -> np.ndarray:
        """Return [B] float32, the score below which no copy is looked for in this step."""
        facts = self._facts
        least = self.policy.least_score(facts.batch_size, facts.costs)
        scores = np.full(facts.batch_size, least, np.float32)
        if facts.is_drawn is not None:  # nothing below the cut is verified of these
            scores[facts.is_drawn] = self._cut
        return scores

    def settlement(self) -> tuple[float, int]:
        """Return the least score and the most nodes that a drawn request verifies in this step."""
        facts = self._facts
        most = min(facts.max_rows, self._most_rows)
        if self.verify_graphs is not None:
            bucket = self.verify_graphs.bucket(facts.batch_size)
            if bucket is not None:  # beyond the largest graph a pass costs more than was decided by
                most = min(most, self.verify_graphs.at(bucket)[-1])
        return self._cut, max(2, most) - 1

    def width(
        self, scores: torch.Tensor, with_copies: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> int | None:
        """Return how many of the newest layer's best nodes are expanded; None for no more layer.

        Args:
            scores: [B, K] float32 on the host, the layer's best candidates, descending.
            with_copies: arguments of `TreePolicy.stand`; None where nothing is copied.
        """
        facts = self._facts
        most = self._most_width(facts)
        if self._num_layers == facts.max_layers or most == 0:
            return None
        began = time.perf_counter()
        if self._plans_chains and self._num_layers == 1:
            layers = facts.max_layers
            if facts.max_nodes is not None:  # one of each layer but the last
                layers = min(layers, facts.max_nodes + 1)
            self.planned = self.policy.chain_layers(scores, facts.costs, layers)
        if self.planned is not None:
            width, grows = 1, self._num_layers < self.planned
        else:
            if with_copies is not None:
                self.policy.stand(*with_copies)
            width = min(self.policy.breadth(scores, facts.costs), most)
            grows = self.policy.deepen()
        if grows:
            if self.width_graphs is not None:
                width = self.width_graphs.fit(facts.batch_size, width, most) or width
            self._num_layers += 1
            self._num_nodes += width
        self.seconds += time.perf_counter() - began
        return width if grows else None

    def _most_width(self, facts: StepFacts) -> int:
        """Return the most nodes that the next layer may run; 0 where none can."""
        if facts.max_nodes is None:
            return self._topk
        most = min(self._topk, facts.max_nodes - self._num_nodes)
        graphs = self.width_graphs
        if graphs is not None and graphs.bucket(facts.batch_size) is not None:
            return most if graphs.fit(facts.batch_size, 1, most) is not None else 0
        return most

    def expanded(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        """Learn of the children of the nodes just expanded; shapes of `TreePolicy.expanded`."""
        began = time.perf_counter()
        self.policy.expanded(parent_scores, child_probs)
        self.seconds += time.perf_counter() - began

    def launched(self, children: Arriving) -> None:
        """Learn of the children of planned layers when they are on the host, which `rows` sees to.

        Args:
            children: what `expanded` takes of each layer, one after the other.
        """
        self._launched = children

    def rows(self, scores: torch.Tensor, settled: torch.Tensor | None = None) -> VerifyRows:
        """Decide how many rows of each request are verified.

        Args:
            scores: [B, n] float32 on the host, the best candidates of the tree, descending.
            settled: [B, n] float32, the same as drawn requests may verify them
                (`DraftTree.ranked_settled`); where there are such requests.
        """
        if self._launched is not None:  # before what the scores were made of
            parts, self._launched = self._launched.wait(), None
            for above, probs in zip(parts[::2], parts[1::2], strict=True):
                self.expanded(above, probs)
        began = time.perf_counter()
        facts, most = self._facts, scores.shape[1] + 1
        costs, num_rows = facts.costs, None
        if self._shares_out:
            num_rows = self.policy.share_out(scores, costs)
        if num_rows is None:
            size = min(self.policy.rerank(scores, costs), most)
        else:
            size = math.ceil(num_rows.mean())
        if settled is not None:
            num_rows = self._settled_rows(scores, settled, size, num_rows)
            size = max(2, int(num_rows.max()))
        if (num_rows is None or settled is not None) and self.verify_graphs is not None:
            size = self.verify_graphs.fit(len(scores), size, most) or size
        if settled is not None and not self._is_ragged:
            # Rows that a drawn request has no node for run empty.
            assert num_rows is not None and facts.is_drawn is not None
            num_rows = np.where(facts.is_drawn, num_rows, size)
        if self._is_ragged and facts.weights is not None and not self._shares_out:
            num_rows = np.where(facts.weights > 0.0, size if num_rows is None else num_rows, 1)
        if num_rows is not None:
            size = max(size, int(num_rows.max()))
            num_rows = None if num_rows.min() == size else num_rows
        self.seconds += time.perf_counter() - began
        return VerifyRows(size, num_rows)

    def rows_or_plain(self, scores: torch.Tensor) -> VerifyRows:
        """Decide as `rows` where nothing was drafted, and so one row, the root's, may be enough."""
        began = time.perf_counter()
        is_worth = self.policy.beats_plain(scores, self._facts.costs, self._shares_out)
        self.seconds += time.perf_counter() - began
        return self.rows(scores) if is_worth else VerifyRows(1, None)

    def _settled_rows(
        self, scores: torch.Tensor, settled: torch.Tensor, size: int, num_rows: np.ndarray | None
    ) -> np.ndarray:
        """Return [B], rows of each request where some are drawn.

        A drawn request verifies all that it may, by the score of the last node that was worth its
        time in earlier steps. This step's goes into that of the next.
        """
        facts = self._facts
        assert facts.is_drawn is not None
        chosen = np.full(len(scores), size) if num_rows is None else num_rows
        # A request may have fewer nodes than rows; a score of 0 stands where there is none.
        places = np.minimum(chosen - 2, (scores.numpy() > 0.0).sum(1) - 1)
        is_known = facts.is_drawn & (places >= 0)
        last = scores.numpy()[np.arange(len(chosen)), places][is_known]
        if len(last):
            rows = int(chosen.max())
            self.policy.learn_settlement(facts.batch_size, _geometric_mean(last), rows)
        return np.where(facts.is_drawn, 1 + (settled.numpy() > 0.0).sum(1), chosen)

    def end_step(self, batch_size: int, accepted_mean: float, time_units: float) -> None:
        """Learn what a step with a tree brought; arguments of `TreePolicy.observe`."""
        self.policy.observe(batch_size, accepted_mean, time_units)

    def price(self, batch_size: int) -> float | None:
        """Return tokens asked per unit of time; None for a policy without a price."""
        return self.policy.price(batch_size) if isinstance(self.policy, AutoPolicy) else None


def _prefill(facts: StepFacts, costs: StepCosts) -> Prefill:
    prompts, row = facts.prompts, extend_row_units(costs)
    if prompts.prompt_row_us is not None:
        row = facts.batch_size * prompts.prompt_row_us / costs.unit_us
    return Prefill(row * prompts.prompt_rows, prompts.answer_tokens, prompts.num_left_out)


def _geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.log(np.maximum(values, LEAST_CUT)).mean()))
