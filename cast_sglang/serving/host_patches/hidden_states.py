"""The hidden states that requests ask for: plain decoding's, not those that the draft reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import get_server_return_hidden_states_mode

from cast_sglang.serving.host_patches.hooks import is_cast

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult

__all__ = ["handing_out_plain_states", "keep_last_states"]

Forward = Callable[..., "GenerationBatchResult"]


def keep_last_states(
    original: Callable[..., torch.Tensor | None],
    processor: Any,
    hidden_states: torch.Tensor,
    aux_hidden_states: Any,
    metadata: Any,
) -> torch.Tensor | None:
    """Keep the last layer's states beside those of the layers that the draft reads.

    Around SGLang's `LogitsProcessor._get_last_hidden_states_to_store`.
    """
    is_read = aux_hidden_states is not None and metadata.capture_hidden_mode.is_full()
    if is_read and is_cast() and get_server_return_hidden_states_mode().is_full():
        return hidden_states
    return original(processor, hidden_states, aux_hidden_states, metadata)


def handing_out_plain_states(forward: Forward) -> Forward:
    """Let the results of a worker's passes hold the hidden states of plain decoding.

    Those that the draft reads have been read by then. SGLang moves the rows of an accepted path to
    the front of its request's rows; here the same is done to the last states.
    """

    @functools.wraps(forward)
    def forward_and_hand_out(
        worker: Any, batch: ScheduleBatch, *args: Any, **kwargs: Any
    ) -> GenerationBatchResult:
        result = forward(worker, batch, *args, **kwargs)
        if not batch.return_hidden_states:
            return result
        states = result.logits_output.last_hidden_states
        if states is not None:  # else the draft reads the same ones
            if result.accept_index is not None and len(result.accept_index):
                rows = result.speculative_num_draft_tokens
                front = states[result.accept_index[:, :rows].clamp(min=0).long()]
                room = (0, 0, 0, rows - front.shape[1])
                states = torch.nn.functional.pad(front, room).flatten(0, 1)
            result.logits_output.hidden_states = states
        return result

    return forward_and_hand_out
