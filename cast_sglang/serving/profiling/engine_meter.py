"""EngineMeter: times single forward passes of a running engine, by the methods that serve.

While the engine's scheduler is idle, the meter builds batches of a given shape on free KV slots and
runs the methods that serve requests. Time does not depend on contents, so the meter leaves in the
slots what they hold. Where passes are captured, a size without a graph takes what the next larger
one takes, as that is what a server runs in its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from cast_sglang.costs.limits import Limits
from cast_sglang.ops import ops_for
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.drafting.verify_input import build_verify_input
from cast_sglang.serving.profiling.batches import Rows, SmallTree
from cast_sglang.serving.stats import StepStats
from cast_sglang.tree import DraftTree, Frontier

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.serving.drafting.base import Drafter, Layers
    from cast_sglang.serving.worker import CastWorker

__all__ = ["EngineMeter"]


class EngineMeter:
    """Times passes of one rank's `CastWorker`."""

    def __init__(self, worker: CastWorker) -> None:
        self.worker = worker
        self._batches: dict[tuple[int, int], Rows] = {}
        self._verify_result: Any = None
        self._sweep = torch.zeros(1 << 25, device=worker.device)  # 128 MiB, more than any cache
        worker.tools.backlog.clear()
        self._fill_slots()

    def limits(self) -> Limits:
        return self.limits_of(self.worker)

    @staticmethod
    def limits_of(worker: CastWorker) -> Limits:
        """Return the largest shapes that a worker may have to run."""
        return dataclasses.replace(worker.limits, max_tokens=worker.token_to_kv_pool_allocator.size)

    def verify(self, batch_size: int, context: int, rows: int) -> float:
        """Time `worker.verify`: forward pass, acceptance and moves of KV."""
        graphs = self.worker.verify_graphs
        if graphs is not None:
            rows = graphs.sizes.replayed(batch_size, rows)
        return self.verify_path(batch_size, context, rows, rows - 1)

    def verify_path(self, batch_size: int, context: int, rows: int, depth: int) -> float:
        """Time verify of so many rows, of which a path of `depth` nodes can be accepted."""
        batch = self._batch(batch_size, context)
        batch.spec_info = self._chain(batch, rows, depth)
        return self._time(lambda: self.worker.verify(batch))

    def draft(self, batch_size: int, context: int, width: int) -> float:
        """Time one layer in the middle of a tree: metadata, forward pass and best children.

        Of a drafter that takes one pass for all layers, time how a layer is taken into the tree.
        """
        from sglang.srt.speculative.eagle_worker_common import prepare_for_draft

        draft = self.worker.draft_worker
        batch = self._batch(batch_size, context)
        pool, steps = draft.req_to_token_pool, self.worker.speculative_num_steps
        forward_batch, _, _ = prepare_for_draft(
            batch.spec_info, pool, batch, None, draft.draft_runner, draft.topk, steps
        )
        if draft.drafter.takes_one_pass:
            with self._draft_context():
                draft.drafter.begin(batch, self.worker.clock, max(steps, 2))
            return self._layer_taken_in(draft.drafter, forward_batch, width)
        graphs = draft.drafter.graphs
        if graphs is not None and graphs.holds(batch_size):
            width = graphs.sizes.replayed(batch_size, width)
            return self._captured_layer(graphs.layers(forward_batch), forward_batch, width)
        slots = forward_batch.out_cache_loc.view(batch_size, steps, draft.topk)
        depth = max(1, steps // 2)
        path_slots = slots[:, :depth, :width].transpose(1, 2).contiguous()
        forward_batch.input_ids = torch.ones_like(path_slots[:, :, 0]).flatten()
        forward_batch.positions = (forward_batch.seq_lens + depth - 1).repeat_interleave(width)
        forward_batch.out_cache_loc = path_slots[:, :, -1].flatten()
        hidden_states = forward_batch.spec_info.hidden_states
        forward_batch.spec_info.hidden_states = hidden_states.repeat_interleave(width, dim=0)
        with self._draft_context():
            return self._time(lambda: draft.model.forward_layer(forward_batch, path_slots))

    def _layer_taken_in(self, drafter: Drafter, forward_batch: ForwardBatch, width: int) -> float:
        """Time a layer whose nodes are known: they are laid out and scored."""
        topk = self.worker.topk

        def best(probs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return tokens[:, :topk].contiguous(), probs[:, :topk].contiguous()

        children = best(*drafter.root(forward_batch.spec_info))
        tree = DraftTree(*children, 2, ops_for(self.worker.device))
        layers, frontier = drafter.layers(forward_batch), tree.frontier()
        return self._time(lambda: tree.grow(frontier, width, *best(*layers.run(frontier, width))))

    def _captured_layer(self, layers: Layers, forward_batch: ForwardBatch, width: int) -> float:
        """Time a layer that is replayed; its inputs are prepared while the host waits anyway."""
        children = forward_batch.spec_info.topk_p, forward_batch.spec_info.topk_index
        scores, tokens = (part[:, : self.worker.topk] for part in children)
        frontier = Frontier(scores, tokens, tokens, torch.zeros_like(tokens))
        layers.prepare(frontier)
        with self._draft_context():
            return self._time(lambda: layers.run(frontier, width))

    def draft_extend(self, batch_size: int, context: int, rows: int) -> float:
        """Time the draft model's pass over the rows that an accepted path can reach.

        With it goes what a drafter runs once for each tree.
        """
        graphs = self.worker.draft_worker.extend_graphs
        if graphs is not None:
            rows = graphs.sizes.replayed(batch_size, rows)
        batch = self._batch(batch_size, context)
        batch.out_cache_loc = self._slots(batch, context, rows)
        result = self._accepted(batch, rows)
        draft, steps = self.worker.draft_worker, self.worker.speculative_num_steps

        def run() -> None:
            draft.drafter.begin(batch, self.worker.clock, steps)
            draft._draft_extend_for_decode(batch, result)

        self._sweep.sum()  # as verify leaves nothing of the draft in the caches
        with self._draft_context():
            return self._time(run)

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

        # Synthetic outcomes teach nothing; learning takes its time all the same.
        learner = None if worker.calibration is None else Calibration(worker.reads)
        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (worker.tools.decider, "policy", SmallTree()),
                (worker, "cast_stats", StepStats()),
                (worker, "calibration", learner),
                (worker.tools, "calibration", learner),
                (worker.tools, "copies", None),
            ):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            passes = [(worker, "verify"), (draft, "_draft_extend_for_decode")]
            if worker.limits.max_width:  # there is a draft model
                passes.append((draft.model, "forward_layer"))
                if draft.drafter.takes_one_pass:
                    passes.append((draft.drafter, "begin"))
                if (graphs := draft.drafter.graphs) is not None:
                    passes.append((graphs, "run"))
            for owner, name in passes:
                setattr(owner, name, timed(getattr(owner, name)))
                stack.callback(delattr, owner, name)
            whole = self._time(lambda: worker.forward_batch_generation(batch))
        worker.discard_pending_steps()
        return max(whole - inside, 1e-7)

    def close(self) -> None:
        """Restore the request rows; the meter allocated no slots."""
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
        """Give every request row slots of its own; rows that exceed the pool share them."""
        table = self.worker.req_to_token_pool.req_to_token
        self._slots_before = table.clone()
        size, num_columns = self.worker.token_to_kv_pool_allocator.size, table.shape[1]
        columns = torch.arange(num_columns, dtype=torch.int64, device=table.device)
        # Row by row: at long contexts the table is large, and the cache has taken its share.
        for number, row in enumerate(table):
            row.copy_((columns + number * num_columns) % size + 1)

    def _batch(self, batch_size: int, context: int) -> ScheduleBatch:
        """Return a decode batch as the scheduler would hand it to the worker."""
        key = (batch_size, context)
        if key not in self._batches:
            self._batches[key] = Rows(self.worker, batch_size, context)
        return self._batches[key].batch()

    def _accepted(self, batch: ScheduleBatch, rows: int) -> Any:
        """Return what verify hands to draft extend after it accepted every row."""
        if self._verify_result is None:
            single = self._batch(1, self._shortest_context)
            single.spec_info = self._chain(single, 1, 0)
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
            # Those of the verify pass, which had another shape.
            prepared_draft_extend_inputs=None,
        )

    def _slots(self, batch: ScheduleBatch, context: int, rows: int) -> torch.Tensor:
        """Return [B * rows] cache slots that follow each request's context."""
        table = self.worker.req_to_token_pool.req_to_token
        return table[batch.req_pool_indices, context : context + rows].flatten().to(torch.int64)

    def _chain(self, batch: ScheduleBatch, rows: int, depth: int) -> Any:
        """Return a verify input of `rows` nodes in a line; only its shape decides the time.

        Args:
            depth: nodes of the longest path that can be accepted.
        """
        worker = self.worker
        if rows == 1:
            return worker._build_trivial_verify_input(batch)
        parent_rows = torch.arange(rows - 1, device=worker.device).repeat(len(batch.reqs), 1)
        return build_verify_input(
            batch,
            parent_rows,
            torch.ones_like(parent_rows),
            depth,
            topk=worker.topk,
            target_worker=worker.target_worker,
            device=worker.device,
        )
