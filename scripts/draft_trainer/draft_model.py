"""The draft: an EAGLE-3 head whose parameters carry their checkpoint names.

Slot i of the draft holds the embedding of token i + 1 and the feature of token i, sits at
position i, and predicts token i + 2. A slot on committed tokens takes its feature from the target
through `fc` (`extend`); a slot further on takes the state of the slot before (`step`).

Source: Li et al., "EAGLE-3" (arXiv 2503.01840); contract of SGLang 0.5.23 `LlamaForCausalLMEagle3`.
"""

from typing import NamedTuple

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


class DraftOutput(NamedTuple):
    """What one pass of the draft leaves behind."""

    hidden: torch.Tensor  # [B, T, hidden]: before the last norm; the next step is fed with it
    cache: LayerCache  # of these T slots only


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


class Draft(nn.Module):
    """The EAGLE-3 head; embeddings come from the target.

    It proposes the tokens of its own `vocabulary` only: target ids [D] int64, ascending.
    """

    vocabulary: torch.Tensor

    def __init__(self, shape: Shape, vocabulary: torch.Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self.fc = nn.Linear(
            len(shape.aux_layer_ids) * shape.hidden_size, shape.hidden_size, bias=False
        )
        self.midlayer = DraftLayer(shape)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, len(vocabulary), bias=False)
        self.apply(init_weights)

    def extend(self, embeds: torch.Tensor, features: torch.Tensor) -> DraftOutput:
        """Run the slots of committed tokens, from position 0 on.

        Args:
            embeds: [B, T, hidden], of the tokens one ahead of the features.
            features: [B, T, 3 * hidden], outputs of the target's aux layers.
        """
        hidden = self.fc(features)
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
            hidden: [B, T, hidden], the states that predicted them.
            positions: [T] or [B, T].
            committed: what `extend` returned, S slots.
            committed_mask: [T, S] or [B, T, S] boolean, true where a slot may look.
            chain: what the earlier steps returned: slot t of each precedes slot t of this one.
        """
        rope = rope_tables(positions, self.shape)
        queries, cache = self.midlayer.project(embeds, hidden, rope)
        heads = attend_chain(queries, committed, committed_mask, [*chain, cache])
        return DraftOutput(self.midlayer.finish(hidden, heads), cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [..., D] over the draft's vocabulary for states [..., hidden]."""
        return self.lm_head(self.norm(hidden))


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


def init_from_target(draft: Draft, target: Target) -> None:
    """Start the draft as the target's last layer on its deepest feature.

    The head, its norm and the feed-forward block are copied, `fc` passes the last feature through,
    and attention starts on the feature's half of its input.
    """
    last = target.model.layers[-1]
    hidden_size = draft.shape.hidden_size
    with torch.no_grad():
        draft.lm_head.weight.copy_(target.lm_head.weight[draft.vocabulary])
        draft.norm.load_state_dict(target.model.norm.state_dict())
        draft.midlayer.mlp.load_state_dict(last.mlp.state_dict())
        draft.midlayer.post_attention_layernorm.load_state_dict(
            last.post_attention_layernorm.state_dict()
        )
        draft.midlayer.hidden_norm.load_state_dict(last.input_layernorm.state_dict())
        draft.fc.weight[:, -hidden_size:] += torch.eye(hidden_size)
        for name in ("q_proj", "k_proj", "v_proj"):
            source = getattr(last.self_attn, name).weight
            getattr(draft.midlayer.self_attn, name).weight[:, hidden_size:] = source
        draft.midlayer.self_attn.o_proj.load_state_dict(last.self_attn.o_proj.state_dict())
