"""The draft side of a CAST step: grow the tree layer by layer, stop when it no longer pays.

SGLang's own `EagleDraftWorker` runs a fixed number of steps of a fixed width, each branch read as
a line. Here each layer has its own width, nodes attend to their true ancestors, any may be last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.speculative.draft_utils import DraftBackendFactory
from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import (
    EAGLEDraftExtendCudaGraphRunner,
)
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_worker_common import prepare_for_draft
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from cast_sglang.config import CastConfig
from cast_sglang.ops.copies import is_on_host, to_device
from cast_sglang.serving.drafting.attention import create_tree_backend
from cast_sglang.serving.drafting.catch_up import (
    NEXT_CHILDREN,
    catch_up_widths,
    past_of,
    without_children,
)
from cast_sglang.serving.drafting.draws import cut_links, num_proposed
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.grow import Growth, compile_ops, grow_tree
from cast_sglang.serving.drafting.model import DraftModel
from cast_sglang.serving.drafting.one_pass import one_pass_drafter
from cast_sglang.serving.drafting.verify_input import build_verify_input
from cast_sglang.serving.graphs.passes import capture_extend
from cast_sglang.serving.heads.registry import register_heads
from cast_sglang.serving.host_patches.passes import extend_rows, last_rows_only, packed_pass
from cast_sglang.serving.row_packing import find_packed_rows, first_columns, last_layer, last_rows
from cast_sglang.serving.step import Drafted, DraftShape

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from cast_sglang.costs.model import StepCosts
    from cast_sglang.serving.drafting.base import Drafter
    from cast_sglang.serving.drafting.tools import StepTools
    from cast_sglang.serving.graphs.passes import PassGraphs

__all__ = ["CastDraftWorker"]


class CastDraftWorker(EagleDraftWorker):
    """EAGLE's draft worker with CAST's tree."""

    tools: StepTools  # handed over by the worker of the target before graphs are captured
    model: DraftModel
    drafter: Drafter
    topk: int
    last_shape: DraftShape  # of the last step with a tree
    last_extend_rows: float  # of the last step, 0 where draft extend was put off

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        register_heads()
        super().__init__(server_args, gpu_id, nccl_port, target_worker)
        self.max_draft_tokens = self.speculative_num_draft_tokens
        self.extend_graphs: PassGraphs | None = None
        model = self.draft_runner.model
        # It can drop rows behind its attention; None for a model whose last layer cannot.
        self._last_layer = last_layer(model)
        # What drops rows that draft extend does not read: that layer, or a whole head.
        self._narrows = model if hasattr(model, "read_rows") else self._last_layer
        self._plain_input: EagleDraftInput | None = None  # a plain step's, while it runs
        self._no_children: EagleDraftInput | None = None  # of no request, after a prefill

    @contextlib.contextmanager
    def _proposing(self) -> Iterator[None]:
        """Let SGLang keep as many of the next root's children as are kept of other nodes."""
        topk, self.topk = self.topk, self.model.num_proposed
        try:
            yield
        finally:
            self.topk = topk

    def init_attention_backend(self) -> None:
        """Build the backend of the tree's layers and the one of draft extend."""
        self.draft_attn_backend = create_tree_backend(self.draft_runner, self.topk)
        factory = DraftBackendFactory(self.draft_runner, self.topk, self.speculative_num_steps)
        self.draft_extend_attn_backend = factory.create_draft_extend_backend()
        self.draft_runner.draft_attn_backend = self.draft_attn_backend
        if self.draft_extend_attn_backend is not None:
            self.draft_runner.attn_backend = self.draft_extend_attn_backend
        self.model = DraftModel(
            self.draft_runner,
            self.draft_attn_backend,
            self.topk,
            num_proposed(CastConfig.load(), self.draft_runner, self.topk),
            self.hot_token_id,
        )
        one_pass = one_pass_drafter(self.model)
        self.drafter = one_pass or EagleDrafter(self.model, self.speculative_num_steps)

    def _capture_cuda_graphs(self) -> None:
        # SGLang captures all draft steps as one graph, which cannot stop early.
        self.cuda_graph_runner = None
        self.cuda_graph_runner_for_draft_extend = None
        plan = self.tools.graph_plan
        if plan is None:
            return
        self.extend_graphs = capture_extend(
            self.draft_runner,
            self.draft_extend_attn_backend,
            plan.extend,
            lambda: EAGLEDraftExtendCudaGraphRunner(self),
        )
        if plan.widths is not None:
            self.drafter.capture(plan.widths)

    def layer_costs(self, costs: StepCosts) -> StepCosts:
        """Return the costs of a step with this server's drafter; see `base.Drafter`."""
        return self.drafter.layer_costs(costs)

    def compile_ops(self) -> None:
        """Run the tree's kernels at every shape they are compiled for."""
        compile_ops(
            self.model,
            self.tools.calibration,
            self.tools.draws,
            max_layers=self.speculative_num_steps,
            max_rows=self.max_draft_tokens,
            verify_sizes=self.tools.verify_sizes,
            num_grafts=0 if self.tools.copies is None else self.tools.verify_sizes[-1] - 1,
        )

    def draft(self, batch: ScheduleBatch) -> EagleVerifyInput:
        """Grow the batch's tree, choose what to verify and return the verify input.

        Args:
            batch: the decode batch; `batch.spec_info` is the `EagleDraftInput` of the last step.

        Effects: writes draft KV into slots past each request's committed length.
        """
        self.catch_up(batch)
        tools, copies = self.tools, self.tools.copies
        decider = tools.decider
        self.drafter.begin(batch, tools.clock, tools.room.max_layers)
        if copies is not None:
            whose = tools.weights, tools.draws.whose
            copies.begin_step(batch, *whose, tools.room.copy_depth, decider.least_scores())
        forward_batch, _, _ = prepare_for_draft(
            batch.spec_info,
            self.req_to_token_pool,
            batch,
            None,
            self.draft_runner,
            self.topk,
            self.speculative_num_steps,
        )
        tree, widths = grow_tree(self._growth(forward_batch))
        grafts = None if copies is None else copies.graft_into(tree)
        ranked = tree.ranked(tools.room.max_rows - 1)
        to_read = [ranked.scores]
        if tools.draws.is_drawn is not None:
            settled_scores = tree.settled_scores(*decider.settlement())
            ranked = tree.ranked_settled(settled_scores, tools.room.max_rows - 1)
            to_read.append(ranked.scores)
        num_draft_tokens, rows_with_nodes = decider.rows(*tools.reads.start(*to_read).wait())
        # On a device where all requests have N rows, SGLang's builder takes N nodes of each.
        num_rows = rows_with_nodes if tools.is_ragged else None
        may_stay = None if tools.draws.is_drawn is None else settled_scores
        if grafts is not None:
            num_draft_tokens, num_rows = grafts.fit(num_draft_tokens, num_rows, tools.is_ragged)
            rows_with_nodes = num_rows if tools.is_ragged else rows_with_nodes
            if may_stay is None and not tools.is_ragged:
                may_stay = tree.scores  # 0 for nodes that do not exist
        rows = None if num_rows is None else torch.from_numpy(num_rows)
        selection = tree.select(ranked, num_draft_tokens, rows)
        wants_drafts = None
        if tools.weights is not None:
            wants_drafts = to_device(tools.weights > 0.0, self.device)
        drafted = Drafted(tree, widths, selection, wants_drafts)
        if tools.calibration is not None:
            tools.calibration.on_drafted(drafted)
        if tools.recorder is not None:
            tools.recorder.on_drafted(drafted, None if copies is None else copies.traced())
        if copies is not None:
            copies.on_drafted(drafted)
        # The longest accepted path: no deeper than the tree, no longer than its nodes.
        deepest = max(tree.num_layers, 0 if grafts is None else grafts.depth)
        depth = min(deepest, num_draft_tokens - 1)
        self.last_shape = DraftShape(widths, num_draft_tokens, num_rows, depth)
        verify_input = build_verify_input(
            batch,
            selection.parent_rows,
            selection.draft_tokens,
            depth,
            topk=self.topk,
            target_worker=self.target_worker,
            device=self.device,
        )
        verify_input.num_rows, verify_input.rows_with_nodes = num_rows, rows_with_nodes
        verify_input.drawn = tools.draws.drawn(selection)
        siblings = verify_input.retrieve_next_sibling
        # Known for free where nothing is in flight. A node that is cut has a row all the same.
        verify_input.is_path = is_on_host(siblings) and bool((siblings < 0).all())
        if may_stay is not None and rows is None:
            cut_links(verify_input, selection.top_scores_index, may_stay)
        if wants_drafts is not None:
            # Nothing hangs below the root of a request that wants no drafts.
            verify_input.retrieve_next_token.masked_fill_(~wants_drafts.unsqueeze(1), -1)
        return verify_input

    def _growth(self, forward_batch: ForwardBatch) -> Growth:
        tools = self.tools
        return Growth(
            model=self.model,
            drafter=self.drafter,
            max_layers=self.speculative_num_steps,
            decider=tools.decider,
            calibration=tools.calibration,
            reads=tools.reads,
            clock=tools.clock,
            recorder=tools.recorder,
            room=tools.room,
            forward_batch=forward_batch,
            draws=tools.draws,
            copies=tools.copies,
        )

    @contextlib.contextmanager
    def plain_step(self, draft_input: EagleDraftInput) -> Iterator[None]:
        """Keep what the step inside would extend the draft by, instead of extending it.

        Args:
            draft_input: that of the step's batch.
        """
        self._plain_input = draft_input
        try:
            yield
        finally:
            self._plain_input = None

    def _draft_extend_for_prefill(
        self, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> EagleDraftInput:
        """Write draft KV for prompts and draft the first root's children.

        Nothing is drafted for requests whose prompts are left out, so any children do for them.
        """
        bonus_tokens = args[1]
        if self.tools.num_left_out and self._no_children is not None:
            return without_children(self._no_children, bonus_tokens)
        ending: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        # On a GPU the pass may be captured, in pieces or as a whole.
        is_eager = torch.device(self.device).type == "cpu" and not batch.forward_mode.is_idle()
        if is_eager and self._last_layer is not None:
            last = torch.tensor(batch.extend_lens).cumsum(0) - 1
            ending = last_rows_only(self.draft_runner.model.model.norm, self._last_layer, last)
        timed = self.tools.clock.time_prefill(sum(batch.extend_lens or ()))
        with ending, timed, self._proposing():
            draft_input = super()._draft_extend_for_prefill(batch, *args, **kwargs)
            self.drafter.extended(draft_input)
        self._no_children = without_children(draft_input, bonus_tokens[:0])
        return draft_input

    def _draft_extend_for_decode(
        self, batch: ScheduleBatch, batch_result: GenerationBatchResult, **kwargs: object
    ) -> None:
        """Write draft KV for the accepted tokens and draft the next root's children.

        After verify the accepted path stands at the front of each request's block, so only the
        columns that an accepted path can reach are run, not all verified nodes.
        """
        if self._plain_input is not None:
            self._defer(batch, batch_result, self._plain_input)
            return
        rows, packed_rows = batch_result.accept_index.shape[1], None
        self.last_extend_rows = rows
        if is_on_host(batch_result.accept_lens):
            rows = int(batch_result.accept_lens.max())
            self.last_extend_rows = rows
            if self.tools.is_ragged:
                packed_rows = find_packed_rows(batch_result.accept_lens, rows)
                self.last_extend_rows = float(batch_result.accept_lens.sum()) / len(batch.reqs)
        if self.extend_graphs is not None:
            # All columns that verify has run are there, so a size with a graph may take more.
            fitting = self.extend_graphs.sizes.fit(
                len(batch.reqs), rows, batch_result.speculative_num_draft_tokens
            )
            rows = max(rows, fitting or 0)
            self.last_extend_rows = rows
        with (
            self._width(rows, len(batch.reqs)),
            self.tools.clock.time("draft_extend", self.last_extend_rows),
            self._extending(batch_result.accept_lens, rows, packed_rows),
            self._proposing(),
        ):
            super()._draft_extend_for_decode(
                batch, first_columns(batch, batch_result, rows), **kwargs
            )
            self.drafter.extended(batch_result.next_draft_input)

    def _defer(
        self,
        batch: ScheduleBatch,
        batch_result: GenerationBatchResult,
        draft_input: EagleDraftInput,
    ) -> None:
        """Keep what the draft would be extended by, after a plain step."""
        hidden_states = batch_result.logits_output.hidden_states
        slots = batch.req_pool_indices_cpu.numpy()
        self.tools.backlog.add(slots, hidden_states, batch_result.next_token_ids)
        self.last_extend_rows = 0
        # The shape is right; catching up replaces the values before anything reads them.
        for name in NEXT_CHILDREN:
            setattr(batch_result.next_draft_input, name, getattr(draft_input, name))

    def catch_up(self, batch: ScheduleBatch) -> None:
        """Extend the draft by what plain steps have left undone.

        Args:
            batch: the decode batch; its `EagleDraftInput` gets the next roots' children.
        """
        backlog, slots = self.tools.backlog, batch.req_pool_indices_cpu.numpy()
        if not backlog.num_missing(slots):
            return
        missing = backlog.take(slots, self._catch_up_width(backlog.num_missing(slots), len(slots)))
        past = past_of(batch, missing, self.req_to_token_pool.req_to_token)
        packed_rows = None
        if self.tools.is_ragged:
            packed_rows = find_packed_rows(torch.from_numpy(missing.num_rows), past.width)
        with (
            self._width(past.width, len(batch.reqs)),
            self._extending(past.result.accept_lens, past.width, packed_rows),
            self._proposing(),
        ):
            super()._draft_extend_for_decode(past.batch, past.result)
            self.drafter.extended(past.result.next_draft_input)
        for name in NEXT_CHILDREN:
            now = getattr(past.result.next_draft_input, name)
            before = getattr(batch.spec_info, name)
            setattr(batch.spec_info, name, torch.where(past.is_missing.unsqueeze(1), now, before))

    def _catch_up_width(self, num_missing: int, batch_size: int) -> int:
        """Return how many rows to lay out for each request: a size that has run before, if it fits.

        Rows behind those that are missing write behind the requests' ends, so they need slots.
        """
        if self.extend_graphs is None:
            return num_missing
        most = num_missing + self.tools.room.max_rows
        for width in catch_up_widths(self.extend_graphs.sizes, batch_size, self.tools.backlog):
            if num_missing <= width <= most:
                return width
        return num_missing

    def _extending(
        self, num_rows: torch.Tensor, width: int, packed_rows: torch.Tensor | None
    ) -> contextlib.AbstractContextManager[None]:
        """Make draft extend run the packed rows, and only each request's last to its end.

        Args:
            num_rows: [B] int, rows of each request that hold something.
            width: rows laid out for each request.
            packed_rows: as of `packed_pass`.
        """
        if width == 1 or self.extend_graphs is not None:
            # Captured passes run as they were captured.
            return packed_pass(self.draft_runner, packed_rows)
        read_rows = last_rows(num_rows, width)
        return packed_pass(self.draft_runner, packed_rows, self._narrows, read_rows)

    @contextlib.contextmanager
    def _width(self, num_tokens: int, batch_size: int) -> Iterator[None]:
        """Make SGLang's code, which reads the server argument, see this step's width."""
        self.speculative_num_draft_tokens = num_tokens
        runner = None
        if self.extend_graphs is not None:
            runner = self.extend_graphs.runner(batch_size, num_tokens)
        self.cuda_graph_runner_for_draft_extend = runner
        try:
            backend = self.draft_extend_attn_backend
            with contextlib.nullcontext() if runner is None else extend_rows(backend, num_tokens):
                yield
        finally:
            self.speculative_num_draft_tokens = self.max_draft_tokens
            self.cuda_graph_runner_for_draft_extend = None
