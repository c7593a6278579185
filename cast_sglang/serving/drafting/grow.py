"""Growing a step's tree layer by layer, until one more no longer pays."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from cast_sglang.ops import ops_for
from cast_sglang.serving.drafting.base import Layers
from cast_sglang.serving.drafting.layers import EagerLayers
from cast_sglang.tree import DraftTree

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.ops.contract import CalibrationLines
    from cast_sglang.serving.calibration import Calibration
    from cast_sglang.serving.drafting.worker import CastDraftWorker

__all__ = ["compile_ops", "grow_tree"]


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
    layers, max_layers = _layers(draft, forward_batch), draft.room.max_layers
    draft.reads.begin_step()
    scores = tree.frontier().scores
    read = draft.reads.start(scores)
    widths: list[int] = []

    while True:
        frontier, is_full = tree.frontier(), tree.num_layers == max_layers
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
            if may_try and draft.exploration is not None and costs is not None:
                batch_size, allowed = forward_batch.batch_size, range(1, draft.topk + 1)
                width = draft.exploration.explore("draft", batch_size, width, allowed, costs.draft)
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
