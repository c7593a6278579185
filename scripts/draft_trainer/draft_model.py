"""The draft: an EAGLE-3 head whose parameters carry their checkpoint names.

Slot i of the draft holds the embedding of token i + 1 and the feature of token i, sits at
position i, and predicts token i + 2. A slot on committed tokens takes its feature from the target
through `fc` (`extend`); a slot further on takes the state of the slot before (`step`).

With EAGLE 3.1's norms each state of the target is normed before `fc`, and a slot hands on its state
behind the last norm.

Source: Li et al., "EAGLE-3" (arXiv 2503.01840); EAGLE 3.1 (arXiv 2605.09992); contract of SGLang
0.5.23 `LlamaForCausalLMEagle3`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .layers import (
    MLP,
    Attention,
    LayerCache,
    RMSNorm,
    Rope,
    Shape,
    attend_causal,
    init_weights,
    repeat_heads,
    rope_tables,
)
from .target_model import Target

NUM_STEPS = 5  # self-fed steps that an EAGLE-3 head is trained over


class DraftOutput(NamedTuple):
    """What one pass of the draft leaves behind."""

    hidden: torch.Tensor  # [B, T, hidden]: before the last norm
    cache: LayerCache  # of these T slots only


class Unrolled(NamedTuple):
    """What a head drafts one token further ahead."""

    hidden: torch.Tensor  # [B, n, hidden]: before the last norm
    columns: torch.Tensor | None = None  # [n] int64, of which bases; None for all of them


class DraftLayer(nn.Module):
    """Transformer layer whose attention sees embedding and feature side by side."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, 2 * shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def project(
        self, embeds: torch.Tensor, hidden: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, LayerCache]:
        """Return queries, and keys and values, of the normed pair."""
        pair = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        return self.self_attn.project(pair, rope)

    def finish(self, hidden: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Add attention and feed-forward to the feature, which is the residual."""
        x = hidden + self.self_attn.merge(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Module):
    """What all heads share: they fuse the states of the target, and propose a vocabulary's tokens.

    A subclass has `first_layer`, which reads embedding and feature, `norm` and `lm_head`, and says
    by `unroll` and `drafting` how it drafts.

    Args:
        vocabulary: [D] int64, ascending, the target's ids of the tokens that it proposes.
        has_norms: each state of the target is normed before it is fused.
    """

    vocabulary: torch.Tensor
    num_steps: int  # tokens that it is trained to draft behind a root
    depth_decay: float  # by which the loss of each step counts less than that of the step before
    norm: RMSNorm
    lm_head: nn.Linear

    def __init__(self, shape: Shape, vocabulary: torch.Tensor, has_norms: bool) -> None:
        super().__init__()
        self.shape, self.has_norms = shape, has_norms
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        num_states = len(shape.aux_layer_ids)
        self.fc = nn.Linear(num_states * shape.hidden_size, shape.hidden_size, bias=False)
        self.fc_norm = None
        if has_norms:
            norms = (RMSNorm(shape.hidden_size, shape.rms_norm_eps) for _ in range(num_states))
            self.fc_norm = nn.ModuleList(norms)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Return [..., hidden] for features [..., num_states * hidden]."""
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        return self.fc(features)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., D] over the draft's vocabulary for states [..., hidden]."""
        return self.lm_head(self.norm(hidden))


