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
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative import eagle_worker_v2
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from cast_sglang.config import CastConfig
from cast_sglang.cost import CostModel
from cast_sglang.policy import EaglePolicy, FixedPolicy, TreePolicy
from cast_sglang.serving.algorithm import find_server_profile, verify_sizes
from cast_sglang.serving.draft import CastDraftWorker
from cast_sglang.stats import StepStats

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


class _Step(NamedTuple):
    """A step that ran and whose results are not on the host yet."""

    predicted_us: float | None
    follows_decode: bool  # no prefill since the step before, so their distance is a step's time


class CastWorker(EAGLEWorkerV2):
    """SGLang's EAGLE worker with CAST's tree."""

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        with _building(CastDraftWorker):
            super().__init__(server_args, gpu_id, nccl_port, target_worker)
        self.config = CastConfig.load()
        self.max_draft_tokens = self.speculative_num_draft_tokens
        self.cost_model = self._load_cost_model(server_args)
        self._draft_worker.cost_model = self.cost_model
        self._draft_worker.policy = self._build_policy()
        self.cast_stats = StepStats({"tp_rank": str(get_parallel().tp_rank)})
        self._num_steps = 0
        self._pending: deque[_Step] = deque()
        self._last_done: float | None = None
        self._prefill_since_step = True

    def _load_cost_model(self, server_args: ServerArgs) -> CostModel | None:
        found = find_server_profile(self.config, resolving_view(server_args))
        if found is None:
            return None
        return CostModel(
            found.profile,
            max_batch_size=get_schedule().max_running_requests,
            max_context=self.target_worker.model_runner.model_config.context_len,
            max_verify_tokens=self.max_draft_tokens,
            max_width=self.topk,
            lookup=self.config.lookup,
        )

    def _build_policy(self) -> TreePolicy:
        config = self.config
        if config.policy == "eagle":
            return EaglePolicy(self.max_draft_tokens)
        sizes = verify_sizes(config, self.max_draft_tokens)
        return FixedPolicy(config.c1, config.c2, config.c3, config.r, sizes)

    def forward_batch_generation(
        self, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> GenerationBatchResult:
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            self._prefill_since_step = True
            return super().forward_batch_generation(batch, *args, **kwargs)

        draft = self._draft_worker
        batch_size, context = len(batch.reqs), draft.mean_context(batch)
        result = super().forward_batch_generation(batch, *args, **kwargs)
        shape = draft.last_shape
        self.cast_stats.record_step(
            batch_size=batch_size,
            num_layers=len(shape.widths) + 1,
            num_draft_nodes=self.topk * (1 + sum(shape.widths)),
            num_verify_rows=shape.num_draft_tokens,
            policy_us=shape.policy_seconds * 1e6,
        )
        predicted_us = None
        if self.cost_model is not None:
            predicted_us = self.cost_model.predict_us(
                batch_size, context, shape.num_draft_tokens, shape.widths, draft.last_extend_rows
            )
        self._pending.append(_Step(predicted_us, not self._prefill_since_step))
        self._prefill_since_step = False
        return result

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        """Verify the step's tree at the step's width."""
        self.speculative_num_draft_tokens = batch.spec_info.draft_token_num
        try:
            return super().verify(batch, *args, **kwargs)
        finally:
            self.speculative_num_draft_tokens = self.max_draft_tokens

    def discard_pending_steps(self) -> None:
        """Forget steps whose results will not come, as those of a profile's synthetic batches."""
        self._pending.clear()

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: list[int], batch_size: int = 0
    ) -> None:
        """Count what was accepted; SGLang calls this when a step's results reach the host."""
        if not self._pending:
            return
        step, now = self._pending.popleft(), time.perf_counter()
        self.cast_stats.record_accepts(count + 1 for count in num_correct_drafts_per_req)
        if step.predicted_us is not None and step.follows_decode and self._last_done is not None:
            # From the end of the last step to the end of this one: right with and without overlap.
            self.cast_stats.record_time(step.predicted_us, (now - self._last_done) * 1e6)
        self._last_done = now
        self._num_steps += 1
        interval = self.config.log_interval
        if interval and self._num_steps % interval == 0:
            logger.info(self.cast_stats.log_line())


@contextlib.contextmanager
def _building(draft_worker_class: type) -> Iterator[None]:
    """Let EAGLEWorkerV2's constructor build our draft worker; it names its class by a global."""
    original = eagle_worker_v2.EagleDraftWorker
    eagle_worker_v2.EagleDraftWorker = draft_worker_class
    try:
        yield
    finally:
        eagle_worker_v2.EagleDraftWorker = original


def synchronize(device: str) -> None:
    """Wait until the device has finished what was queued."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()
