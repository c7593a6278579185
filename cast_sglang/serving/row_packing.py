"""Requests of unequal numbers of rows in one pass.

SGLang lays a pass of verify or draft extend out with the same number of rows for every request.
Where the attention backend can, only the rows that hold something are run: the batch is packed
before the model and spread out again behind it, so all code around the model sees equal numbers.

Draft extend, and the draft's prefill, read the results of one row per request; the others are there
for their keys and values. So behind the attention of the draft's last layer only that row need go
on.
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

__all__ = [
    "ending_at",
    "first_columns",
    "kept_rows",
    "last_layer",
    "last_rows",
    "running_only",
    "runs_kept_rows",
]


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


def last_rows(num_rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return the flat places of the last row of each request.

    Args:
        num_rows: [B] int, in 1..width.
        width: rows laid out for each request.
    """
    starts = torch.arange(0, len(num_rows) * width, width, device=num_rows.device)
    return starts + num_rows - 1


def last_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the last decoder layer of an EAGLE-3 draft, None of a model with other layers."""
    from sglang.srt.models.llama_eagle3 import LlamaDecoderLayer

    layers = getattr(getattr(model, "model", None), "layers", None)
    layer = layers[-1] if layers else None
    return layer if isinstance(layer, LlamaDecoderLayer) else None


@contextlib.contextmanager
def _going_on_with(layer: Any, rows: torch.Tensor) -> Iterator[None]:
    """Let a decoder layer go on behind its attention with these of its rows alone."""
    hooks = (
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: (args[0][rows], *args[1:])
        ),
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: (args[0], args[1][rows], *args[2:])
        ),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _spread(rows: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return [num_rows, ...] with the rows in their places and zeros elsewhere."""
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, places, rows)


@contextlib.contextmanager
def ending_at(norm: torch.nn.Module, layer: torch.nn.Module, last: torch.Tensor) -> Iterator[None]:
    """Let a pass of a model end at some of its rows; what stands for the others is zero.

    Args:
        norm: the model's last norm, behind all layers.
        layer: its `last_layer`.
        last: [B] int64 places of the rows, ascending; the last one is the last row of the pass.
    """
    num_rows = int(last[-1]) + 1
    hook = norm.register_forward_hook(
        lambda _, args, normed: tuple(_spread(rows, last, num_rows) for rows in normed)
    )
    try:
        with _going_on_with(layer, last):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def running_only(
    runner: ModelRunner,
    kept: torch.Tensor | None,
    layer: torch.nn.Module | None = None,
    read: torch.Tensor | None = None,
) -> Iterator[None]:
    """Let the runner's next passes run only the kept rows; what they return has zeros elsewhere.

    Args:
        kept: flat places, ascending; None for all.
        layer: the model's last layer, to be run to its end only for the rows that are read; None
            for all that are kept.
        read: flat places among the kept, ascending; needed with a layer.
    """
    going_on: contextlib.AbstractContextManager[None]
    if layer is not None and read is not None:
        shown = read
        going_on = _going_on_with(layer, read if kept is None else torch.searchsorted(kept, read))
    elif kept is not None:
        shown, going_on = kept, contextlib.nullcontext()
    else:
        yield
        return
    forward = runner.forward

    def forward_kept(forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> Any:
        num_rows = forward_batch.input_ids.shape[0]
        spec_info = forward_batch.spec_info
        if kept is not None:
            for name in ("input_ids", "positions", "out_cache_loc"):
                setattr(forward_batch, name, getattr(forward_batch, name)[kept])
            if getattr(spec_info, "hidden_states", None) is not None:
                spec_info.hidden_states = spec_info.hidden_states[kept]
        output = forward(forward_batch, *args, **kwargs)
        logits_output = output.logits_output
        for name in ("next_token_logits", "hidden_states"):
            setattr(logits_output, name, _spread(getattr(logits_output, name), shown, num_rows))
        return output

    runner.forward = forward_kept
    if kept is not None:
        runner.attn_backend.kept_rows = kept
    try:
        with going_on:
            yield
    finally:
        del runner.forward
        if kept is not None:
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
