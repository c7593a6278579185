"""Draft layers launched kernel by kernel: where the inputs of a layer come from.

`EagerLayers` prepares a layer when its width is known. `captured_layers.CapturedLayers` prepares
every node that could be expanded while the host still waits for the decision, so that behind the
decision there is one launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.serving.drafting.model import DraftModel
    from cast_sglang.tree import Frontier

__all__ = ["EagerLayers", "take_rows"]


class EagerLayers:
    """The layers of one step's tree, launched kernel by kernel.

    Args:
        model: the draft model.
        forward_batch: as `base.Drafter.layers` gets it.
    """

    def __init__(self, model: DraftModel, forward_batch: ForwardBatch) -> None:
        self._model, self._forward_batch = model, forward_batch
        batch_size = forward_batch.batch_size
        # [B, D * K] cache slots; a layer takes the next ones, as many as it has nodes.
        self._slots = forward_batch.out_cache_loc.view(batch_size, -1)
        self._num_nodes = 0  # that were run
        # [B, W of the layer above, H] and [B, W of the layer above, depth].
        self._hidden_states = forward_batch.spec_info.hidden_states.unsqueeze(1)
        self._path_slots = self._slots.new_empty((batch_size, 1, 0))

    def prepare(self, frontier: Frontier) -> None:
        return

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        model, forward_batch = self._model, self._forward_batch
        depth, batch_size = self._path_slots.shape[2], len(frontier.tokens)
        own = self._slots[:, self._num_nodes : self._num_nodes + width]
        self._num_nodes += width
        if depth == 0:  # all children of the root, which has no slot here
            self._path_slots = own.unsqueeze(2)
            hidden_states = self._hidden_states.expand(-1, width, -1)
        else:
            parents = frontier.parents[:, :width]
            path_slots = take_rows(self._path_slots, parents)
            self._path_slots = torch.cat((path_slots, own.unsqueeze(2)), dim=2)
            hidden_states = take_rows(self._hidden_states, parents)
        forward_batch.input_ids = frontier.tokens[:, :width].flatten()
        positions = (forward_batch.seq_lens + depth).unsqueeze(1)
        forward_batch.positions = positions.expand(-1, width).flatten()
        forward_batch.out_cache_loc = own.flatten()
        forward_batch.spec_info.hidden_states = hidden_states.flatten(0, 1)
        probs, tokens, hidden_states = model.forward_layer(forward_batch, self._path_slots)
        self._hidden_states = hidden_states.view(batch_size, width, -1)
        return probs, tokens


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gather `x[b, rows[b, w]]`: x [B, R, ...], rows [B, W] -> [B, W, ...]."""
    batch_size, num_rows = x.shape[:2]
    if num_rows == 1:  # as in a chain, where there is nothing to choose from
        return x.expand(-1, rows.shape[1], *x.shape[2:])
    if batch_size > 1:
        rows = rows + torch.arange(0, batch_size * num_rows, num_rows, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(batch_size, -1, *x.shape[2:])
