"""The CAST step: draft a tree at the batch's measured costs, verify what pays, extend the draft.

`EAGLEWorkerV2` runs draft, verify and draft extend with the widths of the server arguments. Here
each step has its own widths; the server arguments are the envelope they stay within.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.speculative.spec_utils import draft_tp_context

from cast_sglang.config import PENDING, CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.ops.copies import is_on_host
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.build import PolicySettings, build_policy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.copies import Copies
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.drafting.draws import Draws, draws_children
from cast_sglang.serving.drafting.tools import StepTools
from cast_sglang.serving.drafting.worker import CastDraftWorker
from cast_sglang.serving.graphs.backends import VerifyBackends
from cast_sglang.serving.graphs.passes import PassGraphs, capture_verify
from cast_sglang.serving.host_patches.hidden_states import handing_out_plain_states
from cast_sglang.serving.host_patches.hooks import building_draft_worker
from cast_sglang.serving.host_patches.passes import packed_pass
from cast_sglang.serving.host_patches.sampling import sampling_as_plain
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.launch.arguments import verify_sizes
from cast_sglang.serving.launch.graph_plan import plan_graphs
from cast_sglang.serving.launch.identity import host_identity
from cast_sglang.serving.learned import Learned, LearnedFile
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.requests import RunningRequests, mean_context
from cast_sglang.serving.row_packing import can_pack_rows, find_packed_rows, rows_with_nodes
from cast_sglang.serving.served_costs import ServedCosts
from cast_sglang.serving.stats import StepStats
from cast_sglang.serving.step import PLAIN_SHAPE, PendingStep, StepReport, Verified
from cast_sglang.serving.step_room import Envelope
from cast_sglang.serving.trace_recorder import Recording, TraceRecorder

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from cast_sglang.costs.profiles import FoundProfile
    from cast_sglang.serving.launch.graph_plan import GraphPlan
    from cast_sglang.serving.pass_clock import TimedPass

# Steps of the same requests between two looks at what they cost; a context grows by about one
# bucket of the tables meanwhile where all drafts are accepted, and mostly by less.
LOOK_UP_EVERY = 8

logger = logging.getLogger(__name__)


class CastWorker(EAGLEWorkerV2):
    """SGLang's EAGLE worker with CAST's tree."""

    draft_worker_class: type = CastDraftWorker
    has_draft = True
    speculative_num_steps: int
    topk: int
    tools: StepTools  # shared with the draft worker

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        with building_draft_worker(self.draft_worker_class):
            super().__init__(server_args, gpu_id, nccl_port, target_worker)
        self.config = CastConfig.load()
        self.max_draft_tokens = self.speculative_num_draft_tokens
        self.cast_stats = StepStats()
        self.clock = PassClock(self.device)
        self.costs = ServedCosts(self.config, self.clock, self.cast_stats)
        self.reads = HostReads(self.device)
        self.verify_graphs: PassGraphs | None = None
        calibrates = self.config.policy == "auto" and self.config.calibration == "on"
        self.calibration = Calibration(self.reads, self.cast_stats) if calibrates else None
        self._running = RunningRequests(draws_children(self.config), self.has_draft)
        self._verify_sizes = verify_sizes(self.config, self.max_draft_tokens)
        self._envelope = Envelope.of_server(self.config)
        self._pending: deque[PendingStep] = deque()
        self._last_done: float | None = None
        # Seconds spent on results since the last step.
        self._num_steps, self._observing = 0, 0.0
        self.costs.find(resolving_view(server_args), self.limits)

    def init_cuda_graphs(self) -> None:
        """Hand the draft worker its tools; capture the passes where the device can."""
        target_runner = self.target_worker.model_runner
        self.backends = VerifyBackends(target_runner)
        first = target_runner.decode_cuda_graph_runner
        plan = plan_graphs(first, self.limits, self.config, self._verify_sizes, self.costs.model)
        self.tools = self._draft_worker.tools = self._make_tools(plan)
        self._go_on()
        super().init_cuda_graphs()
        if plan is not None:
            self.verify_graphs = capture_verify(target_runner, plan.verify, self.backends)
        if self.device != "cpu":
            self._draft_worker.compile_ops()

    def _make_tools(self, plan: GraphPlan | None) -> StepTools:
        draft, config = self._draft_worker, self.config
        is_ragged = all(map(can_pack_rows, [self.target_worker.model_runner, *draft.draft_runners]))
        shares_out = is_ragged and (config.joint_budget == "on" or not self.has_draft)
        plans_chains = self.topk == 1 and not is_on_host(self.req_to_token_pool.req_to_token)
        # As many rows as verify may have, so that catching up fits wherever verify does.
        backlog = Backlog(len(self.req_to_token_pool.req_to_token), self.max_draft_tokens)
        decider = Decider(
            self._build_policy(is_ragged),
            max_missing=backlog.capacity,
            topk=self.topk,
            verify_graphs=None if plan is None else plan.verify,
            width_graphs=None if plan is None else plan.widths,
            is_ragged=is_ragged,
            shares_out=shares_out,
            plans_chains=plans_chains,
        )
        recorder = None
        if config.trace != "none" and get_parallel().tp_rank == 0:
            identity = host_identity(resolving_view(self.server_args))
            recording = Recording(
                *(config, identity, self.limits, self.speculative_num_steps, self._verify_sizes),
                is_ragged=is_ragged,
                shares_out=shares_out,
                extends_by_outcome=self.device == "cpu",
                verify_graphs=decider.verify_graphs,
                width_graphs=decider.width_graphs,
                extend_graphs=None if plan is None else plan.extend,
                plans_chains=plans_chains,
            )
            recorder = TraceRecorder(recording)
        return StepTools(
            decider=decider,
            calibration=self.calibration,
            reads=self.reads,
            clock=self.clock,
            recorder=recorder,
            backlog=backlog,
            is_ragged=is_ragged,
            graph_plan=plan,
            verify_sizes=self._verify_sizes,
            room=self._envelope.whole,
            draws=Draws(self.device, self.target_worker.random_seed, self.topk),
            copies=Copies.of(config, self, self._verify_sizes[-1] - 1),
        )

    @property
    def lacks_profile(self) -> bool:
        """Whether a profile is still to be made before the first request."""
        config = self.config
        return self.costs.model is None and config.policy != "eagle" and config.profile != PENDING

    @property
    def limits(self) -> Limits:
        """The largest shapes of one pass that this server may have to run."""
        max_context = self.target_worker.model_runner.model_config.context_len
        return self._envelope.limits(get_schedule().max_running_requests, max_context)

    def use_profile(self, found: FoundProfile) -> None:
        """Decide by this profile's tables from the next step on, and by what was learned of it."""
        self.costs.use(found, self.limits)
        self.tools.decider.policy = self._build_policy(self.tools.is_ragged)
        self._num_steps = 0
        self._go_on()

    def _go_on(self) -> None:
        """Start from what an earlier server, or the profile's short run, has learned."""
        file = LearnedFile.of(self.config, host_identity(resolving_view(self.server_args)))
        learners = self.tools.decider.policy, self.calibration, self.costs, self.tools.copies
        self.learned = Learned(file, *learners)
        start = self.learned.start()
        if self.tools.recorder is not None and self.costs.profile is not None:
            self.tools.recorder.use_profile(self.costs.profile.profile, start)

    def _build_policy(self, is_ragged: bool) -> TreePolicy:
        config = self.config
        settings = PolicySettings(
            *(self._verify_sizes, self.speculative_num_steps, self.max_draft_tokens, is_ragged),
            *(config.c1, config.c2, config.c3, config.r),
        )
        return build_policy("eagle" if config.trace_full else config.policy, settings)

    def cast_state(self) -> dict[str, Any]:
        """Return what an operator wants to see of this process, as JSON."""
        policy, calibration = self.tools.decider.policy, self.calibration
        if self.tools.recorder is not None:
            self.costs.take_times(self._on_pass())
            self.tools.recorder.flush()
            self._drop_full_recorder()
        rows = [] if calibration is None else calibration.acceptance.reliability()
        return {
            **self.cast_stats.snapshot(),
            **self.costs.state(),
            **({} if self.tools.copies is None else self.tools.copies.state()),
            "prices": policy.state() if isinstance(policy, AutoPolicy) else [],
            "reliability": [row._asdict() for row in rows],
        }

    @handing_out_plain_states
    def forward_batch_generation(
        self, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> GenerationBatchResult:
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            self.clock.follows_prefill()
            self.tools.backlog.forget(batch.req_pool_indices_cpu.numpy())
            self.tools.num_left_out = self._running.left_out(batch, self.tools.decider.plain_steps)
            self.cast_stats.record_left_out(self.tools.num_left_out)
            return super().forward_batch_generation(batch, *args, **kwargs)
        began = time.perf_counter()
        draft, tools, batch_size = self._draft_worker, self.tools, len(batch.reqs)
        decider, costs = tools.decider, self.costs
        self._num_steps += 1
        if tools.recorder is not None:
            tools.recorder.begin_step(batch)
        self.costs.correct(self._num_steps)
        self.learned.save_when_due(self._num_steps)
        is_due = self._num_steps % LOOK_UP_EVERY == 0 or self.config.trace != "none"
        are_new = not self._running.are(batch.reqs)
        if are_new or is_due:
            tools.weights = self._running.update(batch.reqs, self.cast_stats.record_plain_requests)
            costs.look_up(batch_size, mean_context(batch), draft.layer_costs)
        tools.draws.begin_step(self._running.drawn, batch.sampling_info)
        if self.calibration is not None:
            self.calibration.begin_step(batch.sampling_info.top_ks, tools.draws.is_drawn)
        tools.room = self._envelope.room(batch.reqs, [s.max_tokens for s in self._pending], are_new)
        facts = StepFacts(
            batch_size=batch_size,
            costs=costs.current,
            weights=tools.weights,
            missing_rows=tools.backlog.num_missing(batch.req_pool_indices_cpu.numpy()),
            **tools.room._asdict(),
            is_drawn=self._running.drawn,
            prompts=self._running.prompts(costs.prompt_row_us),
        )
        plan = decider.begin_step(facts)
        policy_seconds = time.perf_counter() - began - decider.seconds  # it counts its own time
        if plan.catch_up and not plan.drafts:
            with draft_tp_context(draft.parallel_layout):
                draft.catch_up(batch)
        self.clock.begin_step(batch_size, costs.table, plan.drafts)
        try:
            with contextlib.nullcontext() if plan.drafts else self._plain_step(batch):
                result = super().forward_batch_generation(batch, *args, **kwargs)
        finally:
            self.clock.end_step()
        began = time.perf_counter()
        shape = draft.last_shape if plan.drafts else PLAIN_SHAPE
        learners = (self.calibration, tools.copies if plan.drafts else None)
        tree_seconds = decider.seconds + sum(part.seconds for part in learners if part is not None)
        num_layers = len(shape.widths) + plan.drafts
        passes = shape.widths, shape.mean_rows, draft.last_extend_rows, plan.catch_up
        times = costs.step_times(*passes, plan.drafts)
        if tools.recorder is not None:
            report = StepReport(
                number=self._num_steps,
                shape=shape,
                extend_rows=draft.last_extend_rows,
                weights=tools.weights,
                predicted_us=times.predicted_us,
                expected_us=times.expected_us,
                room=tools.room,
                policy_us=tree_seconds * 1e6,
                price=decider.price(batch_size),
                prompts=facts.prompts,
            )
            tools.recorder.on_step(report)
            self._drop_full_recorder()
        self._pending.append(
            PendingStep(
                predicted_us=times.predicted_us,
                units=times.units if plan.drafts else None,
                expected_us=times.expected_us,
                num_layers=num_layers,
                unit_us=times.unit_us,
                follows_alike=self.clock.follows_alike,
                max_tokens=shape.depth + 1,
            )
        )
        policy_seconds += tree_seconds + time.perf_counter() - began
        self.cast_stats.record_step(
            batch_size=batch_size,
            num_layers=num_layers * self.has_draft,
            num_draft_nodes=self.topk * (plan.drafts + sum(shape.widths)) * self.has_draft,
            num_verify_rows=shape.mean_rows,
            policy_us=(policy_seconds + self._observing) * 1e6,
        )
        self._observing = 0.0
        return result

    @contextlib.contextmanager
    def _plain_step(self, batch: ScheduleBatch) -> Iterator[None]:
        """Make SGLang skip drafting and verify the root alone; the draft catches up later."""
        num_steps, self.speculative_num_steps = self.speculative_num_steps, 0
        try:
            with self._draft_worker.plain_step(batch.spec_info):
                yield
        finally:
            self.speculative_num_steps = num_steps

    def _build_trivial_verify_input(self, batch: ScheduleBatch) -> EagleVerifyInput:
        """Return the verify input of a plain step, one row per request."""
        return self.backends.root_input(super()._build_trivial_verify_input, batch)

    def _on_pass(self) -> Callable[[TimedPass], None] | None:
        return None if self.tools.recorder is None else self.tools.recorder.on_pass_timed

    def _drop_full_recorder(self) -> None:
        recorder = self.tools.recorder
        if recorder is not None and recorder.is_full:
            self.tools.recorder = None  # the rest of the run costs nothing

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        """Verify the step's tree at the step's width."""
        rows = self.speculative_num_draft_tokens = batch.spec_info.draft_token_num
        topk, mean_rows, packed_rows = self.topk, float(rows), None
        if (num_rows := getattr(batch.spec_info, "num_rows", None)) is not None:
            mean_rows = float(num_rows.mean())
            packed_rows = find_packed_rows(torch.from_numpy(num_rows), rows)
        if rows == 1 or getattr(batch.spec_info, "is_path", False):
            self.topk = 1  # accepted nodes stand where they belong, so nothing is to be moved
        try:
            runner = self.target_worker.model_runner
            with (
                self.backends.running(rows, len(batch.reqs), self.verify_graphs),
                self.clock.time("verify", mean_rows),
                packed_pass(runner, packed_rows),
                sampling_as_plain(self._running.sampling, runner.sampler),
            ):
                result = super().verify(batch, *args, **kwargs)
            result.cap_lens = rows_with_nodes(batch, rows, self.tools.weights)
            verified = Verified(
                num_draft_tokens=rows,
                accept_index=result.accept_index,
                accept_lens=result.accept_lens,
                tokens=result.next_token_ids,
                logits=result.logits_output.next_token_logits,
                sampling_info=batch.sampling_info,
            )
            if self.calibration is not None and rows > 1:
                self.calibration.on_verified(verified)
            if self.tools.copies is not None:
                self.tools.copies.on_verified(batch.reqs, verified)
            if self.tools.recorder is not None:
                self.tools.recorder.on_verified(verified)
            return result
        finally:
            self.topk, self.speculative_num_draft_tokens = topk, self.max_draft_tokens

    def discard_pending_steps(self) -> None:
        """Forget steps whose results will not come, as those of a profile's synthetic batches."""
        self._pending.clear()
        for keeper in (self.tools.copies, self.tools.recorder):
            if keeper is not None:
                keeper.discard()

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0
    ) -> None:
        """Count what was accepted; SGLang calls this when a step's results reach the host."""
        if not self._pending:
            return
        step, now = self._pending.popleft(), time.perf_counter()
        batch_size, num_drafts = len(num_correct_drafts_per_req), sum(num_correct_drafts_per_req)
        self.cast_stats.record_accepts(count + 1 for count in num_correct_drafts_per_req)
        if step.units is not None and batch_size:
            self.tools.decider.end_step(batch_size, num_drafts / batch_size, step.units)
        measured_us = None
        if step.follows_alike and self._last_done is not None:
            # From the end of the last step to the end of this one: right with and without overlap.
            measured_us = (now - self._last_done) * 1e6
        if step.predicted_us is not None and measured_us is not None:
            self.cast_stats.record_time(step.predicted_us, measured_us)
        if self.tools.recorder is not None:
            self.tools.recorder.on_step_timed(measured_us)
        # In this order, which replay repeats.
        self.costs.take_times(self._on_pass())
        if measured_us is not None and batch_size:
            self.costs.take_step(batch_size, step, measured_us)
        self._last_done = now
        self._observing += time.perf_counter() - now
        if self.config.log_interval and self._num_steps % self.config.log_interval == 0:
            logger.info(self.cast_stats.log_line())
