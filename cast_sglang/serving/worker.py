"""The CAST step: draft a tree at the batch's measured costs, verify what pays, extend the draft.

`EAGLEWorkerV2` runs draft, verify and draft extend with the widths of the server arguments. Here
each step has its own widths; the server arguments are the envelope they stay within.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.distributed import get_tp_group
from sglang.srt.runtime_context import get_observability, get_parallel, get_schedule
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.speculative.spec_utils import draft_tp_context

from cast_sglang.config import CastConfig
from cast_sglang.costs.correction import REFRESH_EVERY, CorrectedCosts, Residual, Residuals
from cast_sglang.costs.limits import longest_context
from cast_sglang.costs.model import CostModel, StepCosts, extend_units, plain_extra, step_units
from cast_sglang.costs.profiles import FoundProfile, profile_command
from cast_sglang.policy.auto import KEEP_UP_SHARE, AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.fixed import EaglePolicy, FixedPolicy
from cast_sglang.policy.optimal import OptimalPolicy
from cast_sglang.serving.calibration import Calibration, CalibrationFile
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.drafting.grow import compile_ops
from cast_sglang.serving.drafting.worker import CastDraftWorker
from cast_sglang.serving.graphs.passes import PassGraphs, capture_verify
from cast_sglang.serving.graphs.plan import plan_graphs
from cast_sglang.serving.host_patches.hooks import building_draft_worker
from cast_sglang.serving.host_patches.passes import packed_pass, set_verify_graph
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.launch.arguments import find_server_profile, verify_sizes
from cast_sglang.serving.launch.identity import host_identity
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.requests import AnswerLengths, mean_context, request_weights
from cast_sglang.serving.row_packing import can_pack_rows, find_packed_rows
from cast_sglang.serving.stats import StepStats
from cast_sglang.serving.step import PLAIN_SHAPE
from cast_sglang.serving.step_room import Envelope
from cast_sglang.serving.trace_recorder import Tracer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.server_args import ServerArgs

# Steps of the same requests between two looks at what they cost; a context grows by about one
# bucket of the tables meanwhile where all drafts are accepted, and mostly by less.
LOOK_UP_EVERY = 8

logger = logging.getLogger(__name__)


class _Step(NamedTuple):
    """A step that ran and whose results are not on the host yet."""

    predicted_us: float | None
    units: float | None  # its time by the corrected costs; None for a plain step
    expected_us: float  # by the corrected costs; of a plain step by those of its passes
    follows_decode: bool  # no prefill since the step before, so their distance is a step's time
    max_tokens: int  # that it may have brought a request


class CastWorker(EAGLEWorkerV2):
    """SGLang's EAGLE worker with CAST's tree."""

    speculative_num_steps: int
    topk: int

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        with building_draft_worker(CastDraftWorker):
            super().__init__(server_args, gpu_id, nccl_port, target_worker)
        self.config = CastConfig.load()
        self.max_draft_tokens = self.speculative_num_draft_tokens
        # No accepted path is longer than the tree is deep, the bonus token added.
        self.max_extend_rows = min(self.speculative_num_steps + 1, self.max_draft_tokens)
        exports = get_observability().enable_metrics
        self.cast_stats = StepStats({"tp_rank": str(get_parallel().tp_rank)} if exports else None)
        self.profile: FoundProfile | None = None
        self.cost_model: CostModel | None = None
        self.residuals: Residuals | None = None
        self.clock = PassClock(self.device)
        draft = self._draft_worker
        draft.costs = draft.residuals = draft.weights = draft.deferring = None
        draft.clock = self.clock
        draft.verify_sizes = verify_sizes(self.config, self.max_draft_tokens)
        draft.reads = HostReads(self.device)
        self.verify_graphs: PassGraphs | None = None
        self.calibration = None
        if self.config.policy in ("auto", "optimal") and self.config.calibration == "on":
            identity = host_identity(resolving_view(server_args))
            file = CalibrationFile.of(self.config, identity)
            saves = get_parallel().tp_rank == 0
            self.calibration = Calibration(file, saves, draft.reads)
        draft.calibration = self.calibration
        self.answers = AnswerLengths()
        self._envelope = Envelope(self.speculative_num_steps, self.topk, self.max_draft_tokens)
        self._table: StepCosts | None = None  # as measured, of the requests that run
        self._wants_drafts = True  # any of them
        self._pending: deque[_Step] = deque()
        self._observing = 0.0  # seconds spent on results since the last step
        self._last_done: float | None = None
        self._num_steps, self._prefill_since_step, self._reported = 0, True, False
        if (found := find_server_profile(self.config, resolving_view(server_args))) is not None:
            self.use_profile(found)

    def init_attention_backends(self) -> None:
        """Build the backends and what depends on them and on the memory pools."""
        super().init_attention_backends()
        draft = self._draft_worker
        runners = (self.target_worker.model_runner, draft.draft_runner)
        draft.is_ragged = all(can_pack_rows(runner) for runner in runners)
        draft.shares_out = draft.is_ragged and self.config.joint_budget == "on"
        draft.policy = self._build_policy()
        draft.tracer = Tracer.of(self)
        # As many rows as verify may have, so that catching up fits wherever verify does.
        num_slots = self.req_to_token_pool.req_to_token.shape[0]
        draft.backlog = Backlog(num_slots, self.max_draft_tokens)

    def init_cuda_graphs(self) -> None:
        """Capture the passes at the sizes that a step may choose, where the device can."""
        self._draft_worker.graph_plan = plan = plan_graphs(self)
        super().init_cuda_graphs()
        if plan is not None:
            self.verify_graphs = capture_verify(self, plan.verify)
        if self.device != "cpu":
            compile_ops(self._draft_worker)

    @property
    def lacks_profile(self) -> bool:
        """Whether a profile is still to be made before the first request."""
        return self.cost_model is None and self.config.policy != "eagle"

    def use_profile(self, found: FoundProfile) -> None:
        """Decide by this profile's tables from the next step on."""
        self.profile = found
        self.cost_model = CostModel(
            found.profile,
            max_batch_size=get_schedule().max_running_requests,
            max_context=longest_context(
                self.target_worker.model_runner.model_config.context_len, self.max_draft_tokens
            ),
            max_verify_tokens=self.max_draft_tokens,
            max_width=self.topk,
            max_extend_rows=self.max_extend_rows,
            lookup=self.config.lookup,
        )
        largest = get_schedule().max_running_requests, self.max_draft_tokens
        residuals = Residuals(*largest, found.profile.table_error)
        self.costs = CorrectedCosts(self.cost_model, residuals)
        explores = self.config.policy != "eagle" and not self.config.trace_full
        if self.config.residuals == "on" and explores:
            self.residuals = self._draft_worker.residuals = residuals

    def _build_policy(self) -> TreePolicy:
        config = self.config
        if config.policy == "eagle" or config.trace_full:
            return EaglePolicy(self.max_draft_tokens)
        sizes = self._draft_worker.verify_sizes
        if config.policy in ("auto", "optimal"):
            policy = AutoPolicy if config.policy == "auto" else OptimalPolicy
            return policy(sizes, self.speculative_num_steps, self._draft_worker.is_ragged)
        return FixedPolicy(config.c1, config.c2, config.c3, config.r, sizes)

    def cast_state(self) -> dict[str, Any]:
        """Return what an operator wants to see of this process, as JSON."""
        profile = None
        if self.profile is not None:
            estimated = self.profile.profile.provenance.estimated
            profile = {"path": str(self.profile.path), "estimated": estimated}
        residuals = [] if self.residuals is None else [row._asdict() for row in self.residuals]
        policy, reliability = self._draft_worker.policy, []
        if self._draft_worker.tracer is not None:
            self._take_times()
            self._draft_worker.tracer.flush()
        if self.calibration is not None:
            reliability = [row._asdict() for row in self.calibration.acceptance.reliability()]
        return {
            **self.cast_stats.snapshot(),
            "profile": profile,
            "residuals": residuals,
            "prices": policy.state() if isinstance(policy, AutoPolicy) else [],
            "reliability": reliability,
        }

    def forward_batch_generation(
        self, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> GenerationBatchResult:
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            self._prefill_since_step = True
            self._draft_worker.backlog.forget(batch.req_pool_indices_cpu.numpy())
            return super().forward_batch_generation(batch, *args, **kwargs)

        began = time.perf_counter()
        draft, batch_size = self._draft_worker, len(batch.reqs)
        self._num_steps += 1
        if draft.tracer is not None:
            draft.tracer.begin(batch)
        self._correct_costs()
        is_due = self._num_steps % LOOK_UP_EVERY == 0 or self.config.trace != "none"
        are_new = self.answers.note(batch.reqs)
        if are_new or is_due:
            self._look_up(batch)
        table = self._table
        pending = [step.max_tokens for step in self._pending]
        draft.room = self._envelope.room(batch.reqs, pending, are_new)
        speculates, catch_up = self._decide(batch)
        policy_seconds = time.perf_counter() - began
        if catch_up and not speculates:
            with draft_tp_context(draft.parallel_layout):
                draft.catch_up(batch)
        self.clock.begin_step(batch_size, table)
        try:
            with contextlib.nullcontext() if speculates else self._plain_step(batch):
                result = super().forward_batch_generation(batch, *args, **kwargs)
        finally:
            self.clock.end_step()
        began = time.perf_counter()
        shape = draft.last_shape if speculates else PLAIN_SHAPE
        predicted_us, units, expected_us = None, None, 0.0
        if table is not None:
            passes = shape.widths, shape.mean_rows, draft.last_extend_rows
            predicted_us = step_units(table, *passes) * table.unit_us
            units = step_units(draft.costs, *passes)
            expected_us = (units + catch_up) * draft.costs.unit_us
            units = units if speculates else None
        if draft.tracer is not None:
            draft.tracer.record(self._num_steps, shape, draft, predicted_us)
        follows = not self._prefill_since_step
        max_tokens = min(len(shape.widths) + 1, shape.num_draft_tokens - 1) + 1
        self._pending.append(_Step(predicted_us, units, expected_us, follows, max_tokens))
        self._prefill_since_step = False
        policy_seconds += shape.policy_seconds + time.perf_counter() - began
        self.cast_stats.record_step(
            batch_size=batch_size,
            num_layers=len(shape.widths) + speculates,
            num_draft_nodes=self.topk * (speculates + sum(shape.widths)),
            num_verify_rows=shape.mean_rows,
            policy_us=(policy_seconds + self._observing) * 1e6,
        )
        self._observing = 0.0
        return result

    def _look_up(self, batch: ScheduleBatch) -> None:
        """Take what the requests ask for and what they cost into the next decisions."""
        draft, batch_size = self._draft_worker, len(batch.reqs)
        if (answer_tokens := self.answers.mean_tokens) is not None:
            draft.policy.expect(answer_tokens)
        self._wants_drafts, draft.weights = request_weights(batch.reqs)
        draft.policy.weigh(draft.weights)
        if self.cost_model is not None:
            context = mean_context(batch)
            self._table = self.cost_model.step_costs(batch_size, context)
            draft.costs = self.costs.step_costs(batch_size, context)

    def _decide(self, batch: ScheduleBatch) -> tuple[bool, float]:
        """Return whether to draft, and the units it takes to bring the draft up to date."""
        draft = self._draft_worker
        missing = draft.backlog.num_missing(batch.req_pool_indices_cpu.numpy())
        may_draft = self._wants_drafts and draft.room.has_drafts
        if draft.costs is None:
            return may_draft, 0.0
        batch_size, catch_up = len(batch.reqs), extend_units(draft.costs, missing)
        speculates = may_draft and draft.policy.speculate(
            batch_size, draft.costs, plain_extra(draft.costs), catch_up
        )
        if speculates and self.residuals is not None and self.clock.times_next:
            loss = draft.policy.plain_loss(batch_size)
            speculates = not self.residuals.explore_plain(batch_size, loss)
        is_cheap = catch_up <= KEEP_UP_SHARE * missing * draft.costs.verify[0]
        is_due = speculates or (missing == draft.backlog.capacity and is_cheap)
        return speculates, catch_up if is_due else 0.0

    @contextlib.contextmanager
    def _plain_step(self, batch: ScheduleBatch) -> Iterator[None]:
        """Let SGLang skip drafting and verify the root alone; the draft learns of it later."""
        draft = self._draft_worker
        num_steps, self.speculative_num_steps = self.speculative_num_steps, 0
        draft.deferring = batch.spec_info
        try:
            yield
        finally:
            self.speculative_num_steps, draft.deferring = num_steps, None

    def _correct_costs(self) -> None:
        """Take what the last steps measured into the costs of the next ones."""
        is_due = self._num_steps % REFRESH_EVERY == 0
        if is_due or self._draft_worker.tracer is not None:
            self._take_times()
        if self.residuals is None or not is_due:
            return
        state = None
        if get_parallel().tp_size > 1:
            # Every rank must choose the same trees, so every rank takes rank 0's times.
            state = get_tp_group().broadcast_object(self.residuals.state(), src=0)
        self.residuals.refresh(state)
        self.cast_stats.record_residuals(self.residuals)
        self._report(self.residuals.suspects())

    def _take_times(self) -> None:
        tracer = self._draft_worker.tracer
        for timed in self.clock.finished():
            if tracer is not None:
                tracer.timed(timed)
            if self.residuals is not None:
                ratio = timed.measured_us / timed.predicted_us
                self.residuals.record(timed.operation, timed.batch_size, timed.num_tokens, ratio)

    def _report(self, suspects: list[Residual]) -> None:
        """Say once that the profile is off, and again when it was right in between."""
        assert self.profile is not None
        if not suspects:
            self._reported = False
        elif not self._reported:
            self._reported = True
            worst = suspects[0]
            logger.warning(
                "CAST: cost profile %s is off: %s at batch size %d-%d and %d-%d tokens takes %.2f "
                "times what it says (%d such entries); serving corrects for it. Measure again: %s",
                self.profile.path,
                worst.operation,
                *worst.batch_sizes,
                *worst.tokens,
                worst.ratio,
                len(suspects),
                profile_command(self.profile.profile.provenance),
            )

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        """Verify the step's tree at the step's width."""
        rows = self.speculative_num_draft_tokens = batch.spec_info.draft_token_num
        mean_rows, packed_rows = float(rows), None
        num_rows = getattr(batch.spec_info, "num_rows", None)
        if num_rows is not None:
            mean_rows = float(num_rows.mean())
            packed_rows = find_packed_rows(torch.from_numpy(num_rows), rows)
        topk = self.topk
        if rows == 1 or getattr(batch.spec_info, "is_path", False):
            self.topk = 1  # accepted nodes stand where they belong, so nothing is to be moved
        try:
            runner = self.target_worker.model_runner
            if (graphs := self.verify_graphs) is not None:
                set_verify_graph(runner, graphs.runner(len(batch.reqs), rows))
            with self.clock.time("verify", mean_rows), packed_pass(runner, packed_rows):
                result = super().verify(batch, *args, **kwargs)
            if self.calibration is not None and rows > 1:
                self.calibration.verified(result.accept_index)
            if self._draft_worker.tracer is not None:
                self._draft_worker.tracer.verified(batch, result, rows)
            return result
        finally:
            self.topk, self.speculative_num_draft_tokens = topk, self.max_draft_tokens

    def discard_pending_steps(self) -> None:
        """Forget steps whose results will not come, as those of a profile's synthetic batches."""
        self._pending.clear()
        if self._draft_worker.tracer is not None:
            self._draft_worker.tracer.discard()

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0
    ) -> None:
        """Count what was accepted; SGLang calls this when a step's results reach the host."""
        if not self._pending:
            return
        step, now = self._pending.popleft(), time.perf_counter()
        batch_size = len(num_correct_drafts_per_req)
        num_drafts = sum(num_correct_drafts_per_req)
        self.answers.count(batch_size + num_drafts)
        self.cast_stats.record_accepts(count + 1 for count in num_correct_drafts_per_req)
        if step.units is not None and batch_size:
            self._draft_worker.policy.observe(batch_size, num_drafts / batch_size, step.units)
        measured_us = None
        if step.follows_decode and self._last_done is not None:
            # From the end of the last step to the end of this one: right with and without overlap.
            measured_us = (now - self._last_done) * 1e6
        if step.predicted_us is not None and measured_us is not None:
            self.cast_stats.record_time(step.predicted_us, measured_us)
            if self.residuals is not None and batch_size:
                ratio = measured_us / step.expected_us
                self.residuals.record_step(batch_size, step.units is None, ratio)
        if self._draft_worker.tracer is not None:
            self._draft_worker.tracer.done(measured_us)
        self._last_done = now
        self._observing += time.perf_counter() - now
        if self.config.log_interval and self._num_steps % self.config.log_interval == 0:
            logger.info(self.cast_stats.log_line())
