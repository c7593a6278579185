"""EngineMeter: time single forward passes of a running engine, through the code that serves.

The engine's scheduler, idle meanwhile, builds batches of the wanted shape on free KV slots and runs
the same methods that serve requests. Contents do not matter to time, so the slots hold whatever
they hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from cast_sglang.policy.fixed import TreePolicy
from cast_sglang.profiling.sampler import Limits
from cast_sglang.serving.stats import StepStats
from cast_sglang.tree import Frontier

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.serving.worker import CastWorker

__all__ = ["EngineMeter", "lead"]

Result = TypeVar("Result")


def lead(scheduler: Scheduler, run: Callable[[Any], Result]) -> Result | None:
    """Call `run` with a meter on rank 0, while the other ranks run what it runs.

    Args:
        run: what to do with the meter, a `Meter`.

    Returns:
        The result on rank 0, None on the others.

    Effects: the scheduler must be idle; its tables are afterwards as before.
    """
    group = scheduler.tp_group
    meter = EngineMeter(scheduler.draft_worker)
    try:
        if group.world_size == 1:
            return run(meter)
        if group.rank_in_group != 0:
            _follow(meter, group)
            return None
        leader = _LeadingMeter(meter, group)
        try:
            return run(leader)
        finally:
            leader.close()
    finally:
        meter.close()


class EngineMeter:
    """Times passes of one rank's `CastWorker`."""

    def __init__(self, worker: CastWorker) -> None:
        self.worker = worker
        self._batches: dict[tuple[int, int], _Rows] = {}
        self._verify_result: Any = None
        self._sweep = torch.zeros(1 << 25, device=worker.device)  # 128 MiB, more than any cache
        worker.draft_worker.backlog.clear()
        self._fill_slots()

    def limits(self) -> Limits:
        return self.limits_of(self.worker)

    @staticmethod
    def limits_of(worker: CastWorker) -> Limits:
        """Return the largest shapes that a worker may have to run."""
        from sglang.srt.runtime_context import get_schedule

        model_config = worker.target_worker.model_runner.model_config
        return Limits(
            max_batch_size=get_schedule().max_running_requests,
            max_context=model_config.context_len,
            max_verify_rows=worker.max_draft_tokens,
            max_width=worker.topk,
            max_tokens=worker.token_to_kv_pool_allocator.size,
            max_extend_rows=worker.max_extend_rows,
        )

    def verify(self, batch_size: int, context: int, rows: int) -> float:
        """Time `worker.verify`: forward, acceptance, KV moves."""
        batch = self._batch(batch_size, context)
        batch.spec_info = self._chain(batch, rows)
        return self._time(lambda: self.worker.verify(batch))

    def draft(self, batch_size: int, context: int, width: int) -> float:
        """Time one layer in the middle of a tree: metadata, forward, best children."""
        from sglang.srt.speculative.eagle_worker_common import prepare_for_draft

        draft = self.worker.draft_worker
        batch = self._batch(batch_size, context)
        pool, steps = draft.req_to_token_pool, self.worker.speculative_num_steps
        forward_batch, _, _ = prepare_for_draft(
            batch.spec_info, pool, batch, None, draft.draft_runner, draft.topk, steps
        )
        if draft.layer_graphs is not None and draft.layer_graphs.holds(batch_size):
            return self._captured_layer(forward_batch, width)
        slots = forward_batch.out_cache_loc.view(batch_size, steps, draft.topk)
        depth = max(1, steps // 2)
        path_slots = slots[:, :depth, :width].transpose(1, 2).contiguous()
        forward_batch.input_ids = torch.ones_like(path_slots[:, :, 0]).flatten()
        forward_batch.positions = (forward_batch.seq_lens + depth - 1).repeat_interleave(width)
        forward_batch.out_cache_loc = path_slots[:, :, -1].flatten()
        hidden_states = forward_batch.spec_info.hidden_states
        forward_batch.spec_info.hidden_states = hidden_states.repeat_interleave(width, dim=0)
        with self._draft_context():
            return self._time(lambda: draft.forward_layer(forward_batch, path_slots))

    def _captured_layer(self, forward_batch: ForwardBatch, width: int) -> float:
        """Time a layer that is replayed; its inputs are prepared while the host waits anyway."""
        layers = self.worker.draft_worker.layer_graphs.layers(forward_batch)
        scores, tokens = forward_batch.spec_info.topk_p, forward_batch.spec_info.topk_index
        frontier = Frontier(scores, tokens, tokens, torch.zeros_like(tokens))
        layers.prepare(frontier)
        width = layers.fit(width)
        with self._draft_context():
            return self._time(lambda: layers.run(frontier, width))

    def draft_extend(self, batch_size: int, context: int, rows: int) -> float:
        """Time the draft's pass over the rows that an accepted path can reach."""
        batch = self._batch(batch_size, context)
        batch.out_cache_loc = self._slots(batch, context, rows)
        result = self._accepted(batch, rows)
        self._sweep.sum()  # as verify does, which leaves nothing of the draft in the caches
        with self._draft_context():
            return self._time(
                lambda: self.worker.draft_worker._draft_extend_for_decode(batch, result)
            )

    def plain(self, batch_size: int, context: int) -> float:
        """Time a decoding step of the target alone, sampling included."""
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        worker = self.worker
        if worker.verify_graphs is not None:
            # Its graphs are those of verify, and a plain step is one of one row.
            return self.verify(batch_size, context, 1)
        batch = self._batch(batch_size, context)
        batch.spec_info = None
        batch.spec_algorithm = SpeculativeAlgorithm.NONE
        batch.capture_hidden_mode = CaptureHiddenMode.NULL
        batch.input_ids = torch.ones(batch_size, dtype=torch.int64, device=worker.device)
        batch.out_cache_loc = self._slots(batch, context, 1)
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_sum += batch_size
        return self._time(lambda: worker.target_worker.forward_batch_generation(batch))

    def step_overhead(self, batch_size: int) -> float:
        """Time a whole step of a small tree and subtract its passes."""
        worker, draft = self.worker, self.worker.draft_worker
        batch = self._batch(batch_size, self._shortest_context)
        inside = 0.0

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                results: list[Any] = []
                inside += self._time(lambda: results.append(call(*args, **kwargs)))
                return results[0]

            return run

        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (draft, "policy", _SmallTree()),
                (worker, "cast_stats", StepStats()),
            ):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            passes = [(worker, "verify"), (draft, "_draft_extend_for_decode")]
            passes.append((draft, "forward_layer"))
            if draft.layer_graphs is not None:
                passes.append((draft.layer_graphs, "run"))
            for owner, name in passes:
                setattr(owner, name, timed(getattr(owner, name)))
                stack.callback(delattr, owner, name)
            whole = self._time(lambda: worker.forward_batch_generation(batch))
        worker.discard_pending_steps()
        return max(whole - inside, 1e-7)

    def close(self) -> None:
        """Give the request rows back as they were; no slot was allocated."""
        self.worker.req_to_token_pool.req_to_token.copy_(self._slots_before)

    _shortest_context = 64

    def _time(self, call: Callable[[], Any]) -> float:
        self._synchronize()
        began = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.worker.device != "cpu":
            torch.get_device_module(self.worker.device).synchronize()

    @contextlib.contextmanager
    def _draft_context(self) -> Iterator[None]:
        from sglang.srt.speculative.spec_utils import draft_tp_context

        with draft_tp_context(self.worker.draft_worker.parallel_layout):
            yield

    def _fill_slots(self) -> None:
        """Give every request row its own slots; rows longer than the pool share them."""
        table = self.worker.req_to_token_pool.req_to_token
        self._slots_before = table.clone()
        size = self.worker.token_to_kv_pool_allocator.size
        positions = torch.arange(table.numel(), device=table.device).view(table.shape)
        table.copy_(positions % size + 1)

    def _batch(self, batch_size: int, context: int) -> ScheduleBatch:
        """Return a decode batch as the scheduler would hand it to the worker."""
        key = (batch_size, context)
        if key not in self._batches:
            self._batches[key] = _Rows(self.worker, batch_size, context)
        return self._batches[key].batch()

    def _accepted(self, batch: ScheduleBatch, rows: int) -> Any:
        """Return what a verify pass that accepted every row would hand to draft extend."""
        if self._verify_result is None:
            single = self._batch(1, self._shortest_context)
            single.spec_info = self._chain(single, 1)
            self._verify_result = self.worker.verify(single)
        result, batch_size = self._verify_result, len(batch.reqs)
        hidden_states = result.logits_output.hidden_states
        return dataclasses.replace(
            result,
            logits_output=dataclasses.replace(
                result.logits_output,
                hidden_states=hidden_states.new_zeros((batch_size * rows, hidden_states.shape[1])),
                next_token_logits=None,
            ),
            next_token_ids=result.next_token_ids.new_zeros(batch_size * rows),
            accept_lens=result.accept_lens.new_full((batch_size,), rows),
            accept_index=result.accept_index.new_zeros((batch_size, rows)),
            new_seq_lens=batch.seq_lens + rows,
            speculative_num_draft_tokens=rows,
        )

    def _slots(self, batch: ScheduleBatch, context: int, rows: int) -> torch.Tensor:
        """Return [B * rows] cache slots that follow each request's context."""
        table = self.worker.req_to_token_pool.req_to_token
        return table[batch.req_pool_indices, context : context + rows].flatten().to(torch.int64)

    def _chain(self, batch: ScheduleBatch, rows: int) -> Any:
        """Return a verify input of `rows` nodes in a line; the mask's shape sets the time."""
        from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

        worker, draft = self.worker, self.worker.draft_worker
        if rows == 1:
            return worker._build_trivial_verify_input(batch)
        batch_size, topk = len(batch.reqs), worker.topk
        # Candidate number k * topk is the first child of expanded node k.
        index = torch.arange(rows - 1, device=worker.device) * topk
        parents = torch.cat((index.new_full((1,), -1), index[:-1]))
        verify_input = build_eagle_verify_input(
            batch,
            batch.spec_info,
            torch.nn.functional.pad(
                parents, (0, max(0, 1 + topk * (rows - 1) - len(parents)))
            ).repeat(batch_size, 1),
            index.repeat(batch_size, 1),
            torch.ones((batch_size, rows - 1), dtype=torch.int64, device=worker.device),
            None,
            target_worker=worker.target_worker,
            topk=topk,
            num_steps=rows,
            num_draft_tokens=rows,
            tree_mask_mode=draft.tree_mask_mode,
            device=worker.device,
        )
        verify_input.spec_steps = rows - 1
        return verify_input


