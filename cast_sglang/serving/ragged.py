"""Requests of unequal numbers of rows in one pass.

SGLang lays a pass of verify or draft extend out with the same number of rows for every request.
Where the attention backend can, only the rows that hold something are run: the batch is packed
before the model and spread out again behind it, so all code around the model sees equal numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

__all__ = ["first_columns", "kept_rows", "running_only", "runs_kept_rows"]


def runs_kept_rows(runner: ModelRunner) -> bool:
    """Return whether the runner's attention backend can leave rows of a pass out."""
    return hasattr(runner.attn_backend, "kept_rows")


def kept_rows(num_rows: torch.Tensor, width: int) -> torch.Tensor | None:
    """Return the flat places of the first rows of each request; None where all are kept.

    Args:
        num_rows: [B] int, on the host, in 1..width.
        width: rows laid out for each request.
    """
    kept = torch.arange(width) < num_rows.unsqueeze(1)
    return None if bool(kept.all()) else kept.flatten().nonzero().squeeze(1)


@contextlib.contextmanager
def running_only(runner: ModelRunner, kept: torch.Tensor | None) -> Iterator[None]:
    """Let the runner's next passes run only the kept rows; what they return has zeros elsewhere."""
    if kept is None:
        yield
        return
    forward = runner.forward

    def forward_kept(forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> Any:
        num_rows = forward_batch.input_ids.shape[0]
        spec_info = forward_batch.spec_info
        for name in ("input_ids", "positions", "out_cache_loc"):
            setattr(forward_batch, name, getattr(forward_batch, name)[kept])
        if getattr(spec_info, "hidden_states", None) is not None:
            spec_info.hidden_states = spec_info.hidden_states[kept]
        output = forward(forward_batch, *args, **kwargs)
        logits_output = output.logits_output
        for name in ("next_token_logits", "hidden_states"):
            rows = getattr(logits_output, name)
            spread = rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, kept, rows)
            setattr(logits_output, name, spread)
        return output

    runner.forward, runner.attn_backend.kept_rows = forward_kept, kept
    try:
        yield
    finally:
        del runner.forward
        runner.attn_backend.kept_rows = None


def first_columns(
    batch: ScheduleBatch, result: GenerationBatchResult, columns: int
) -> GenerationBatchResult:
    """Return `result` with only the first `columns` nodes of each request's verified block.

    Effects: narrows `batch.out_cache_loc` likewise; `result` itself stays whole, since the
    scheduler still reads it.
    """
    width = result.speculative_num_draft_tokens
    if columns == width:
        return result

    def narrow(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, width, *x.shape[1:])[:, :columns].flatten(0, 1)

    batch.out_cache_loc = narrow(batch.out_cache_loc)
    return dataclasses.replace(
        result,
        next_token_ids=narrow(result.next_token_ids),
        logits_output=dataclasses.replace(
            result.logits_output, hidden_states=narrow(result.logits_output.hidden_states)
        ),
    )
