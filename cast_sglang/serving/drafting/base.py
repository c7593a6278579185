"""What a drafter is: the contract between growing a tree and the ways to propose its nodes.

The draft worker makes one `Drafter` per server and asks it for the `Layers` of each step's tree.
`grow.grow_tree` calls these in the order of the methods below, once per layer:

    prepare(frontier)       the layer's candidates are known, how many are expanded is not
    run(frontier, width)    after the decision, unless the tree ends here

The root's children, layer 1, are given: draft extend of the step before has proposed them, and
the draft input holds them. A drafter that knows further layers then takes them as `extended`. Shape
letters are those of `tree.py`: B requests, K children per expanded node, W expanded nodes, D layers
at most. Tensors are on the draft model's device.

None of them may wait for the device. The host waits once per layer, between `prepare` and `run`,
for the frontier's scores; whatever was launched before runs meanwhile.

A new drafter is one file with a `Drafter` in it, and the line of `worker.CastDraftWorker` that
makes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.speculative.eagle_info import EagleDraftInput

    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.costs.model import StepCosts
    from cast_sglang.serving.drafting.captured_layers import LayerGraphs
    from cast_sglang.serving.pass_clock import PassClock
    from cast_sglang.tree import Frontier

__all__ = ["Drafter", "Layers"]


class Layers(Protocol):
    """The layers of one step's tree, from layer 2 down."""

    def prepare(self, frontier: Frontier) -> None:
        """Do what the next layer needs whatever is decided about it.

        Called once per layer that may be run, also where it is then not run.

        Args:
            frontier: [B, K] each, the newest layer's best nodes, best first.
        """

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Propose children for the frontier's best nodes.

        Args:
            frontier: as `prepare` got it.
            width: W, in 1..K; of the captured widths where there are any.

        Returns:
            probs [B * W, M] float32 and tokens [B * W, M] int64, in the target's vocabulary, of
            each node's best children, most probable first, request-major; M >= K, and the more of
            them, the closer what is drawn comes to the draft's distribution (`draws.Draws`). The
            tree keeps both until the step ends, so they must not be overwritten.
        """


class Drafter(ABC):
    """A way to propose the nodes of trees.

    Attributes:
        graphs: captured draft layers, which a cost meter times in place of eager ones; None where
            there are none.
        takes_one_pass: no layer is a pass of its own; a meter then times how a layer is taken in.
        layers_held: layers whose children a draft input holds, M of each.
    """

    graphs: LayerGraphs | None = None
    takes_one_pass: bool = False
    layers_held: int = 1

    def capture(self, sizes: GraphSizes) -> None:
        """Capture what the drafter can replay, at start-up on a device with graphs.

        Args:
            sizes: widths that get a graph, for each captured batch size; K is among them.
        """
        return

    def extended(self, draft_input: EagleDraftInput) -> None:
        """Take what draft extend has left of each request's last row.

        Called whenever it has run, behind prompts too. A drafter that holds more than the root's
        children puts them behind these.

        Args:
            draft_input: of the next step: `topk_p` and `topk_index` [B, M], `hidden_states` [B, H].
        """
        return

    def root(self, draft_input: EagleDraftInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probs and tokens [B, M] of the root's children, in the draft's vocabulary."""
        return draft_input.topk_p, draft_input.topk_index

    def begin(self, batch: ScheduleBatch, clock: PassClock, max_layers: int) -> None:
        """Run what a step's tree needs before it grows; called once per step with a tree.

        Args:
            batch: the decode batch, up to date; it must stay as it is.
            clock: times what is run here as part of a measured pass (`PassClock.lead`).
            max_layers: layers that the step's tree may have.
        """
        return

    @abstractmethod
    def layers(self, forward_batch: ForwardBatch) -> Layers:
        """Begin a step's tree; called once per step with a tree, before anything is read.

        Args:
            forward_batch: the draft's batch, as SGLang prepares it: `out_cache_loc` [B * D * K]
                int64 holds a cache slot for each node of the envelope, request-major, and
                `spec_info.hidden_states` [B, H] those of the roots.
        """

    @abstractmethod
    def layer_costs(self, costs: StepCosts) -> StepCosts:
        """Return the costs of a step with this drafter, which all its decisions are taken by.

        `draft` [K] float32, > 0 and ascending, is to be what one more layer of 1.. nodes takes.
        What the drafter pays once per tree, however deep it gets, does not belong there. It is a
        part of `draft_extend`, which each tree pays once as well, if a meter times it there and
        serving too (`one_pass`); else add it to `overhead`.

        Called on the host when the requests change and every few steps. Policies keep what they
        derive from a `StepCosts`, so return the same object for the same costs.

        Args:
            costs: as measured or corrected, with the measured pass of one layer as `draft`.
        """
