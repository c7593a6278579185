"""EagleDrafter: one pass of an EAGLE draft model per layer, captured where there are graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cast_sglang.serving.drafting.base import Drafter, Layers
from cast_sglang.serving.drafting.captured_layers import capture_layers
from cast_sglang.serving.drafting.layers import EagerLayers

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.costs.model import StepCosts
    from cast_sglang.serving.drafting.model import DraftModel

__all__ = ["EagleDrafter"]


class EagleDrafter(Drafter):
    """Drafts with an EAGLE or EAGLE-3 model.

    Args:
        model: the draft model.
        max_layers: D, layers that a tree may have.
    """

    def __init__(self, model: DraftModel, max_layers: int) -> None:
        self._model, self._max_layers = model, max_layers

    def capture(self, sizes: GraphSizes) -> None:
        self.graphs = capture_layers(self._model, self._max_layers, sizes)
        # Nothing of a captured layer is sized by the host, so it need not wait for lengths.
        self._model.attention.needs_cpu_seq_lens = False

    def layers(self, forward_batch: ForwardBatch) -> Layers:
        if self.graphs is not None and self.graphs.holds(forward_batch.batch_size):
            return self.graphs.layers(forward_batch)
        return EagerLayers(self._model, forward_batch)

    def layer_costs(self, costs: StepCosts) -> StepCosts:
        """Return the costs as they are: each layer is a pass, and was measured as one."""
        return costs
