"""Replay: re-decide the steps of a trace with any cost table and any policy, without a model.

The policy classes of the server decide each recorded step anew, on the recorded candidates. The
text that followed shows which recorded candidates the target accepts, so the gain of a tree of
recorded candidates is known. Two things are not known, and replay assumes them:

- Children of a node that the server did not expand are drawn at random from the children of nodes
  of the same depth elsewhere in the trace.
- Such children, and candidates after the recorded end of a text, are accepted with their calibrated
  chance.

Of requests whose drafts were drawn at random, a tree of other nodes would have made the target draw
other tokens; replay takes the recorded text for it too. What is known of copies: `copied.py`.

`ReplayedStep.assumed_accepted` is the part of the accepted drafts that rests on these assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cast_sglang.config import LOOKUPS
from cast_sglang.costs.correction import REFRESH_EVERY, CorrectedCosts, Residuals
from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, StepCosts, pass_us, step_units
from cast_sglang.costs.schema import CostTables
from cast_sglang.errors import TraceError
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.build import PolicySettings, build_policy
from cast_sglang.policy.decider import Decider, Plan, PromptFacts, StepFacts
from cast_sglang.policy.fixed import EaglePolicy
from cast_sglang.trace.candidates import RecordedTrees
from cast_sglang.trace.copied import whole_drafts
from cast_sglang.trace.full_width import FullWidthPolicy
from cast_sglang.trace.records import Trace, TracedChoice, TracedStep, TraceHeader, tables_digest
from cast_sglang.trace.reward import TreeReward
from cast_sglang.trace.trees import TreeGrower, VerifiedTree

__all__ = ["ReplayedStep", "Replay", "make_policy"]


class ReplayedStep(NamedTuple):
    """What the policy chose in one step and what came of it; means over the requests."""

    choice: TracedChoice
    accepted: float  # drafts
    assumed_accepted: float  # the part of `accepted` that is assumed, not recorded
    time_us: float
    table_us: float  # the same by the uncorrected tables
    price: float  # nan for a policy without one
    reward: TreeReward | None  # None for a plain step, and if rewards are not computed

    @property
    def mean_rows(self) -> float:
        rows = self.choice.num_rows
        return sum(rows) / len(rows) if rows else 1.0


def make_policy(name: str, header: TraceHeader, **thresholds: float) -> TreePolicy:
    """Build a policy for trees within the trace's envelope.

    Args:
        name: of `REPLAYED_POLICIES`.
        thresholds: c1, c2, c3 and r of `fixed`; those of the recording where not given.

    Raises:
        ConfigError: there is no such policy.
    """
    values = {key: header.settings[key] for key in ("c1", "c2", "c3", "r")} | thresholds
    c1, c2, c3, r = (float(values[key]) for key in ("c1", "c2", "c3", "r"))  # type: ignore[arg-type]
    settings = PolicySettings(
        verify_sizes=tuple(header.verify_sizes),
        max_layers=header.num_steps,
        num_draft_tokens=header.num_draft_tokens,
        extends_by_accepted=header.is_ragged,
        c1=c1,
        c2=c2,
        c3=c3,
        r=int(r),
    )
    if name == "full-width":
        return FullWidthPolicy(*settings[:2], settings.extends_by_accepted)
    return build_policy(name, settings)


class Replay:
    """Runs one policy over the steps of a trace, in order.

    Args:
        tables: cost tables of any device.
        correct: correct the tables by the recorded times of earlier steps, as the server does. Only
            for tables of the device that recorded the trace.
        lookup: "linear" or "nearest"; None takes the recorded setting.
        seed: seed of the random draws of children that were not recorded.
        rewards: whether to compute the reward of each tree, which takes half of the time.
        copies: whether what was copied is copied again; policy auto alone does.
        switch_at: the whole draft is a copy where the match is at least so long, and nothing is
            copied elsewhere (`copied.whole_drafts`); None for no such switch.

    Attributes:
        extrapolated: axes of the tables that the trace exceeds, such as "target.batch_sizes".

    Raises:
        TraceError: the trace holds no step with drafts.
    """

    def __init__(
        self,
        trace: Trace,
        tables: CostTables,
        policy: TreePolicy,
        *,
        correct: bool = False,
        lookup: str | None = None,
        seed: int = 0,
        rewards: bool = True,
        copies: bool = True,
        switch_at: int | None = None,
    ) -> None:
        header = self._header = trace.header
        self._switch_at = switch_at
        self._steps = trace.steps
        self._policy = policy
        self._is_same = tables_digest(tables) == header.tables
        batch_size = max((step.batch_size for step in trace.steps), default=1)
        limits = Limits(
            max_batch_size=max(batch_size, header.max_batch_size),
            # The header holds the longest context before a pass; a pass adds its own rows.
            max_context=header.max_context + header.num_draft_tokens,
            max_verify_rows=header.num_draft_tokens,
            max_width=header.topk,
            max_extend_rows=header.max_extend_rows
            or min(header.num_steps + 1, header.num_draft_tokens),
        )
        lookup = lookup or str(header.settings.get("lookup", LOOKUPS[0]))
        self._model = CostModel(tables, limits, lookup=lookup)
        self.extrapolated = self._model.extrapolated
        self._residuals = Residuals(limits)
        self._corrected = CorrectedCosts(self._model, self._residuals) if correct else None
        try:
            if self._is_same and isinstance(policy, AutoPolicy):
                policy.load_state(header.learned.get("prices", ()))
            if correct and "corrections" in header.learned:
                self._residuals.load_state(header.learned["corrections"])
        except ValueError as error:
            raise TraceError(f"trace {trace.path}: header: {error}") from error
        self._decides_by_corrected = (
            correct
            and header.settings.get("residuals") == "on"
            and not header.is_full
            and not isinstance(policy, EaglePolicy)
        )
        self._extend_graphs = _graph_sizes(header.extend_graphs)
        self._decider = Decider(
            policy,
            max_missing=header.num_draft_tokens,
            topk=header.topk,
            verify_graphs=_graph_sizes(header.verify_graphs),
            width_graphs=_graph_sizes(header.width_graphs),
            is_ragged=header.is_ragged,
            shares_out=header.shares_out,
            plans_chains=header.plans_chains,
        )
        drafted = next((step for step in trace.steps if not step.is_plain), None)
        if drafted is not None:
            self._grower = TreeGrower(
                header,
                drafted,
                self._decider,
                # As in the server, only policy auto uses calibrated chances.
                scores_by_chance=isinstance(policy, AutoPolicy),
                # No other one copies, nor does a subclass, which cuts whole layers.
                copies=copies and switch_at is None and type(policy) is AutoPolicy,
                rewards=rewards,
                seed=seed,
            )
        elif trace.steps:
            raise TraceError(f"trace {trace.path}: no step drafted, so none can be decided")
        self._missing: dict[int, int] = {}  # rows that the draft lacks, by request
        self._was_plain = False  # the step before, as recorded

    def __iter__(self) -> Iterator[ReplayedStep]:
        """Yield the replayed steps in order."""
        for step in self._steps:
            yield self.decide(step)

    def decide(self, step: TracedStep) -> ReplayedStep:
        """Decide the next step, then learn from what was recorded of it."""
        outcome = self._step(step)
        self._learn(step)
        self._was_plain = step.is_plain
        return outcome

    def _step(self, step: TracedStep) -> ReplayedStep:
        if self._corrected is not None and step.step % REFRESH_EVERY == 0:
            self._residuals.refresh()
        raw = self._model.step_costs(step.batch_size, step.context)
        corrected = raw
        if self._corrected is not None:
            corrected = self._corrected.step_costs(step.batch_size, step.context)
        costs = corrected if self._decides_by_corrected else raw
        policy, batch_size = self._policy, step.batch_size
        weights = np.array([request.weight for request in step.requests])
        is_drawn: np.ndarray | None = None
        # Another policy would have had the draft's likeliest tokens; it takes the draws as such.
        draws = any(request.is_drawn for request in step.requests)
        if draws and isinstance(policy, AutoPolicy) and policy.settles:
            is_drawn = np.array([request.is_drawn for request in step.requests])
        facts = StepFacts(
            batch_size=batch_size,
            costs=costs,
            weights=None if (weights == 1.0).all() else weights,
            missing_rows=max(self._missing.get(request.request, 0) for request in step.requests),
            max_layers=self._header.num_steps if step.max_layers is None else step.max_layers,
            max_rows=self._header.num_draft_tokens if step.max_rows is None else step.max_rows,
            max_nodes=step.max_nodes,
            prompts=PromptFacts(
                step.prompt_rows,
                step.answer_tokens,
                step.prompt_row_us if self._is_same else None,  # of this device alone
                step.num_left_out,
                step.reuse,
            ),
            is_drawn=is_drawn,
            copy_depth=step.copy_depth,
        )
        plan = self._decider.begin_step(facts)
        price = policy.price(batch_size) if isinstance(policy, AutoPolicy) else math.nan
        if not plan.drafts:
            self._defer(step, plan)
            times = self._times((), 1.0, 0.0, plan.catch_up, raw, corrected)
            return ReplayedStep(TracedChoice(is_plain=True), 0.0, 0.0, *times, price, None)
        for request in step.requests:
            self._missing[request.request] = 0
        whole = None
        if self._switch_at is not None and not step.is_plain:
            accepted = RecordedTrees(step, self._header.topk).accepted
            whole = whole_drafts(step, accepted, self._switch_at, facts.max_rows - 1)
        if whole is not None and whole.is_copied.all():
            nothing = np.zeros(batch_size)
            tree = VerifiedTree((), 0, 0, nothing, nothing, nothing, None)
        else:
            tree = self._grower.verify(step, facts, weights)
        if whole is not None:
            tree = tree.with_whole(whole, self._header.is_ragged)
        most, accepted = int(tree.num_rows.max()), tree.accepted
        if not self._header.extends_by_outcome:
            extend_rows = float(min(tree.depth, most - 1) + 1)
            if self._extend_graphs is not None:
                fitting = self._extend_graphs.fit(batch_size, int(extend_rows), most)
                extend_rows = max(extend_rows, fitting or 0.0)
        elif self._header.is_ragged:
            # As the server divides, to the last bit: the bonus tokens are part of the sum.
            extend_rows = float(accepted.sum() + batch_size) / batch_size
        else:
            extend_rows = 1.0 + float(accepted.max())
        # A sum of chances can exceed the depth by a rounding error.
        extend_rows = min(extend_rows, float(len(costs.draft_extend)))
        widths, mean_rows = tree.widths, float(tree.num_rows.mean())
        units = step_units(costs, widths, mean_rows, extend_rows)
        self._decider.end_step(batch_size, float(accepted.mean()), units)
        times = self._times(widths, mean_rows, extend_rows, plan.catch_up, raw, corrected)
        num_rows = tree.num_rows.astype(int).tolist()
        return ReplayedStep(
            choice=TracedChoice(widths=list(widths), num_layers=tree.num_layers, num_rows=num_rows),
            accepted=float(accepted.mean()),
            assumed_accepted=float(tree.assumed.sum()) / batch_size,
            time_us=times[0],
            table_us=times[1],
            price=price,
            reward=tree.reward,
        )

    def _times(
        self,
        widths: Sequence[int],
        num_rows: float,
        extend_rows: float,
        catch_up: float,
        raw: StepCosts,
        corrected: StepCosts,
    ) -> tuple[float, float]:
        """Return a step's time in us by the corrected and by the uncorrected tables."""
        time_us, table_us = (
            (step_units(costs, widths, num_rows, extend_rows) + catch_up) * costs.unit_us
            for costs in (corrected, raw)
        )
        return time_us, table_us

    def _defer(self, step: TracedStep, plan: Plan) -> None:
        """Count the rows that the draft must catch up on after a plain step."""
        for request in step.requests:
            before = 0 if plan.catch_up else self._missing.get(request.request, 0)
            self._missing[request.request] = min(before + 1, self._header.num_draft_tokens)

    def _learn(self, step: TracedStep) -> None:
        """Correct the costs of the next steps by the recorded times of this one."""
        if self._corrected is None:
            return
        raw = self._model.step_costs(step.batch_size, step.context)
        corrected = self._corrected.step_costs(step.batch_size, step.context)
        # In the server's order.
        for timed in step.passes:
            predicted_us = timed.predicted_us
            if not self._is_same:
                predicted_us = pass_us(raw, timed.operation, timed.num_tokens)
            ratio = timed.measured_us / predicted_us
            self._residuals.record(timed.operation, timed.batch_size, timed.num_tokens, ratio)
        if step.measured_us is None:
            return
        if step.expected_us is not None and self._is_same:
            expected_us = step.expected_us
        elif step.is_plain or not self._was_plain:
            # Older traces lack the cost of catching up, so a step after plain steps is not used.
            rows = step.mean_rows, step.extend_rows
            expected_us = step_units(corrected, step.widths, *rows) * corrected.unit_us
        else:
            return
        num_layers = 0 if step.is_plain else len(step.widths) + 1
        measured, expected = step.measured_us / raw.unit_us, expected_us / raw.unit_us
        self._residuals.record_step(step.batch_size, num_layers, measured, expected)


def _graph_sizes(tiers: dict[int, list[int]] | None) -> GraphSizes | None:
    return None if tiers is None else GraphSizes({size: tuple(t) for size, t in tiers.items()})
