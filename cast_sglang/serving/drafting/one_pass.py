"""Drafters that propose all layers in one pass: the heads of `serving.heads`.

A layer's distribution depends on no drafted token, so all nodes of a layer get the same children,
and the tree is chosen from the product of the layers. What a layer costs is to take its nodes in,
and the profile's table of draft layers holds that. The pass itself comes once for each tree,
whatever its depth, as draft extend does, and is measured and timed as a part of it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput
from sglang.srt.speculative.eagle_worker_common import prepare_for_draft_extend

from cast_sglang.serving.drafting.base import Drafter, Layers
from cast_sglang.serving.heads.registry import one_pass_depth

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.speculative.eagle_info import EagleDraftInput

    from cast_sglang.costs.model import StepCosts
    from cast_sglang.serving.drafting.model import DraftModel
    from cast_sglang.serving.pass_clock import PassClock
    from cast_sglang.tree import Frontier

__all__ = ["CascadeDrafter", "ParallelDrafter", "ProductLayers", "one_pass_drafter"]


def one_pass_drafter(model: DraftModel) -> Drafter | None:
    """Return the drafter of a head that drafts in one pass; None for another draft model."""
    if one_pass_depth(model.runner.model_config.hf_config) is None:
        return None
    if hasattr(model.runner.model, "later_logits"):
        return CascadeDrafter(model)
    return ParallelDrafter(model)


class ProductLayers(Layers):
    """The layers of one step's tree, all of which are known before it grows.

    Args:
        probs: [B, W, M] float32, children of every node of layers 1, 2, ..., W, likeliest first.
        tokens: [B, W, M] int64, in the target's vocabulary.
    """

    def __init__(self, probs: torch.Tensor, tokens: torch.Tensor) -> None:
        self._probs, self._tokens, self._layer = probs, tokens, 0

    def prepare(self, frontier: Frontier) -> None:
        return

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        layer, self._layer = self._layer, self._layer + 1
        return (
            self._probs[:, layer].repeat_interleave(width, dim=0),
            self._tokens[:, layer].repeat_interleave(width, dim=0),
        )


class CascadeDrafter(Drafter):
    """Drafts with a cascade head, whose draft extend yields the states of all layers.

    Draft inputs then hold the children of every layer, one layer behind the other, in place of the
    root's alone.

    Args:
        model: the draft model, of class `LlamaForCausalLMCascadeEagle3`.
    """

    takes_one_pass = True

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self.layers_held = len(model.runner.model.model.layers)

    def extended(self, draft_input: EagleDraftInput) -> None:
        states = draft_input.hidden_states
        logits = self._model.runner.model.later_logits(states)
        probs, index = self._model.best_children(logits)
        draft_input.topk_p = torch.cat((draft_input.topk_p, probs.flatten(1)), dim=1)
        draft_input.topk_index = torch.cat((draft_input.topk_index, index.flatten(1)), dim=1)
        # Nothing reads them any more; SGLang expects those of one layer.
        draft_input.hidden_states = states[:, : self._model.recurrent_hidden_states()[0]]

    def root(self, draft_input: EagleDraftInput) -> tuple[torch.Tensor, torch.Tensor]:
        children = self._by_layer(draft_input)
        return children[0][:, 0].contiguous(), children[1][:, 0].contiguous()

    def layers(self, forward_batch: ForwardBatch) -> Layers:
        probs, index = self._by_layer(forward_batch.spec_info)
        return ProductLayers(probs[:, 1:], self._model.to_target_vocab(index[:, 1:]))

    def _by_layer(self, draft_input: EagleDraftInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities and draft tokens [B, layers, M]."""
        shape = len(draft_input.topk_p), self.layers_held, -1
        return draft_input.topk_p.view(shape), draft_input.topk_index.view(shape)

    def layer_costs(self, costs: StepCosts) -> StepCosts:
        """Return the costs as they are: the pass is in draft extend."""
        return costs


class ParallelDrafter(Drafter):
    """Drafts with a parallel head: one pass over a line of masked slots before each tree.

    The slots lie behind the committed tokens, where the draft's nodes have slots of the cache: a
    step reserves more of them than its tree has layers.

    Args:
        model: the draft model, of class `LlamaForCausalLMParallelEagle3`.
    """

    takes_one_pass = True

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._children: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, batch: ScheduleBatch, clock: PassClock, max_layers: int) -> None:
        self._children = None
        if max_layers > 1:
            with clock.lead("draft_extend"):
                self._children = self._run_masked(batch, max_layers - 1)

    def _run_masked(self, batch: ScheduleBatch, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probs and tokens [B, W, M] that W masked slots of each request draft."""
        runner, batch_size = self._model.runner, len(batch.reqs)
        slots = runner.req_to_token_pool.req_to_token[
            batch.req_pool_indices.unsqueeze(1),
            batch.seq_lens.unsqueeze(1) + torch.arange(width, device=batch.seq_lens.device),
        ]
        masked = copy.copy(batch)  # which SGLang turns into the pass
        masked.out_cache_loc = slots.flatten().to(torch.int64)
        lens = torch.full((batch_size,), width, dtype=torch.int32, device=slots.device)
        spec_info: Any = EagleDraftExtendInput(
            num_correct_drafts=lens - 1,
            num_accept_tokens=lens,
            num_tokens_per_req=width,
            num_tokens_for_logprob_per_req=width,
        )
        spec_info.is_masked = True
        forward_batch = prepare_for_draft_extend(
            spec_info,
            masked,
            torch.zeros_like(masked.out_cache_loc),
            width,
            runner,
            None,
            return_hidden_states_before_norm=False,
        )
        logits = runner.forward(forward_batch).logits_output.next_token_logits
        probs, index = self._model.best_children(logits.view(batch_size, width, -1))
        return probs, self._model.to_target_vocab(index)

    def layers(self, forward_batch: ForwardBatch) -> Layers:
        if self._children is None:  # the tree may have the root's children alone
            return ProductLayers(
                *(each.unsqueeze(1) for each in self.root(forward_batch.spec_info))
            )
        return ProductLayers(*self._children)

    def layer_costs(self, costs: StepCosts) -> StepCosts:
        """Return the costs as they are: the pass is measured as a part of draft extend."""
        return costs
