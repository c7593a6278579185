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
    draft, num_passes = worker.draft_worker, 0
    for batch_size in _batch_sizes(worker.limits.max_batch_size):
        # What depends on the depth does not depend on the batch.
        is_first = batch_size == 1
        for rows in _verify_sizes(worker, batch_size):
            deepest = min(worker.speculative_num_steps, rows - 1)
            for depth in range(1, deepest + 1) if is_first and rows > 1 else (deepest,):
                meter.verify_path(batch_size, CONTEXT, rows, depth)
                num_passes += 1
        if draft.extend_graphs is not None:
            sizes, backlog = draft.extend_graphs.sizes, worker.tools.backlog
            for rows in catch_up_widths(sizes, batch_size, backlog):
                meter.draft_extend(batch_size, CONTEXT, rows)
                num_passes += 1
    return num_passes


def _verify_sizes(worker: CastWorker, batch_size: int) -> tuple[int, ...]:
    """Return the rows per request that a verify pass of this batch may have, 1 among them."""
    graphs = worker.verify_graphs
    bucket = None if graphs is None else graphs.sizes.bucket(batch_size)
    if graphs is None or bucket is None:
        return (1, *worker.tools.verify_sizes)
    return graphs.sizes.at(bucket)


def _batch_sizes(most: int) -> list[int]:
    """Return batch sizes of which each power of two holds one."""
    return sorted({*(1 << power for power in range(most.bit_length())), most})
