"""One layer of the draft tree after another: where its inputs come from and how it is run.

`EagerLayers` prepares a layer when its width is known and launches its kernels one by one.
`layer_graphs.CapturedLayers` prepares every node that could be kept while the host still waits for
the decision, so that behind the decision there is one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.serving.draft import CastDraftWorker
    from cast_sglang.tree import Frontier

__all__ = ["EagerLayers", "Layers", "take_rows"]


class Layers(Protocol):
    """The layers of one step's tree, top down; layer 1, the root's children, is given."""

    def prepare(self, frontier: Frontier) -> None:
        """Take the newest layer's best nodes, before it is known how many of them are kept."""

    def fit(self, width: int) -> int:
        """Return the width to run for a width that was chosen; not smaller."""

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the draft model over the frontier's best nodes.

        Returns:
            probs [B * W, K] float32 and tokens [B * W, K] int64 of each node's best children.
        """


class EagerLayers:
    """Layers launched kernel by kernel.

    Args:
        forward_batch: the draft's batch, as SGLang prepares it; `out_cache_loc` holds a slot for
            each node of the envelope, request-major, and `spec_info` the roots' hidden states.
    """

    def __init__(self, draft: CastDraftWorker, forward_batch: ForwardBatch) -> None:
        self._draft, self._forward_batch = draft, forward_batch
        batch_size = forward_batch.batch_size
        # [B, D * K] cache slots: layer i of the tree owns columns (i - 1) * K onwards.
        self._slots = forward_batch.out_cache_loc.view(batch_size, -1)
        # [B, W of the layer above, H] and [B, W of the layer above, depth].
        self._hidden_states = forward_batch.spec_info.hidden_states.unsqueeze(1)
        self._path_slots = self._slots.new_empty((batch_size, 1, 0))

    def prepare(self, frontier: Frontier) -> None:
        return

    def fit(self, width: int) -> int:
        return width

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        draft, forward_batch = self._draft, self._forward_batch
        depth = self._path_slots.shape[2]
        parents = frontier.parents[:, :width]
        own = self._slots[:, depth * draft.topk :][:, :width]
        self._path_slots = torch.cat(
            (take_rows(self._path_slots, parents), own.unsqueeze(2)), dim=2
        )
        forward_batch.input_ids = frontier.tokens[:, :width].flatten()
        forward_batch.positions = (forward_batch.seq_lens + depth).repeat_interleave(width)
        forward_batch.out_cache_loc = own.flatten()
        forward_batch.spec_info.hidden_states = take_rows(self._hidden_states, parents).flatten(
            0, 1
        )
        probs, tokens, hidden_states = draft.forward_layer(forward_batch, self._path_slots)
        self._hidden_states = hidden_states.view(len(parents), width, -1)
        return probs, tokens


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gather `x[b, rows[b, w]]`: x [B, R, ...], rows [B, W] -> [B, W, ...]."""
    batch = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[batch, rows]
