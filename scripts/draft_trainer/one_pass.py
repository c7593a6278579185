"""Heads that draft all tokens of a tree in one pass; their parameters carry checkpoint names.

Both have several layers. The first is EAGLE-3's, which reads embedding and feature side by side.

`CascadeDraft`: each layer drafts a token further ahead than the one before, all of them at the slot
of the last committed token. Behind each stand one norm and the target's head, which stays as it is.
Source: "FastEagle" (arXiv 2509.20416). Its number of layers and the weights of its losses are not
known here; the losses weigh as those of EAGLE-3's steps do.

`ParallelDraft`: the last layer drafts the first token at that slot, and the further ones at masked
slots behind it, which a learnt embedding and a learnt feature fill.
Source: "P-EAGLE" (arXiv 2602.01469): four layers, eight tokens, all losses alike, and fewer bases
for tokens further ahead. There each base is drawn by itself; here the bases of a batch are drawn by
their column, so that what is kept stays a rectangle.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from .draft_model import DraftLayer, Head, Unrolled, attend_chain
from .layers import (
    MLP,
    Attention,
    LayerCache,
    RMSNorm,
    Rope,
    Shape,
    attend_causal,
    init_weights,
    rope_tables,
)

CASCADE_LAYERS = 5  # as many as an EAGLE-3 head is trained to draft
PARALLEL_LAYERS, PARALLEL_DEPTH = 4, 8
# Of the bases of a batch, the part that masked slots of each further token are trained from.
KEPT_BASES, LEAST_KEPT = 0.7, 0.2


class PlainLayer(nn.Module):
    """Pre-norm transformer layer, by the names that SGLang gives the later layers of a head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def project(
        self, embeds: torch.Tensor, hidden: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, LayerCache]:
        """Return queries, and keys and values, of the normed state; embeddings are not read."""
        return self.self_attn.project(self.hidden_norm(hidden), rope)

    finish = DraftLayer.finish


class OnePassDraft(Head):
    """What both heads share; `unroll` says how each drafts.

    Args:
        num_layers: at least 2.
        num_steps: tokens that it drafts.
    """

    def __init__(
        self,
        shape: Shape,
        vocabulary: torch.Tensor,
        has_norms: bool,
        num_layers: int,
        num_steps: int,
    ) -> None:
        super().__init__(shape, vocabulary, has_norms)
        if num_layers < 2 or num_steps < 2:
            raise ValueError("a head of one pass has two layers and drafts two tokens, or more")
        self.num_steps = num_steps
        later = (PlainLayer(shape) for _ in range(num_layers - 1))
        self.layers = nn.ModuleList([DraftLayer(shape), *later])
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, len(vocabulary), bias=False)
        self.apply(init_weights)
        for layer in self.layers:
            # So that a layer adds little to what it reads, at first.
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data.mul_((2 * num_layers) ** -0.5)

    @property
    def first_layer(self) -> DraftLayer:
        """The layer that reads embedding and feature."""
        return self.layers[0]

    def run(
        self, embeds: torch.Tensor, features: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[LayerCache]]:
        """Run the slots of committed tokens; return states [B, T, hidden] and caches by layer.

        Args:
            embeds: [B, T, hidden], of the tokens one ahead of the features.
            features: [B, T, 3 * hidden], outputs of the target's aux layers.
        """
        hidden = self.fuse(features)
        rope = rope_tables(torch.arange(embeds.shape[1]), self.shape)
        states, caches = [], []
        for layer in self.layers:
            queries, cache = layer.project(embeds, hidden, rope)
            hidden = layer.finish(hidden, attend_causal(queries, cache))
            states.append(hidden)
            caches.append(cache)
        return states, caches

    def unroll(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
        follow: Callable[[int], torch.Tensor] | None,
        num_steps: int,
        draw: np.random.Generator | None = None,
    ) -> Iterator[Unrolled]:
        """As `Draft.unroll`; nothing is fed, so `follow` is not called."""
        raise NotImplementedError

    def drafting(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
        keeps_branches: bool = False,
    ) -> "ByLayer":
        """As `Draft.drafting`; all nodes of a layer have the same children."""
        unrolled = self.unroll(embeds, features, bases[None], None, self.num_steps)
        return ByLayer([self.logits(each.hidden[0]) for each in unrolled])