class Draft(Head):
    """The EAGLE-3 head; embeddings come from the target.

    Args:
        has_norms: those of EAGLE 3.1; states are handed on behind the last norm too.
    """

    num_steps = NUM_STEPS
    depth_decay = 0.8

    def __init__(self, shape: Shape, vocabulary: torch.Tensor, has_norms: bool = False) -> None:
        super().__init__(shape, vocabulary, has_norms)
        self.midlayer = DraftLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, len(vocabulary), bias=False)
        self.apply(init_weights)

    @property
    def first_layer(self) -> DraftLayer:
        """The layer that reads embedding and feature."""
        return self.midlayer

    def fed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the next step takes of a state [..., hidden]."""
        return self.norm(hidden) if self.has_norms else hidden

    def unroll(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
        follow: Callable[[int], torch.Tensor],
        num_steps: int,
        draw: np.random.Generator | None = None,
    ) -> Iterator[Unrolled]:
        """Yield the states that draft 1, 2, ... `num_steps` tokens behind the roots of bases.

        Args:
            embeds, features: as `extend` takes them.
            bases: [B, N] int64, the last committed slots.
            follow: returns [B, N, hidden], the embeddings of the tokens that step s >= 1 is fed.
            draw: chooses bases, for a head that drafts from some of them only; None for all.
        """
        result = self.extend(embeds, features)
        committed = result.cache
        hidden = result.hidden[torch.arange(len(bases))[:, None], bases]
        yield Unrolled(hidden)
        mask = torch.arange(embeds.shape[1]) <= bases[..., None]
        chain: list[LayerCache] = []
        for step in range(1, num_steps):
            fed = self.fed(hidden)
            result = self.step(follow(step), fed, bases + step, committed, mask, chain)
            chain.append(result.cache)
            hidden = result.hidden
            yield Unrolled(hidden)

    def extend(self, embeds: torch.Tensor, features: torch.Tensor) -> DraftOutput:
        """Run the slots of committed tokens, from position 0 on.

        Args:
            embeds: [B, T, hidden], of the tokens one ahead of the features.
            features: [B, T, 3 * hidden], outputs of the target's aux layers.
        """
        hidden = self.fuse(features)
        rope = rope_tables(torch.arange(embeds.shape[1]), self.shape)
        queries, cache = self.midlayer.project(embeds, hidden, rope)
        return DraftOutput(self.midlayer.finish(hidden, attend_causal(queries, cache)), cache)

    def step(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        committed: LayerCache,
        committed_mask: torch.Tensor,
        chain: list[LayerCache],
    ) -> DraftOutput:
        """Run one self-fed step on T slots that do not see each other.

        Args:
            embeds: [B, T, hidden], of the drafted tokens.
            hidden: [B, T, hidden], the states that predicted them, as `fed` returns them.
            positions: [T] or [B, T].
            committed: what `extend` returned, S slots.
            committed_mask: [T, S] or [B, T, S] boolean, true where a slot may look.
            chain: what the earlier steps returned: slot t of each precedes slot t of this one.
        """
        rope = rope_tables(positions, self.shape)
        queries, cache = self.midlayer.project(embeds, hidden, rope)
        heads = attend_chain(queries, committed, committed_mask, [*chain, cache])
        return DraftOutput(self.midlayer.finish(hidden, heads), cache)

    def drafting(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
        keeps_branches: bool = False,
    ) -> "SelfFed":
        """Begin trees behind several bases of one text.

        Args:
            embeds, features: as `extend` takes them, B = 1.
            bases: [R] int64, the last committed slots.
            keeps_branches: attend to branches as SGLang's own drafting does, not to true ancestors.
        """
        return SelfFed(self, self.extend(embeds, features), bases, keeps_branches)


class SelfFed:
    """Trees of an EAGLE-3 head, whose nodes are fed with tokens that it drafted; see `drafting`."""

    def __init__(
        self, draft: Draft, committed: DraftOutput, bases: torch.Tensor, keeps_branches: bool
    ) -> None:
        self._draft, self._bases, self._keeps_branches = draft, bases, keeps_branches
        self._committed = committed.cache
        self._hidden = committed.hidden[0, bases]  # [R * W, hidden], W = 1
        self._chain: list[LayerCache] = []

    def first(self) -> torch.Tensor:
        """Return logits [R, D] of the roots' children."""
        return self._draft.logits(self._hidden)

    def next(self, embeds: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Return logits [R * W, D] of the children of a layer's expanded nodes.

        Args:
            embeds: [R, W, hidden], of the nodes' tokens.
            parents: [R, W] int64, of each node among the expanded nodes of the layer above, 0 for
                the root.
        """
        num_bases, width = parents.shape
        above = len(self._hidden) // num_bases
        rows = (torch.arange(num_bases)[:, None] * above + parents).flatten()
        if not self._keeps_branches:
            self._chain = [LayerCache(*(x[:, :, rows] for x in each)) for each in self._chain]
        slots = self._bases.repeat_interleave(width)
        output = self._draft.step(
            embeds.reshape(1, num_bases * width, -1),
            self._draft.fed(self._hidden[rows])[None],
            slots + len(self._chain) + 1,
            self._committed,
            torch.arange(self._committed.keys.shape[2]) <= slots[:, None],
            self._chain,
        )
        self._chain.append(output.cache)
        self._hidden = output.hidden[0]
        return self._draft.logits(self._hidden)


def attend_chain(
    queries: torch.Tensor, committed: LayerCache, mask: torch.Tensor, chain: list[LayerCache]
) -> torch.Tensor:
    """Attend to committed slots under a mask, and to the own slot of every self-fed step.

    This is the paper's training-time-test attention: query t sees `committed` where mask[t] says
    so, and of each member of `chain` slot t alone (the diagonal).

    Args:
        queries: [B, num_heads, T, head_dim].
        committed: S slots.
        mask: [T, S] or [B, T, S] boolean.
        chain: at least one entry, T slots each.

    Returns:
        [B, num_heads, T, head_dim].
    """
    num_heads, num_committed = queries.shape[1], committed.keys.shape[2]
    queries = queries * queries.shape[-1] ** -0.5
    keys, values = (repeat_heads(x, num_heads) for x in committed)
    own_keys = [repeat_heads(cache.keys, num_heads) for cache in chain]
    own_values = [repeat_heads(cache.values, num_heads) for cache in chain]
    hidden_slots = ~mask if mask.ndim == 2 else ~mask[:, None]
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(hidden_slots, float("-inf"))
    own_scores = torch.stack([(queries * own).sum(-1) for own in own_keys], dim=-1)
    weights = torch.cat([scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32)
    weights = weights.to(values.dtype)
    heads = weights[..., :num_committed] @ values
    for index, own in enumerate(own_values):
        heads = heads + weights[..., num_committed + index, None] * own
    return heads


def init_from_target(draft: Head, target: Target) -> None:
    """Start the draft as the target's last layer on its deepest feature.

    The head, its norm and the feed-forward block are copied, `fc` passes the last feature through,
    and attention starts on the feature's half of its input. Of several layers the first starts so.
    """
    last, first = target.model.layers[-1], draft.first_layer
    hidden_size = draft.shape.hidden_size
    with torch.no_grad():
        draft.lm_head.weight.copy_(target.lm_head.weight[draft.vocabulary])
        draft.norm.load_state_dict(target.model.norm.state_dict())
        first.mlp.load_state_dict(last.mlp.state_dict())
        first.post_attention_layernorm.load_state_dict(last.post_attention_layernorm.state_dict())
        first.hidden_norm.load_state_dict(last.input_layernorm.state_dict())
        draft.fc.weight[:, -hidden_size:] += torch.eye(hidden_size)
        for name in ("q_proj", "k_proj", "v_proj"):
            source = getattr(last.self_attn, name).weight
            getattr(first.self_attn, name).weight[:, hidden_size:] = source
        first.self_attn.o_proj.load_state_dict(last.self_attn.o_proj.state_dict())
