"""One layer of the draft tree after another: where its inputs come from and how it is run.

`EagerLayers` prepares a layer when its width is known and launches its kernels one by one.
`captured_layers.CapturedLayers` prepares every node that could be kept while the host still waits
for the decision, so that behind the decision there is one launch.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import torch

from cast_sglang.ops import ops_for
from cast_sglang.tree import DraftTree

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.ops.contract import CalibrationLines
    from cast_sglang.serving.calibration import Calibration
    from cast_sglang.serving.drafting.worker import CastDraftWorker
    from cast_sglang.tree import Frontier

__all__ = ["EagerLayers", "Layers", "compile_ops", "grow_tree", "take_rows"]


class Layers(Protocol):
    """The layers of one step's tree, top down; layer 1, the root's children, is given."""

    def prepare(self, frontier: Frontier) -> None:
        """Take the newest layer's best nodes, before it is known how many of them are kept."""

    def fit(self, width: int) -> int:
        """Return the width to run for a width that was chosen; not smaller."""

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the draft model over the frontier's best nodes.

        Returns:
            probs [B * W, K] float32 and tokens [B * W, K] int64 of each node's best children.
        """


class EagerLayers:
    """Layers launched kernel by kernel.

    Args:
        forward_batch: the draft's batch, as SGLang prepares it; `out_cache_loc` holds a slot for
            each node of the envelope, request-major, and `spec_info` the roots' hidden states.
    """

    def __init__(self, draft: CastDraftWorker, forward_batch: ForwardBatch) -> None:
        self._draft, self._forward_batch = draft, forward_batch
        batch_size = forward_batch.batch_size
        # [B, D * K] cache slots: layer i of the tree owns columns (i - 1) * K onwards.
        self._slots = forward_batch.out_cache_loc.view(batch_size, -1)
        # [B, W of the layer above, H] and [B, W of the layer above, depth].
        self._hidden_states = forward_batch.spec_info.hidden_states.unsqueeze(1)
        self._path_slots = self._slots.new_empty((batch_size, 1, 0))

    def prepare(self, frontier: Frontier) -> None:
        return

    def fit(self, width: int) -> int:
        return width

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        draft, forward_batch = self._draft, self._forward_batch
        depth, batch_size = self._path_slots.shape[2], len(frontier.tokens)
        first = depth * draft.topk
        own = self._slots[:, first : first + width]
        if depth == 0:  # all children of the root, which has no slot here
            self._path_slots = own.unsqueeze(2)
            hidden_states = self._hidden_states.expand(-1, width, -1)
        else:
            parents = frontier.parents[:, :width]
            path_slots = take_rows(self._path_slots, parents)
            self._path_slots = torch.cat((path_slots, own.unsqueeze(2)), dim=2)
            hidden_states = take_rows(self._hidden_states, parents)
        forward_batch.input_ids = frontier.tokens[:, :width].flatten()
        positions = (forward_batch.seq_lens + depth).unsqueeze(1)
        forward_batch.positions = positions.expand(-1, width).flatten()
        forward_batch.out_cache_loc = own.flatten()
        forward_batch.spec_info.hidden_states = hidden_states.flatten(0, 1)
        probs, tokens, hidden_states = draft.forward_layer(forward_batch, self._path_slots)
        self._hidden_states = hidden_states.view(batch_size, width, -1)
        return probs, tokens


def grow_tree(
    draft: CastDraftWorker, forward_batch: ForwardBatch
) -> tuple[DraftTree, tuple[int, ...], float]:
    """Grow a step's tree until one more layer no longer pays.

    The host reads the scores of each layer and waits for nothing else; what the next layer needs
    whatever is decided is prepared before that.

    Args:
        forward_batch: the draft's batch, as SGLang prepares it; `spec_info` holds the root's
            children.

    Returns:
        The tree, the width of each layer below the root, and the host's seconds of deciding:
        calibration included; scoring and ranking, which every tree needs, not.
    """
    spec_info, policy, costs = forward_batch.spec_info, draft.policy, draft.costs
    probs = spec_info.topk_p
    tokens = draft.to_target_vocab(spec_info.topk_index)
    began = time.perf_counter()
    lines = _lines(draft.calibration, probs, 1)
    policy_seconds = time.perf_counter() - began
    tree = DraftTree(tokens, probs, draft.speculative_num_steps, ops_for(draft.device), lines)
    if draft.tracer is not None:
        draft.tracer.drafted(1, probs, tree.scores)
    layers = _layers(draft, forward_batch)
    draft.reads.begin_step()
    scores = tree.frontier().scores
    read = draft.reads.start(scores)
    widths: list[int] = []

    while True:
        frontier, is_full = tree.frontier(), tree.num_layers == tree.max_layers
        if not is_full:
            layers.prepare(frontier)
        above = scores
        scores, *grown = read.wait()
        began = time.perf_counter()
        if grown:
            policy.expanded(above, *grown)
        grows = not is_full
        if not is_full:
            width = policy.breadth(scores, costs)
            grows = policy.deepen()
            # In the first layer alone: what a width takes does not depend on the layer.
            may_try = grows and tree.num_layers == 1 and draft.clock.is_timing
            if may_try and draft.residuals is not None and costs is not None:
                batch_size, allowed = forward_batch.batch_size, range(1, draft.topk + 1)
                width = draft.residuals.explore("draft", batch_size, width, allowed, costs.draft)
        policy_seconds += time.perf_counter() - began
        if not grows:
            return tree, tuple(widths), policy_seconds

        width = layers.fit(width)
        # With what it takes to grow the tree by it, as a layer that is not run saves that too.
        with draft.clock.time("draft", width):
            probs, tokens = layers.run(frontier, width)
            began = time.perf_counter()
            lines = _lines(draft.calibration, probs, tree.num_layers + 1)
            policy_seconds += time.perf_counter() - began
            chances = tree.grow(frontier, width, tokens, probs, lines)
        if draft.tracer is not None:
            draft.tracer.drafted(tree.num_layers, probs, chances)
        widths.append(width)
        read = draft.reads.start(tree.frontier().scores, chances)


def _layers(draft: CastDraftWorker, forward_batch: ForwardBatch) -> Layers:
    """Return how the step's layers are run: captured where there are graphs for the batch."""
    graphs = draft.layer_graphs
    if graphs is not None and graphs.holds(forward_batch.batch_size):
        return graphs.layers(forward_batch)
    return EagerLayers(draft, forward_batch)


