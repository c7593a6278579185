"""Requests of unequal numbers of rows in one pass.

SGLang lays a pass of verify or draft extend out with the same number of rows for every request.
Some of these rows hold nothing. An attention backend that can run without them gets a packed pass
(`host_patches.passes.packed_pass`): the batch is packed before the model and spread out again
behind it, so all code around the model sees equal numbers.

Draft extend and the draft's prefill read the results of one row per request. The other rows are
there for their keys and values, so behind the attention of the draft's last layer they are dropped.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.model_executor.model_runner import ModelRunner

__all__ = [
    "can_pack_rows",
    "find_packed_rows",
    "first_columns",
    "last_layer",
    "last_rows",
    "rows_with_nodes",
    "spread_rows",
]


def can_pack_rows(runner: ModelRunner) -> bool:
    """Return whether rows of a pass can be left out, by the attention backend and by adapters.

    SGLang lays adapters out for as many rows of every request.
    """
    return hasattr(runner.attn_backend, "packed_rows") and runner.lora_manager is None


def find_packed_rows(num_rows: torch.Tensor, width: int) -> torch.Tensor | None:
    """Return the flat places of the rows that hold something, [T] int64; None where all do.

    Args:
        num_rows: [B] int, on the host, in 1..width; the first rows of each request hold something.
        width: rows laid out for each request.
    """
    holds = torch.arange(width) < num_rows.unsqueeze(1)
    return None if bool(holds.all()) else holds.flatten().nonzero().squeeze(1)


def rows_with_nodes(batch: ScheduleBatch, rows: int, weights: np.ndarray | None) -> torch.Tensor:
    """Return how many rows of a verify pass hold the root or a draft, [B] int64 on the host.

    Args:
        batch: its `spec_info` is what the step verifies.
        rows: laid out for each request.
        weights: [B], 0 for a request whose drafts are not judged; None where all are.
    """
    counts: np.ndarray | None = getattr(batch.spec_info, "rows_with_nodes", None)
    if counts is None:
        counts = np.full(len(batch.reqs), rows)
    if weights is not None:
        counts = np.where(weights > 0.0, counts, 1)
    return torch.from_numpy(counts)


def last_rows(num_rows: torch.Tensor, width: int) -> torch.Tensor:
    """Return the flat places of the last row of each request, [B] int64.

    Args:
        num_rows: [B] int, in 1..width.
        width: rows laid out for each request.
    """
    starts = torch.arange(0, len(num_rows) * width, width, device=num_rows.device)
    return starts + num_rows - 1


def last_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the last decoder layer of an EAGLE-3 draft; None for one whose layers stay whole."""
    from sglang.srt.models.llama_eagle3 import LlamaDecoderLayer

    layers = getattr(getattr(model, "model", None), "layers", None)
    if hasattr(model, "read_rows"):  # of a head that hands on rows of all layers
        return None
    layer = layers[-1] if layers else None
    return layer if isinstance(layer, LlamaDecoderLayer) else None


def spread_rows(rows: torch.Tensor, places: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return [num_rows, ...] with the rows in their places and zeros elsewhere."""
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, places, rows)


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
        # What verify of a chain has prepared on a device lies at its own width.
        prepared_draft_extend_inputs=None,
    )
