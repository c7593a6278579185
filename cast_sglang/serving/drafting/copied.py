"""The draft side of a step without a draft model: earlier text of the requests, proposed again.

Each request has one chain, what followed the longest known end of its text and so on. The host
finds it, so nothing runs on the device before verify.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution
from sglang.srt.runtime_context import get_device
from sglang.srt.speculative.base_spec_worker import EagleDraftWorkerBase
from sglang.srt.speculative.draft_parallel import resolve_draft_parallel_layout
from sglang.srt.speculative.eagle_info import EagleDraftInput

from cast_sglang.ops.copies import to_device
from cast_sglang.serving.drafting.verify_input import build_verify_input
from cast_sglang.serving.step import PLAIN_SHAPE, DraftShape

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from cast_sglang.costs.model import StepCosts
    from cast_sglang.serving.drafting.tools import StepTools

__all__ = ["CopyDraftWorker"]


class CopyDraftWorker(EagleDraftWorkerBase):
    """Stands where SGLang's draft worker stands, and has no model, no cache and no passes."""

    tools: StepTools  # handed over by the worker of the target before graphs are captured
    plain_input: Callable[[ScheduleBatch], EagleVerifyInput]  # handed over with it
    last_shape: DraftShape  # of the last step that looked for copies
    last_extend_rows = 0.0  # there is nothing to extend
    extend_graphs = None

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        super().__init__()
        self.target_worker = target_worker
        self.device = get_device().device
        layout = DraftParallelSpec(tp_execution=DraftTPExecution.TARGET_LAYOUT)
        self.parallel_layout = resolve_draft_parallel_layout(layout)

    @property
    def draft_runners(self) -> list[ModelRunner]:
        """No one's weights, graphs and caches."""
        return []

    def init_attention_backends(self) -> None:
        return

    def init_cuda_graphs(self) -> None:
        return

    def compile_ops(self) -> None:
        """Compile nothing: trees are made on the host."""

    def layer_costs(self, costs: StepCosts) -> StepCosts:
        """Return the costs as they are; see `base.Drafter`."""
        return costs

    def draft(self, batch: ScheduleBatch) -> EagleVerifyInput:
        """Look for copies and return what is verified of them, or the roots alone.

        Args:
            batch: the decode batch; `batch.spec_info` is the `EagleDraftInput` of the last step.
        """
        tools, copies, self.last_shape = self.tools, self.tools.copies, PLAIN_SHAPE
        if copies is None:  # where a step is timed without them
            return self.plain_input(batch)
        decider = tools.decider
        copies.begin_step(batch, tools.weights, None, tools.room.copy_depth, decider.least_scores())
        tools.reads.begin_step()
        copies.start()
        grafts = copies.look_at_text()
        most = min(tools.room.max_rows - 1, grafts.copied_scores.shape[1])
        scores = torch.from_numpy(grafts.copied_scores[:, :most])
        num_draft_tokens, num_rows = decider.rows_or_plain(scores)
        if num_draft_tokens > 1:
            num_draft_tokens, num_rows = grafts.fit(num_draft_tokens, num_rows, tools.is_ragged)
        selection = copies.verify_chains(num_draft_tokens)
        if num_draft_tokens == 1:
            return self.plain_input(batch)
        num_nodes = num_draft_tokens - 1
        self.last_shape = DraftShape((), num_draft_tokens, num_rows, min(num_nodes, grafts.depth))
        verify_input = build_verify_input(
            batch,
            to_device(selection.parent_rows.numpy(), self.device),
            to_device(selection.draft_tokens.numpy(), self.device),
            num_nodes,  # whatever is found, so that kernels are compiled for few depths
            topk=1,
            target_worker=self.target_worker,
            device=self.device,
        )
        verify_input.num_rows = num_rows
        found = 1 + np.minimum(grafts.counts, num_nodes)
        verify_input.rows_with_nodes = found if num_rows is None else num_rows
        return verify_input

    def draft_extend(self) -> None:
        """Extend nothing: SGLang's interface has this beside what it calls."""

    def catch_up(self, batch: ScheduleBatch) -> None:
        """Bring nothing up to date: no model has missed anything."""

    @contextlib.contextmanager
    def plain_step(self, draft_input: EagleDraftInput) -> Iterator[None]:
        """Keep nothing of the plain step inside."""
        yield

    def next_input(self, bonus_tokens: torch.Tensor) -> EagleDraftInput:
        """Return what the next step begins with, the roots' tokens: [B] int."""
        next_input = EagleDraftInput(bonus_tokens=bonus_tokens)
        next_input.num_tokens_per_req = next_input.num_tokens_for_logprob_per_req = 1
        self._fill(next_input)
        return next_input

    def _draft_extend_for_prefill(
        self,
        batch: ScheduleBatch,
        target_hidden_states: torch.Tensor | None,
        next_token_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> EagleDraftInput:
        return self.next_input(next_token_ids)

    def _draft_extend_for_decode(
        self, batch: ScheduleBatch, batch_result: GenerationBatchResult, **kwargs: object
    ) -> None:
        self._fill(batch_result.next_draft_input)

    def _fill(self, draft_input: EagleDraftInput) -> None:
        """Give a draft input no children, as SGLang takes batches apart and together by them."""
        draft_input.topk_p = torch.empty((len(draft_input.bonus_tokens), 0), device=self.device)
        draft_input.topk_index = draft_input.topk_p.to(torch.int64)
