"""The draft side of a CAST step: grow the tree layer by layer, stop when it no longer pays.

SGLang's own `EagleDraftWorker` runs a fixed number of steps of a fixed width over attention
backends that read each branch's cache as one line. Here every layer has its own width, a node
attends to its true ancestors, and the loop may stop after any layer.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.draft_utils import DraftBackendFactory
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec
from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input, prepare_for_draft
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker
from sglang.srt.speculative.spec_utils import renorm_draft_probs
from sglang.srt.utils.common import fast_topk

from cast_sglang.serving.drafting.attention import create_tree_backend
from cast_sglang.serving.drafting.captured_layers import capture_layers
from cast_sglang.serving.drafting.grow import grow_tree
from cast_sglang.serving.graphs.passes import capture_extend
from cast_sglang.serving.host_patches.passes import extend_rows, last_rows_only, packed_pass
from cast_sglang.serving.row_packing import (
    find_packed_rows,
    first_columns,
    last_layer,
    last_rows,
)
from cast_sglang.serving.step import DraftShape

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from cast_sglang.costs.correction import Residuals
    from cast_sglang.costs.model import StepCosts
    from cast_sglang.policy.base import TreePolicy
    from cast_sglang.serving.calibration import Calibration
    from cast_sglang.serving.drafting.backlog import Backlog
    from cast_sglang.serving.drafting.captured_layers import LayerGraphs
    from cast_sglang.serving.graphs.passes import PassGraphs
    from cast_sglang.serving.graphs.plan import GraphPlan
    from cast_sglang.serving.host_reads import HostReads
    from cast_sglang.serving.pass_clock import PassClock
    from cast_sglang.serving.step_room import StepRoom
    from cast_sglang.serving.trace_recorder import Tracer


# What a draft input says of the next root's children.
_NEXT_CHILDREN = ("topk_p", "topk_index", "hidden_states")


class CastDraftWorker(EagleDraftWorker):
    """EAGLE's draft worker with CAST's tree; what it decides with comes from its owner."""

    policy: TreePolicy
    calibration: Calibration | None  # None for scores as the draft model states them
    costs: StepCosts | None  # of the step that runs; None for a policy that needs none
    residuals: Residuals | None  # None without correction
    verify_sizes: tuple[int, ...]
    room: StepRoom  # of the step that runs
    clock: PassClock
    tracer: Tracer | None  # None without recording
    reads: HostReads
    graph_plan: GraphPlan | None  # None where all passes are launched kernel by kernel
    layer_graphs: LayerGraphs | None
    extend_graphs: PassGraphs | None
    weights: np.ndarray | None  # [B], what the tokens of the step's requests are worth
    is_ragged: bool  # the target and the draft run requests of unequal numbers of rows
    last_layer: torch.nn.Module | None  # can go on with one row per request; None if it cannot
    shares_out: bool  # one budget of verified nodes for the batch
    backlog: Backlog
    deferring: EagleDraftInput | None  # in a plain step, what it began with
    last_shape: DraftShape
    last_extend_rows: float

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        super().__init__(server_args, gpu_id, nccl_port, target_worker)
        self.max_draft_tokens = self.speculative_num_draft_tokens
        self.layer_graphs = self.extend_graphs = self.graph_plan = None
        self.last_layer = last_layer(self.draft_runner.model)

    def init_attention_backend(self) -> None:
        """Build the backend of the tree's layers and the one of draft extend."""
        self.draft_attn_backend = create_tree_backend(self.draft_runner, self.topk)
        factory = DraftBackendFactory(self.draft_runner, self.topk, self.speculative_num_steps)
        self.draft_extend_attn_backend = factory.create_draft_extend_backend()
        self.draft_runner.draft_attn_backend = self.draft_attn_backend
        if self.draft_extend_attn_backend is not None:
            self.draft_runner.attn_backend = self.draft_extend_attn_backend

    def _capture_cuda_graphs(self) -> None:
        # SGLang captures all draft steps as one graph, which cannot stop early.
        self.cuda_graph_runner = None
        self.cuda_graph_runner_for_draft_extend = None
        plan = self.graph_plan
        if plan is None:
            return
        self.extend_graphs = capture_extend(self, plan.extend)
        if plan.widths is not None:
            self.layer_graphs = capture_layers(self, plan.widths)
            # Nothing of a captured layer is sized by the host, so it need not wait for lengths.
            self.draft_attn_backend.needs_cpu_seq_lens = False

    def draft(self, batch: ScheduleBatch) -> EagleVerifyInput:
        """Grow the batch's tree, choose what to verify and return the verify input.

        Args:
            batch: the decode batch; `batch.spec_info` is the `EagleDraftInput` of the last step.

        Effects: writes draft KV into slots past each request's committed length.
        """
        self.catch_up(batch)
        draft_input = batch.spec_info
        forward_batch, _, _ = prepare_for_draft(
            draft_input,
            self.req_to_token_pool,
            batch,
            None,
            self.draft_runner,
            self.topk,
            self.speculative_num_steps,
        )
        tree, widths, policy_seconds = grow_tree(self, forward_batch)

        began = time.perf_counter()
        num_layers = self.policy.depth(tree.num_layers, self.costs)
        policy_seconds += time.perf_counter() - began
        widths = widths[: num_layers - 1]
        ranked = tree.ranked(self.room.max_rows - 1, num_layers)
        (scores,) = self.reads.start(ranked.scores).wait()
        began = time.perf_counter()
        num_draft_tokens, num_rows = self._rows_to_verify(scores)
        policy_seconds += time.perf_counter() - began
        selection = tree.select(
            ranked, num_draft_tokens, None if num_rows is None else torch.from_numpy(num_rows)
        )
        wanted = None
        if self.weights is not None:
            wanted = torch.from_numpy(self.weights > 0.0).to(self.device)
        if self.calibration is not None:
            began = time.perf_counter()
            self.calibration.selected(selection, widths, self.topk, wanted)
            policy_seconds += time.perf_counter() - began
        if self.tracer is not None:
            self.tracer.selected(tree, num_layers, selection)
        self.last_shape = DraftShape(widths, num_draft_tokens, num_rows, policy_seconds)
        verify_input = build_eagle_verify_input(
            batch,
            draft_input,
            selection.parent_list,
            selection.top_scores_index,
            selection.draft_tokens,
            None,
            target_worker=self.target_worker,
            topk=self.topk,
            num_steps=tree.num_layers,
            num_draft_tokens=num_draft_tokens,
            tree_mask_mode=self.tree_mask_mode,
            device=self.device,
        )
        # The longest accepted path: no deeper than the tree, no longer than its nodes.
        verify_input.spec_steps = min(num_layers, num_draft_tokens - 1)
        verify_input.num_rows = num_rows
        siblings = verify_input.retrieve_next_sibling
        # Known for free where nothing is in flight.
        verify_input.is_path = siblings.device.type == "cpu" and bool((siblings < 0).all())
        if wanted is not None:
            # Nothing hangs below the root of a request that wants no drafts.
            verify_input.retrieve_next_token.masked_fill_(~wanted.unsqueeze(1), -1)
        return verify_input

    def _rows_to_verify(self, scores: torch.Tensor) -> tuple[int, np.ndarray | None]:
        """Return N, and the rows of each request where they differ.

        Args:
            scores: [B, n] float32, on the host, as for `TreePolicy.rerank`.
        """
        num_rows = self.policy.share_out(scores, self.costs) if self.shares_out else None
        if num_rows is None:
            size = min(self.policy.rerank(scores, self.costs), scores.shape[1] + 1)
        else:
            size = math.ceil(num_rows.mean())
        if self.residuals is not None and self.costs is not None and self.clock.is_timing:
            num_sizes = bisect.bisect_right(self.verify_sizes, scores.shape[1] + 1)
            sizes = self.verify_sizes[:num_sizes] or (size,)
            explored = self.residuals.explore("verify", len(scores), size, sizes, self.costs.verify)
            if explored != size:
                size, num_rows = explored, None
        if num_rows is None and self.graph_plan is not None:
            fitting = self.graph_plan.verify.fit(len(scores), size, scores.shape[1] + 1)
            size = size if fitting is None else fitting
        if num_rows is None and self.is_ragged and self.weights is not None:
            num_rows = np.where(self.weights > 0.0, size, 1)
        if num_rows is None or num_rows.min() == num_rows.max():
            return size, None
        return int(num_rows.max()), num_rows

    def forward_layer(
        self, forward_batch: ForwardBatch, path_slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the draft model over one layer of the tree.

        Args:
            forward_batch: holds the layer's input ids, positions and write slots, [B * W] each.
            path_slots: [B, W, depth] int64, cache slots from a node's topmost ancestor to itself.

        Returns:
            probs [B * W, K] float32 and tokens [B * W, K] int64 of each node's best children, and
            hidden_states [B * W, H].
        """
        self.draft_attn_backend.init_tree_metadata(forward_batch, path_slots)
        return self.forward_nodes(forward_batch)

    def forward_nodes(
        self, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the draft model over nodes whose attention is set up; see `forward_layer`."""
        with forward_context(
            ForwardContext(attn_backend=self.draft_attn_backend), forward_batch=forward_batch
        ):
            forward_batch.mark_forward_metadata_ready()
            output = self.draft_runner.forward(forward_batch).logits_output
        probs = renorm_draft_probs(output.next_token_logits, forward_batch.sampling_info, False)
        top_probs, top_index = fast_topk(probs, self.topk, dim=-1)
        return top_probs, self.to_target_vocab(top_index), output.hidden_states

    def to_target_vocab(self, index: torch.Tensor) -> torch.Tensor:
        return index if self.hot_token_id is None else self.hot_token_id[index]

    def _draft_extend_for_prefill(
        self, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> EagleDraftInput:
        """Write draft KV for prompts and draft the first root's children."""
        ending: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        # On a GPU the pass may be captured, in pieces or as a whole.
        is_eager = torch.device(self.device).type == "cpu" and not batch.forward_mode.is_idle()
        if is_eager and self.last_layer is not None:
            last = torch.tensor(batch.extend_lens).cumsum(0) - 1
            ending = last_rows_only(self.draft_runner.model.model.norm, self.last_layer, last)
        with ending:
            return super()._draft_extend_for_prefill(batch, *args, **kwargs)

    def _draft_extend_for_decode(
        self, batch: ScheduleBatch, batch_result: GenerationBatchResult, **kwargs: object
    ) -> None:
        """Write draft KV for the accepted tokens and draft the next root's children.

        After verify the accepted path stands at the front of each request's block, so only the
        columns that an accepted path can reach are run, not all verified nodes.
        """
        if self.deferring is not None:
            self._defer(batch, batch_result)
            return
        rows, packed_rows = batch_result.accept_index.shape[1], None
        self.last_extend_rows = rows
        if batch_result.accept_lens.device.type == "cpu":  # free where nothing is in flight
            rows = int(batch_result.accept_lens.max())
            self.last_extend_rows = rows
            if self.is_ragged:
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
            self.clock.time("draft_extend", self.last_extend_rows),
            self._extending(batch_result.accept_lens, rows, packed_rows),
        ):
            super()._draft_extend_for_decode(
                batch, first_columns(batch, batch_result, rows), **kwargs
            )

    def _defer(self, batch: ScheduleBatch, batch_result: GenerationBatchResult) -> None:
        """Keep what the draft would be extended by, after a plain step."""
        hidden_states = batch_result.logits_output.hidden_states
        slots = batch.req_pool_indices_cpu.numpy()
        self.backlog.add(slots, hidden_states, batch_result.next_token_ids)
        self.last_extend_rows = 0
        # Of the right shape; what it says is replaced before it is read.
        for name in _NEXT_CHILDREN:
            setattr(batch_result.next_draft_input, name, getattr(self.deferring, name))

    def catch_up(self, batch: ScheduleBatch) -> None:
        """Extend the draft by what plain steps have left undone.

        Args:
            batch: the decode batch; its `EagleDraftInput` gets the next roots' children.
        """
        slots = batch.req_pool_indices_cpu.numpy()
        if not self.backlog.num_missing(slots):
            return
        missing = self.backlog.take(slots)
        num_rows = torch.from_numpy(missing.num_rows)
        width = len(missing.tokens) // len(batch.reqs)
        # A request that lacks nothing writes behind its end, where the next step writes anyway.
        is_missing = torch.from_numpy(missing.is_missing)
        back = num_rows * is_missing
        past = copy.copy(batch)
        past.seq_lens = batch.seq_lens - back.to(self.device)
        if batch.seq_lens_cpu is not None:
            past.seq_lens_cpu = batch.seq_lens_cpu - back
            past.seq_lens_sum = int(past.seq_lens_cpu.sum())
        columns = past.seq_lens.unsqueeze(1) + torch.arange(width, device=self.device)
        table = self.req_to_token_pool.req_to_token
        places = table[batch.req_pool_indices.unsqueeze(1), columns]
        past.out_cache_loc = places.flatten().to(torch.int64)
        result = GenerationBatchResult(
            logits_output=LogitsProcessorOutput(None, missing.hidden_states),
            next_token_ids=missing.tokens,
            accept_lens=num_rows.to(self.device, torch.int32),
            next_draft_input=EagleDraftInput(),
            speculative_num_draft_tokens=width,
        )
        packed_rows = find_packed_rows(num_rows, width) if self.is_ragged else None
        with (
            self._width(width, len(batch.reqs)),
            self._extending(result.accept_lens, width, packed_rows),
        ):
            super()._draft_extend_for_decode(past, result)
        for name in _NEXT_CHILDREN:
            now, before = getattr(result.next_draft_input, name), getattr(batch.spec_info, name)
            took = is_missing.to(self.device).unsqueeze(1)
            setattr(batch.spec_info, name, torch.where(took, now, before))

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
        return packed_pass(self.draft_runner, packed_rows, self.last_layer, read_rows)

    @contextlib.contextmanager
    def _width(self, num_tokens: int, batch_size: int) -> Iterator[None]:
        """Let SGLang's code, which reads the server argument, see this step's width."""
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

    def recurrent_hidden_states(self) -> tuple[int, torch.dtype]:
        """Return size and type of the hidden states that one layer hands to the next."""
        size, dtype = get_draft_recurrent_hidden_state_spec(self.draft_runner)
        assert size is not None and dtype is not None
        return size, dtype
