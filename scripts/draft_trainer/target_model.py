"""The target: a Llama model whose parameters carry their checkpoint names."""

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
    rope_tables,
)


class TargetOutput(NamedTuple):
    """What the target says about each position."""

    states: torch.Tensor  # [B, T, state_size]: outputs of the aux layers, then the normed last one
    cache: list[LayerCache]  # of these T slots, an entry a layer


class TargetLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, LayerCache]:
        queries, cache = self.self_attn.project(self.input_layernorm(x), rope)
        return self.finish(x, attend_causal(queries, cache)), cache

    def finish(self, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Add attention and feed-forward to the residual."""
        x = x + self.self_attn.merge(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


class TargetBackbone(nn.Module):
    """Embedding, layers and last norm: the `model.` part of the checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(TargetLayer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Target(nn.Module):
    """The Llama model that is served."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = TargetBackbone(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.ties_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(init_weights)
        for layer in self.model.layers:
            depth_scale = (2 * shape.num_layers) ** -0.5
            layer.self_attn.o_proj.weight.data.mul_(depth_scale)
            layer.mlp.down_proj.weight.data.mul_(depth_scale)

    def forward(self, input_ids: torch.Tensor) -> TargetOutput:
        """Run sequences from their first token on.

        Args:
            input_ids: [B, T] int64.
        """
        rope = rope_tables(torch.arange(input_ids.shape[1]), self.shape)
        x = self.model.embed_tokens(input_ids)
        states, caches = [], []
        for index, layer in enumerate(self.model.layers):
            x, cache = layer(x, rope)
            caches.append(cache)
            if index in self.shape.aux_layer_ids:
                states.append(x)
        return TargetOutput(torch.cat([*states, self.model.norm(x)], dim=-1), caches)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits [..., V] for states [..., state_size], as `forward` returns them."""
        return self.lm_head(states[..., -self.shape.hidden_size :])
