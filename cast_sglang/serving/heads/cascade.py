"""A cascade head: decoder layers in series, each of which drafts a token further ahead.

Its first layer reads the embedding of the newest token and the fused states of the target side by
side, as EAGLE-3's does; each further layer reads the layer before. Behind every layer stand the
same norm and the target's LM head. So one pass over the committed tokens, which draft extend runs
anyway, drafts as many tokens as there are layers, and no drafted token is fed back.

Source: Huang et al., "FastEagle: Cascaded Drafting for Accelerating Speculative Decoding" (arXiv
2509.20416). There a linear map joins embedding and state before the first layer.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

__all__ = ["LlamaForCausalLMCascadeEagle3"]


class LlamaForCausalLMCascadeEagle3(LlamaForCausalLMEagle3):
    """An EAGLE-3 head of several layers that gives logits of its first and states of the others.

    `hidden_states` of its output is [rows, (layers - 1) * H]: normed states of the later layers.

    Attributes:
        read_rows: [B] int64, the rows of the next passes that are read; None for all of them. Rows
            of all layers are read, so they are dropped behind the last one alone.
    """

    read_rows: torch.Tensor | None = None

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        if config.num_hidden_layers < 2:
            raise ValueError("a cascade has two layers or more")
        super().__init__(config, quant_config, prefix)
        self._sums: list[torch.Tensor] = []  # of the pass that runs, one of each layer but the last
        for layer in self.model.layers[:-1]:
            # Its residual's sum is computed apart: the next layer adds to it in place.
            layer.register_forward_hook(lambda _, args, pair: self._sums.append(pair[0] + pair[1]))
        self.model.register_forward_hook(self._hand_on)

    def _hand_on(self, model: Any, args: Any, output: Any) -> Any:
        """Put the first layer's states where SGLang takes logits from, and the others behind."""
        last, _ = output
        # A batch without rows runs no layers.
        sums = self._sums or [last] * (len(model.layers) - 1)
        if self.read_rows is not None:
            sums, last = [each[self.read_rows] for each in sums], last[self.read_rows]
        first, *later = (model.norm(each) for each in sums)
        self._sums = []
        return first, [*later, last]

    def later_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits [B, layers - 1, V] over the draft's vocabulary.

        Args:
            states: [B, (layers - 1) * H], as the head's pass left them.
        """
        rows = states.reshape(-1, self.config.hidden_size)
        metadata = LogitsMetadata(ForwardMode.DECODE)
        logits = self.logits_processor(None, rows, self.lm_head, metadata).next_token_logits
        return logits.view(len(states), len(self.model.layers) - 1, -1)


EntryClass = [LlamaForCausalLMCascadeEagle3]
