"""Replay a trace with one fixed tree in all steps, as SGLang's own EAGLE-3 would serve it."""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from cast_sglang.costs.schema import CostTables
from cast_sglang.policy.base import Costs, TreePolicy
from cast_sglang.policy.turns import Shape
from cast_sglang.trace.records import Trace, TracedRequest, TraceHeader, packed, unpacked
from cast_sglang.trace.replay import Replay

__all__ = ["FIXED_TREES", "FixedTree", "fits", "replay_tree"]


# Chains of 1 to 8 layers, and trees that are in common use.
FIXED_TREES = (
    *(Shape(length, 1, length + 1) for length in range(1, 9)),
    Shape(2, 2, 4),
    Shape(3, 2, 4),
    Shape(4, 2, 6),
    Shape(5, 4, 8),
)


class FixedTree(TreePolicy):
    """Grows and verifies the same tree in every step."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._layers = 1  # of the tree that grows

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        return self._shape.topk

    def deepen(self) -> bool:
        deepens = self._layers < self._shape.num_steps
        self._layers += deepens
        return deepens

    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        self._layers = 1
        return min(self._shape.num_draft_tokens, scores.shape[1] + 1)


def fits(shape: Shape, header: TraceHeader) -> bool:
    """Return whether the tree fits into the envelope of the trace."""
    envelope = (header.num_steps, header.topk, header.num_draft_tokens)
    return all(ours <= most for ours, most in zip(shape, envelope, strict=True))


def replay_tree(trace: Trace, tables: CostTables, shape: Shape, **options: Any) -> Replay:
    """Replay a trace with one tree in all steps; `options` are keyword arguments of `Replay`."""
    return Replay(_narrowed(trace, shape.topk), tables, FixedTree(shape), **options)


def _narrowed(trace: Trace, topk: int) -> Trace:
    """Return the trace with only the first `topk` children of each node.

    The other children get probability 0, so that they rank behind all others.
    """

    def cut(data: bytes) -> bytes:
        values = unpacked(data, "float32").reshape(-1, trace.header.topk)
        values[:, topk:] = 0.0
        return packed(values.ravel(), "float32")

    def narrow(request: TracedRequest) -> TracedRequest:
        parts = {"probs": cut(request.probs), "chances": cut(request.chances)}
        return msgspec.structs.replace(request, **parts)

    steps = [
        msgspec.structs.replace(step, requests=[narrow(one) for one in step.requests])
        for step in trace.steps
    ]
    return trace._replace(steps=steps)
