"""SGLang's fixed EAGLE-3 trees, replayed over a trace."""

from typing import NamedTuple

import msgspec
import torch

from cast_sglang.policy.base import Costs, TreePolicy
from cast_sglang.trace.records import Trace, TraceHeader, packed, unpacked
from cast_sglang.trace.replay import Replay
from cast_sglang.trace.session import Session
from cast_sglang.trace.summary import Comparison, compare

__all__ = ["FIXED_TREES", "FixedTree", "Shape", "fits", "replay_fixed"]


class Shape(NamedTuple):
    """A fixed tree, in the words of SGLang's flags."""

    num_steps: int  # layers
    topk: int  # children of a node, and nodes expanded per layer
    num_draft_tokens: int  # verified nodes, root included

    def __str__(self) -> str:
        return f"{self.num_steps}-{self.topk}-{self.num_draft_tokens}"


# Chains of every length, and trees that people use.
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
    """Return whether a server of the trace's envelope could draft the tree."""
    envelope = (header.num_steps, header.topk, header.num_draft_tokens)
    return all(ours <= most for ours, most in zip(shape, envelope, strict=True))


def replay_fixed(session: Session, shape: Shape) -> list[Comparison]:
    """Replay a session's trace with one tree in all steps; rows as of `Session.replay`."""
    trace = narrowed(session.trace, shape.topk)
    replay = Replay(
        trace, session.profile, FixedTree(shape), correct=session.corrects, seed=session.seed
    )
    return compare(session.trace, list(replay))


def narrowed(trace: Trace, topk: int) -> Trace:
    """Return the trace as if a node had no more than its first `topk` children.

    The others get probability 0, so that they rank behind all that have one.
    """

    def cut(data: bytes) -> bytes:
        values = unpacked(data, "float32").reshape(-1, trace.header.topk)
        values[:, topk:] = 0.0
        return packed(values.ravel(), "float32")

    def narrow(request: msgspec.Struct) -> msgspec.Struct:
        parts = {"probs": cut(request.probs), "chances": cut(request.chances)}
        return msgspec.structs.replace(request, **parts)

    steps = [
        msgspec.structs.replace(step, requests=[narrow(one) for one in step.requests])
        for step in trace.steps
    ]
    return trace._replace(steps=steps)
