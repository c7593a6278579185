"""Captured graphs of verify and draft extend, one set for each number of rows per request.

SGLang's own graph runners are built once per number of rows, as its adaptive mode builds them once
per number of steps. A step runs with the runner of its size, or eagerly where there is none. On
`triton` all runners of a pass share one attention backend, which keeps nothing that depends on the
number of rows but its buffers, and those are made for the largest; `backends.py` has the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.serving.host_patches.passes import (
    capturing_size,
    counted_capture,
    extend_rows,
    full_attention,
    keeping_buffers,
    leave_prefix_unmasked,
    plan_on_the_host,
    sharing_buffers,
)

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from cast_sglang.serving.graphs.backends import VerifyBackends

__all__ = ["PassGraphs", "capture_extend", "capture_verify"]


class PassGraphs:
    """SGLang's graph runners of one pass, by rows per request."""

    def __init__(self, sizes: GraphSizes) -> None:
        self.sizes = sizes
        self._runners: dict[int, Any] = {}

    def capture(
        self,
        build: Callable[[int], Any],
        capturing: Callable[[int, list[int]], contextlib.AbstractContextManager[None]],
        existing: dict[int, Any] | None = None,
    ) -> None:
        """Build a runner for each size, the largest first, so that the others share its memory.

        Args:
            build: captures and returns the runner of a size.
            capturing: prepares SGLang for the capture of a size at these batch sizes.
            existing: runners that SGLang has built already.
        """
        self._runners.update(existing or {})
        for size in reversed(self.sizes.sizes):
            if size not in self._runners:
                with capturing(size, self.sizes.batch_sizes(size)):
                    self._runners[size] = build(size)

    def runner(self, batch_size: int, size: int) -> Any | None:
        """Return the runner of a pass over `size` rows per request; None for an eager pass."""
        bucket = self.sizes.bucket(batch_size)
        if bucket is None or size not in self.sizes.at(bucket):
            return None
        return self._runners[size]


def capture_verify(runner: ModelRunner, sizes: GraphSizes, backends: VerifyBackends) -> PassGraphs:
    """Capture the target's pass at each size, and at the one row of a plain step.

    SGLang has captured the largest size by then, at every batch size.

    Args:
        runner: the target's.
    """
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

    every = {batch: (1, *sizes.at(batch)) for batch in sizes.all_batch_sizes}
    graphs = PassGraphs(GraphSizes(every))

    def build(size: int) -> Any:
        backend = backends.at(size)
        attention, shared = full_attention(backend), full_attention(backends.shared)
        buffers: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not backends.has_own_buffers(size):
            buffers = keeping_buffers(getattr(attention, "backend", attention))
        elif attention is not shared:
            buffers = sharing_buffers(attention, shared)
        with buffers:
            return DecodeCudaGraphRunner(
                runner, attn_backend=backend, speculative_num_draft_tokens=size
            )

    first = runner.decode_cuda_graph_runner
    existing = {first.captured_req_width: first}
    if backends.lays_out_one_size:  # whose buffers are made anew, with room behind the context
        first.backend.cleanup()
        existing = {}
    with counted_capture(runner, "target_verify", "verify, rows", graphs.sizes):
        graphs.capture(build, capturing_size, existing)
    leave_prefix_unmasked(backends.shared, backends.name)
    for size in graphs.sizes.sizes:
        plan_on_the_host(backends.at(size))
    return graphs


def capture_extend(
    runner: ModelRunner, backend: Any, sizes: GraphSizes, build: Callable[[], Any]
) -> PassGraphs:
    """Capture draft extend at each number of rows.

    Args:
        runner: the draft's.
        backend: its attention backend for draft extend.
        build: makes SGLang's graph runner of draft extend, which captures the size of the moment.
    """
    graphs = PassGraphs(sizes)
    max_batch_size = max(sizes.all_batch_sizes)
    backend.init_cuda_graph_state(max_batch_size, max_batch_size * max(sizes.sizes))

    @contextlib.contextmanager
    def capturing(size: int, batch_sizes: list[int]) -> Iterator[None]:
        with capturing_size(size, batch_sizes), extend_rows(backend, size):
            yield

    counted = counted_capture(runner, "draft_extend", "draft extend, rows", sizes)
    with counted, keeping_buffers(backend):
        graphs.capture(lambda size: build(), capturing)
    return graphs
