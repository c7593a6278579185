"""Growing a step's tree layer by layer, until one more no longer pays."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch

from cast_sglang.ops import ops_for
from cast_sglang.tree import DraftTree

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.ops.contract import AcceptanceCurve
    from cast_sglang.policy.decider import Decider
    from cast_sglang.serving.calibration import Calibration
    from cast_sglang.serving.copies import Copies
    from cast_sglang.serving.drafting.base import Drafter
    from cast_sglang.serving.drafting.draws import Draws
    from cast_sglang.serving.drafting.model import DraftModel
    from cast_sglang.serving.host_reads import HostReads
    from cast_sglang.serving.pass_clock import PassClock
    from cast_sglang.serving.step_room import StepRoom
    from cast_sglang.serving.trace_recorder import TraceRecorder

__all__ = ["Growth", "compile_ops", "grow_tree"]


class Growth(NamedTuple):
    """What a step's tree is grown with."""

    model: DraftModel
    drafter: Drafter
    max_layers: int  # D, layers that a tree may have
    decider: Decider
    calibration: Calibration | None  # None for scores as the draft model states them
    reads: HostReads
    clock: PassClock
    recorder: TraceRecorder | None  # None without recording
    room: StepRoom  # of the step that runs
    forward_batch: ForwardBatch  # as SGLang prepares it; `spec_info` holds the root's children
    draws: Draws
    copies: Copies | None = None  # None where nothing is copied


def grow_tree(growth: Growth) -> tuple[DraftTree, tuple[int, ...]]:
    """Grow a step's tree until one more layer no longer pays.

    The host reads the scores of each layer and waits for nothing else. What the next layer needs
    whatever is decided is prepared before that. The layers of a chain whose length is planned are
    launched one behind the other; of those it waits for none.

    Returns:
        The tree, and the width of each layer below the root.
    """
    model, decider, calibration = growth.model, growth.decider, growth.calibration
    reads, recorder = growth.reads, growth.recorder
    spec_info = growth.forward_batch.spec_info
    draws = growth.draws
    probs, index = growth.drafter.root(spec_info)
    probs, tokens = draws.children(probs, model.to_target_vocab(index))
    curve = _curve(calibration, probs, 1)
    ops = ops_for(model.device)
    tree = DraftTree(tokens, probs, growth.max_layers, ops, curve, draws.is_drawn)
    if recorder is not None:
        recorder.on_layer(1, probs, probs if calibration is None else tree.scores)
    layers = growth.drafter.layers(growth.forward_batch)
    reads.begin_step()
    copies = growth.copies
    if copies is not None:
        copies.start()

    def shown() -> tuple[torch.Tensor, ...]:
        return () if copies is None else tree.newest

    scores = tree.frontier().scores
    read = reads.start(scores, *shown())
    widths: list[int] = []
    launched: list[torch.Tensor] = []  # of a planned chain, for `decider.launched`
    with_copies = None

    while True:
        frontier, most = tree.frontier(), decider.planned or growth.room.max_layers
        if tree.num_layers < most:
            layers.prepare(frontier)
        if decider.planned is None:
            above = scores
            scores, *parts = read.wait()
            with_copies = None if copies is None else copies.look(parts[-3:])
            if tree.num_layers > 1:
                decider.expanded(above, parts[0])
        width = decider.width(scores, with_copies)
        if width is None:
            if launched:
                decider.launched(reads.start(*launched))
            return tree, tuple(widths)

        # The time of growing the tree is part of the layer's: a layer that is not run saves both.
        with growth.clock.time("draft", width):
            probs, tokens = draws.children(*layers.run(frontier, width))
            curve = _curve(calibration, probs, tree.num_layers + 1)
            chances = tree.grow(frontier, width, tokens, probs, curve)
        if recorder is not None:
            recorder.on_layer(tree.num_layers, probs, chances)
        widths.append(width)
        if decider.planned is None:
            read = reads.start(tree.frontier().scores, chances, *shown())
        else:
            launched += (frontier.scores, chances)


def _curve(
    calibration: Calibration | None, probs: torch.Tensor, depth: int
) -> AcceptanceCurve | None:
    return None if calibration is None else calibration.curve_at(probs, depth)


def compile_ops(
    model: DraftModel,
    calibration: Calibration | None,
    draws: Draws,
    *,
    max_layers: int,
    max_rows: int,
    verify_sizes: tuple[int, ...],
    num_grafts: int = 0,
) -> None:
    """Run the tree's kernels once at every shape they are compiled for, before the first request.

    Shapes differ in the powers of two that hold the expanded nodes, the candidates and the
    selected nodes.

    Args:
        max_layers: D, layers that a tree may have.
        max_rows: rows verified per request at most, root included.
        verify_sizes: ascending values allowed for N.
        num_grafts: candidates that are grafted into a tree; 0 for none.
    """
    topk, device, ops = model.topk, model.device, ops_for(model.device)
    if calibration is not None:
        calibration.begin_step(torch.ones(1, device=device))
    draws.compile_ops(model.num_proposed)

    def children(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, topk)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        return tokens, torch.full(shape, 0.5, device=device)

    for narrow in range(1, topk + 1):
        tokens, probs = children(1)
        curve = _curve(calibration, probs, 1)
        tree = DraftTree(tokens, probs, max_layers, ops, curve)
        while True:
            for whole in [tree, *([_grafted(tree, num_grafts)] if num_grafts else [])]:
                ranked = whole.ranked(max_rows - 1)
                for size in verify_sizes:
                    if size <= ranked.scores.shape[1] + 1:
                        whole.select(ranked, size)
            if tree.num_layers == tree.max_layers:
                break
            width = narrow if tree.num_layers == 1 else topk
            tokens, probs = children(width)
            curve = _curve(calibration, probs, tree.num_layers + 1)
            tree.grow(tree.frontier(), width, tokens, probs, curve)


def _grafted(tree: DraftTree, num_grafts: int) -> DraftTree:
    """Return the tree of one request with as many more children of its root."""
    grafted, scores = copy.copy(tree), tree.scores
    tokens = torch.zeros((1, num_grafts), dtype=torch.int64, device=scores.device)
    grafted.graft(scores, tokens - 1, tokens, scores.new_zeros(1, num_grafts))
    return grafted