class _SmallTree(TreePolicy):
    """A policy of one grown layer and two verified rows."""

    def __init__(self) -> None:
        self._num_layers = 0

    def breadth(self, scores: torch.Tensor, costs: Any) -> int:
        return 1

    def deepen(self) -> bool:
        self._num_layers += 1
        return self._num_layers == 1

    def rerank(self, scores: torch.Tensor, costs: Any) -> int:
        return 2


class _Rows:
    """The parts of a synthetic batch that can be kept between calls."""

    def __init__(self, worker: CastWorker, batch_size: int, context: int) -> None:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._worker = worker
        self._context = context
        self._reqs = [
            Req(
                rid=f"cast-profile-{row}",
                origin_input_text="",
                origin_input_ids=array("q", [1] * context),
                sampling_params=SamplingParams(temperature=0.0, max_new_tokens=1 << 20),
            )
            for row in range(batch_size)
        ]

    def batch(self) -> ScheduleBatch:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

        worker, batch_size = self._worker, len(self._reqs)
        device, model_config = worker.device, worker.target_worker.model_runner.model_config
        batch = ScheduleBatch.init_new(
            self._reqs,
            worker.req_to_token_pool,
            worker.token_to_kv_pool_allocator,
            None,
            model_config,
            False,
            worker.speculative_algorithm,
        )
        batch.forward_mode = ForwardMode.DECODE
        batch.seq_lens_cpu = torch.full((batch_size,), self._context, dtype=torch.int64)
        batch.seq_lens = batch.seq_lens_cpu.to(device)
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        batch.seq_lens_sum = self._context * batch_size
        # Row 0 is where SGLang lets padded requests write.
        batch.req_pool_indices_cpu = torch.arange(1, batch_size + 1)
        batch.req_pool_indices = batch.req_pool_indices_cpu.to(device)
        batch.multimodal_inputs = [None] * batch_size
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, model_config.vocab_size)
        batch.spec_info = self._draft_input(batch_size)
        return batch

    def _draft_input(self, batch_size: int) -> Any:
        from sglang.srt.speculative.eagle_info import EagleDraftInput
        from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec

        worker, device = self._worker, self._worker.device
        hidden_size, dtype = get_draft_recurrent_hidden_state_spec(worker.draft_worker.draft_runner)
        return EagleDraftInput(
            topk_p=torch.full((batch_size, worker.topk), 0.5, device=device),
            topk_index=torch.ones((batch_size, worker.topk), dtype=torch.int64, device=device),
            hidden_states=torch.zeros((batch_size, hidden_size), dtype=dtype, device=device),
            bonus_tokens=torch.ones(batch_size, dtype=torch.int32, device=device),
        )


class _LeadingMeter:
    """Rank 0's meter under tensor parallelism: tells the others what to run before running it."""

    def __init__(self, meter: EngineMeter, group: Any) -> None:
        self._meter, self._group = meter, group

    def limits(self) -> Limits:
        return self._meter.limits()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*args: int) -> Any:
            self._group.broadcast_object((name, args), src=0)
            return getattr(self._meter, name)(*args)

        return run

    def close(self) -> None:
        self._group.broadcast_object(None, src=0)


def _follow(meter: EngineMeter, group: Any) -> None:
    """Run what rank 0 runs until it is done."""
    while (call := group.broadcast_object(None, src=0)) is not None:
        name, args = call
        getattr(meter, name)(*args)
