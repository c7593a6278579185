"""DraftModel: runs nodes of a tree through the draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec
from sglang.srt.speculative.spec_utils import renorm_draft_probs
from sglang.srt.utils.common import fast_topk

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

__all__ = ["DraftModel"]


class DraftModel:
    """The draft model as layers of a tree use it.

    Args:
        runner: SGLang's runner of the draft model.
        attention: the tree's attention backend, of `create_tree_backend`.
        topk: K, children that a node of the tree has.
        num_proposed: M >= K, tokens that the draft's distribution is kept of.
        token_map: [draft vocabulary] int64, the target's number of each of the draft's tokens; None
            where the numbers are the same. Weight updates write to it in place.
    """

    def __init__(
        self,
        runner: ModelRunner,
        attention: Any,
        topk: int,
        num_proposed: int,
        token_map: torch.Tensor | None,
    ) -> None:
        self.runner, self.attention, self.topk = runner, attention, topk
        self.num_proposed = num_proposed
        self._token_map = token_map

    @property
    def device(self) -> str:
        """Where the model runs, such as "cuda"."""
        return self.runner.device

    def forward_layer(
        self, forward_batch: ForwardBatch, path_slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one layer of the tree.

        Args:
            forward_batch: holds the layer's input ids, positions and write slots, [B * W] each.
            path_slots: [B, W, depth] int64, cache slots from a node's topmost ancestor to itself.

        Returns:
            probs [B * W, M] float32 and tokens [B * W, M] int64 of each node's best children, and
            hidden_states [B * W, H].
        """
        self.attention.init_tree_metadata(forward_batch, path_slots)
        return self.forward_nodes(forward_batch)

    def forward_nodes(
        self, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run nodes whose attention is set up; see `forward_layer`."""
        with forward_context(
            ForwardContext(attn_backend=self.attention), forward_batch=forward_batch
        ):
            forward_batch.mark_forward_metadata_ready()
            output = self.runner.forward(forward_batch).logits_output
        top_probs, top_index = self.best_children(output.next_token_logits)
        return top_probs, self.to_target_vocab(top_index), output.hidden_states

    def best_children(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probs float32 and draft tokens int64 [..., M], likeliest first.

        Args:
            logits: [..., V], over the draft's vocabulary.
        """
        rows = logits.flatten(0, -2)
        probs, index = fast_topk(renorm_draft_probs(rows, None, False), self.num_proposed, dim=-1)
        shape = *logits.shape[:-1], self.num_proposed
        return probs.view(shape), index.view(shape)

    def to_target_vocab(self, index: torch.Tensor) -> torch.Tensor:
        """Return the target's numbers of the draft's tokens."""
        return index if self._token_map is None else self._token_map[index]

    def recurrent_hidden_states(self) -> tuple[int, torch.dtype]:
        """Return size H and type of the hidden states that one layer hands to the next."""
        size, dtype = get_draft_recurrent_hidden_state_spec(self.runner)
        assert size is not None and dtype is not None
        return size, dtype
