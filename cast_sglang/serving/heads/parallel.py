"""A parallel head: an EAGLE-3 head of several layers that drafts behind masked slots.

A masked slot has no token and no state of the target. A learnt embedding and a learnt state, the
same for all of them, stand in. So a line of such slots behind the committed tokens drafts as many
tokens further ahead in one pass.

Source: "P-EAGLE: Parallel-Drafting EAGLE with Scalable Training" (arXiv 2602.01469).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
from torch import nn

__all__ = ["LlamaForCausalLMParallelEagle3"]


class LlamaForCausalLMParallelEagle3(LlamaForCausalLMEagle3):
    """An EAGLE-3 head whose slots are all masked where `spec_info.is_masked` says so."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        model = self.model
        model.mask_embed = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        model.mask_hidden = nn.Parameter(torch.zeros(model.fc.in_features), requires_grad=False)
        model.register_forward_pre_hook(_mask_slots)


def _mask_slots(model: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the model's pass with the learnt inputs in place of the batch's."""
    input_ids, positions, forward_batch, *_ = args
    if not getattr(forward_batch.spec_info, "is_masked", False):
        return args
    num_rows = input_ids.shape[0]
    forward_batch.spec_info.hidden_states = model.mask_hidden.repeat(num_rows, 1)
    return input_ids, positions, forward_batch, model.mask_embed.repeat(num_rows, 1)


EntryClass = [LlamaForCausalLMParallelEagle3]
