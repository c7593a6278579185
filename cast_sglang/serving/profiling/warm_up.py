"""Warm-up: a server on a device runs verify and draft extend at its sizes before the first request.

SGLang's kernels beside the passes are compiled for the number of rows, for the longest path that
can be accepted, and for the power of two that holds the batch. Without this the first step of each
kind would wait for the compiler.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from cast_sglang.serving.drafting.catch_up import catch_up_widths
from cast_sglang.serving.profiling.engine_meter import EngineMeter

if TYPE_CHECKING:
    from cast_sglang.serving.worker import CastWorker

__all__ = ["warm_up"]

logger = logging.getLogger(__name__)

CONTEXT = 1  # tokens of each request; no kernel is compiled for it


def warm_up(worker: CastWorker) -> None:
    """Run every kind of pass that a step with captured sizes may need.

    Call it on every rank before the scheduler serves its first request.

    Effects: the request pool's table and the worker's statistics are as before.
    """
    began = time.perf_counter()
    meter = EngineMeter(worker)
    try:
        num_passes = _run_all(worker, meter)
    finally:
        meter.close()
    logger.info("CAST: ran %d passes to warm up, %.1f s", num_passes, time.perf_counter() - began)


def _run_all(worker: CastWorker, meter: Any) -> int:
    num_passes, batch_sizes = 0, _batch_sizes(worker.limits.max_batch_size)
    sizes = {batch_size: _verify_sizes(worker, batch_size) for batch_size in batch_sizes}
    widths = {batch_size: _extend_widths(worker, batch_size) for batch_size in batch_sizes}
    # What depends on the rows and the depth does not depend on the batch.
    sizes[1] = tuple(sorted(set().union(*sizes.values())))
    has_draft = worker.limits.max_width > 0  # a chain of copies has one depth
    for batch_size in batch_sizes:
        has_depths = batch_size == 1 and has_draft
        for rows in sizes[batch_size]:
            longest = worker.limits.max_extend_rows or worker.speculative_num_steps + 1
            deepest = min(longest, rows) - 1
            for depth in range(1, deepest + 1) if has_depths and rows > 1 else (deepest,):
                meter.verify_path(batch_size, CONTEXT, rows, depth)
                num_passes += 1
        for width in widths[batch_size]:
            meter.draft_extend(batch_size, CONTEXT, width)
            num_passes += 1
    return num_passes


def _verify_sizes(worker: CastWorker, batch_size: int) -> tuple[int, ...]:
    """Return the rows per request that a verify pass of this batch may have, 1 among them."""
    graphs = worker.verify_graphs
    bucket = None if graphs is None else graphs.sizes.bucket(batch_size)
    if graphs is None or bucket is None:
        return (1, *worker.tools.verify_sizes)
    return graphs.sizes.at(bucket)


def _extend_widths(worker: CastWorker, batch_size: int) -> tuple[int, ...]:
    """Return the rows per request that draft extend of this batch may have."""
    if not worker.limits.max_width:  # there is no draft model
        return ()
    graphs, backlog = worker.draft_worker.extend_graphs, worker.tools.backlog
    captured = () if graphs is None else catch_up_widths(graphs.sizes, batch_size, backlog)
    if graphs is not None and graphs.sizes.bucket(batch_size) is not None:
        return captured
    # As many as an accepted path can have, and what catches up.
    most = worker.limits.max_extend_rows or worker.limits.max_verify_rows
    return tuple(sorted({*range(2, most + 1), *captured}))


def _batch_sizes(most: int) -> list[int]:
    """Return batch sizes of which each power of two holds one."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})