class ByLayer:
    """Trees of a head whose layers depend on no drafted token.

    Args:
        logits: [R, D] of each layer.
    """

    def __init__(self, logits: list[torch.Tensor]) -> None:
        self._logits, self._layer = logits, 0

    def first(self) -> torch.Tensor:
        """Return logits [R, D] of the roots' children."""
        return self._logits[0]

    def next(self, embeds: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Return logits [R * W, D], the same for the W nodes of a base; see `SelfFed.next`."""
        self._layer += 1
        return self._logits[self._layer].repeat_interleave(parents.shape[1], dim=0)


class CascadeDraft(OnePassDraft):
    """Layers in series, each of which drafts one token; see the top of this file."""

    depth_decay = 0.8

    def __init__(
        self,
        shape: Shape,
        vocabulary: torch.Tensor,
        has_norms: bool = False,
        num_layers: int = CASCADE_LAYERS,
    ) -> None:
        super().__init__(shape, vocabulary, has_norms, num_layers, num_layers)
        self.lm_head.weight.requires_grad_(False)

    def unroll(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
        follow: Callable[[int], torch.Tensor] | None,
        num_steps: int,
        draw: np.random.Generator | None = None,
    ) -> Iterator[Unrolled]:
        states, _ = self.run(embeds, features)
        row = torch.arange(len(bases))[:, None]
        for hidden in states[:num_steps]:
            yield Unrolled(hidden[row, bases])


class ParallelDraft(OnePassDraft):
    """One line of masked slots behind each base; see the top of this file."""

    depth_decay = 1.0

    def __init__(
        self,
        shape: Shape,
        vocabulary: torch.Tensor,
        has_norms: bool = False,
        num_layers: int = PARALLEL_LAYERS,
        num_steps: int = PARALLEL_DEPTH,
    ) -> None:
        super().__init__(shape, vocabulary, has_norms, num_layers, num_steps)
        # As large as what they stand in for: embeddings and features are of no fixed scale, so
        # they start small, as matrices do, and are learnt.
        self.mask_embed = nn.Parameter(0.02 * torch.randn(shape.hidden_size))
        self.mask_hidden = nn.Parameter(0.02 * torch.randn(self.fc.in_features))

    def unroll(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
        follow: Callable[[int], torch.Tensor] | None,
        num_steps: int,
        draw: np.random.Generator | None = None,
    ) -> Iterator[Unrolled]:
        states, committed = self.run(embeds, features)
        row = torch.arange(len(bases))[:, None]
        yield Unrolled(states[-1][row, bases])
        num_bases, length = bases.shape[1], embeds.shape[1]
        order = torch.arange(num_bases)
        if draw is not None:
            order = torch.from_numpy(draw.permutation(num_bases))
        chains: list[list[LayerCache]] = [[] for _ in self.layers]
        for step in range(1, num_steps):
            columns = order
            if draw is not None:
                part = max(KEPT_BASES**step, LEAST_KEPT)
                columns = order[: max(1, round(part * num_bases))]
            kept = bases[:, columns]
            mask = torch.arange(length) <= kept[..., None]
            rope = rope_tables(kept + step, self.shape)
            hidden = self.fuse(self.mask_hidden).expand(*kept.shape, -1)
            masked = self.mask_embed.expand(*kept.shape, -1)
            for layer, cache, chain in zip(self.layers, committed, chains, strict=True):
                queries, own = layer.project(masked, hidden, rope)
                # The slots before belong to the same bases, of which some go on.
                chain[:] = [LayerCache(*(x[:, :, : len(columns)] for x in each)) for each in chain]
                heads = attend_chain(queries, cache, mask, [*chain, own])
                hidden = layer.finish(hidden, heads)
                chain.append(own)
            yield Unrolled(hidden, columns)