def _lines(
    calibration: Calibration | None, probs: torch.Tensor, depth: int
) -> CalibrationLines | None:
    return None if calibration is None else calibration.lines(probs, depth)


def compile_ops(draft: CastDraftWorker) -> None:
    """Run the tree's kernels once at every shape they are compiled for, before the first request.

    Shapes differ in the powers of two that hold the expanded nodes, the candidates and the
    selected nodes.
    """
    topk, device, ops = draft.topk, draft.device, ops_for(draft.device)

    def children(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, topk)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        return tokens, torch.full(shape, 0.5, device=device)

    for narrow in range(1, topk + 1):
        tokens, probs = children(1)
        lines = _lines(draft.calibration, probs, 1)
        tree = DraftTree(tokens, probs, draft.speculative_num_steps, ops, lines)
        while True:
            ranked = tree.ranked(draft.max_draft_tokens - 1)
            for size in draft.verify_sizes:
                if size <= ranked.scores.shape[1] + 1:
                    tree.select(ranked, size)
            if tree.num_layers == tree.max_layers:
                break
            width = narrow if tree.num_layers == 1 else topk
            tokens, probs = children(width)
            lines = _lines(draft.calibration, probs, tree.num_layers + 1)
            tree.grow(tree.frontier(), width, tokens, probs, lines)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gather `x[b, rows[b, w]]`: x [B, R, ...], rows [B, W] -> [B, W, ...]."""
    batch_size, num_rows = x.shape[:2]
    if batch_size > 1:
        rows = rows + torch.arange(0, batch_size * num_rows, num_rows, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(batch_size, -1, *x.shape[2:])
