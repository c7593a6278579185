"""The pass that brings the draft up to date: draft extend over rows of earlier, plain steps."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.eagle_info import EagleDraftInput

from cast_sglang.ops.copies import to_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.serving.drafting.backlog import Backlog, MissingRows

__all__ = ["NEXT_CHILDREN", "Past", "catch_up_widths", "past_of", "without_children"]

# Attributes of a draft input that hold the next root's children.
NEXT_CHILDREN = ("topk_p", "topk_index", "hidden_states")


class Past(NamedTuple):
    """What draft extend takes to run the rows that the draft lacks."""

    batch: ScheduleBatch  # as it was before those rows
    result: GenerationBatchResult  # as a verify pass would have left it
    width: int  # rows laid out for each request
    is_missing: torch.Tensor  # [B] bool on the device, requests whose draft lacks rows


def past_of(batch: ScheduleBatch, missing: MissingRows, req_to_token: torch.Tensor) -> Past:
    """Return the pass over the missing rows; the host waits for nothing.

    Args:
        batch: the decode batch, which stays as it is.
        req_to_token: [slots, tokens] int, the request pool's table.
    """
    device, width = req_to_token.device, len(missing.tokens) // len(batch.reqs)
    back = missing.num_rows * missing.is_missing
    num_rows, seen_rows = to_device(np.stack((missing.num_rows, back)), device)
    past = copy.copy(batch)
    past.seq_lens = batch.seq_lens - seen_rows
    if batch.seq_lens_cpu is not None:
        past.seq_lens_cpu = batch.seq_lens_cpu - torch.from_numpy(back)
        past.seq_lens_sum = int(past.seq_lens_cpu.sum())
    columns = past.seq_lens.unsqueeze(1) + torch.arange(width, device=device)
    places = req_to_token[batch.req_pool_indices.unsqueeze(1), columns]
    # Rows behind a request's end hold nothing, and its slots may end there too: SGLang's slot 0 is
    # for such rows.
    places = places.masked_fill(columns >= batch.seq_lens.unsqueeze(1), 0)
    past.out_cache_loc = places.flatten().to(torch.int64)
    result = GenerationBatchResult(
        logits_output=LogitsProcessorOutput(None, missing.hidden_states),
        next_token_ids=missing.tokens,
        accept_lens=num_rows.to(torch.int32),
        next_draft_input=EagleDraftInput(),
        speculative_num_draft_tokens=width,
    )
    return Past(past, result, width, seen_rows > 0)


def without_children(like: EagleDraftInput, bonus_tokens: torch.Tensor) -> EagleDraftInput:
    """Return what a prefill without the draft hands on: children that nothing reads.

    Args:
        like: what another prefill has handed on.
        bonus_tokens: [B] int, the requests' first tokens.
    """
    size = len(bonus_tokens)
    parts = {name: getattr(like, name) for name in NEXT_CHILDREN}
    return EagleDraftInput(
        **{name: part.new_zeros((size, *part.shape[1:])) for name, part in parts.items()},
        bonus_tokens=bonus_tokens,
        num_tokens_per_req=like.num_tokens_per_req,
        num_tokens_for_logprob_per_req=like.num_tokens_for_logprob_per_req,
    )


def catch_up_widths(sizes: GraphSizes, batch_size: int, backlog: Backlog) -> tuple[int, ...]:
    """Return the widths that a server with graphs of draft extend catches up in, ascending.

    SGLang's kernels beside the pass are compiled for its width, so these are few and all of them
    run at the start.

    Args:
        sizes: of draft extend that have a graph.
    """
    bucket = sizes.bucket(batch_size)
    captured = () if bucket is None else sizes.at(bucket)
    return (*(size for size in captured if size < backlog.capacity), backlog.capacity)
