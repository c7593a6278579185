"""Synthetic batches on free KV slots, and the policy of the smallest tree, for timed passes."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cast_sglang.policy.base import TreePolicy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from cast_sglang.serving.worker import CastWorker

__all__ = ["Rows", "SmallTree"]


class SmallTree(TreePolicy):
    """Grows one layer of one node and verifies two rows."""

    def __init__(self) -> None:
        self._num_layers = 0

    def breadth(self, scores: torch.Tensor, costs: Any) -> int:
        return 1

    def deepen(self) -> bool:
        self._num_layers += 1
        return self._num_layers == 1

    def rerank(self, scores: torch.Tensor, costs: Any) -> int:
        return 2


class _NoCache(NamedTuple):
    """What a step asks of the prefix cache, behind verify of layers that keep states."""

    page_size: int


class Rows:
    """The requests of a synthetic batch, which serve many batches."""

    def __init__(self, worker: CastWorker, batch_size: int, context: int) -> None:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._worker = worker
        self._context = context
        self._knows_lengths = _knows_lengths(worker)
        self._reqs = [
            Req(
                rid=f"cast-profile-{row}",
                origin_input_text="",
                origin_input_ids=array("q", [1] * context),
                sampling_params=SamplingParams(temperature=0.0, max_new_tokens=1 << 20),
            )
            for row in range(batch_size)
        ]
        for req in self._reqs:
            req.kv.kv_committed_len = context
            req.kv.kv_allocated_len = context + get_alloc_reserve_per_decode()

    def batch(self) -> ScheduleBatch:
        """Return a new decode batch of these requests."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

        worker, batch_size = self._worker, len(self._reqs)
        device, model_config = worker.device, worker.target_worker.model_runner.model_config
        allocator = worker.token_to_kv_pool_allocator
        batch = ScheduleBatch.init_new(
            self._reqs,
            worker.req_to_token_pool,
            allocator,
            _NoCache(allocator.page_size),
            model_config,
            False,
            worker.speculative_algorithm,
        )
        batch.forward_mode = ForwardMode.DECODE
        lengths = torch.full((batch_size,), self._context, dtype=torch.int64)
        batch.seq_lens = lengths.to(device)
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        if self._knows_lengths:
            batch.seq_lens_cpu, batch.seq_lens_sum = lengths, self._context * batch_size
        # SGLang lets padded requests write to row 0.
        batch.req_pool_indices_cpu = torch.arange(1, batch_size + 1)
        batch.req_pool_indices = batch.req_pool_indices_cpu.to(device)
        batch.multimodal_inputs = [None] * batch_size
        batch.mamba_lazy_spec_track_positions_cpu = [0] * batch_size
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, model_config.vocab_size)
        batch.spec_info = self._draft_input(batch_size)
        return batch

    def _draft_input(self, batch_size: int) -> Any:
        from sglang.srt.speculative.eagle_info import EagleDraftInput
        from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec

        worker, device = self._worker, self._worker.device
        bonus_tokens = torch.ones(batch_size, dtype=torch.int32, device=device)
        if not worker.limits.max_width:  # there is no draft model
            return worker.draft_worker.next_input(bonus_tokens)
        hidden_size, dtype = get_draft_recurrent_hidden_state_spec(worker.draft_worker.draft_runner)
        draft = worker.draft_worker
        shape = batch_size, draft.model.num_proposed * draft.drafter.layers_held
        return EagleDraftInput(
            topk_p=torch.full(shape, 0.5, device=device),
            topk_index=torch.ones(shape, dtype=torch.int64, device=device),
            hidden_states=torch.zeros((batch_size, hidden_size), dtype=dtype, device=device),
            bonus_tokens=bonus_tokens,
        )


def _knows_lengths(worker: CastWorker) -> bool:
    """Return whether the scheduler's batches have the lengths of their requests on the host too.

    With overlap they have not where no backend asks for them, and SGLang then runs other kernels.
    """
    from sglang.srt.managers.overlap_utils import decide_needs_cpu_seq_lens
    from sglang.srt.runtime_context import get_schedule

    if get_schedule().disable_overlap_schedule:
        return True
    return decide_needs_cpu_seq_lens(worker.spec_v2_attn_backends)
