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

    logits: torch.Tensor  # [B, T, V]
    features: torch.Tensor  # [B, T, 3 * hidden]: outputs of the aux layers, side by side
    cache: list[LayerCache]


class TargetLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: torch.Tensor, rope: Rope, cache: LayerCache | None
    ) -> tuple[torch.Tensor, LayerCache]:
        queries, new = self.self_attn.project(self.input_layernorm(x), rope)
        if cache is not None:
            new = LayerCache(*(torch.cat(pair, dim=2) for pair in zip(cache, new, strict=True)))
        x = x + self.self_attn.merge(attend_causal(queries, new))
        return x + self.mlp(self.post_attention_layernorm(x)), new


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
        self.apply(init_weights)
        for layer in self.model.layers:
            depth_scale = (2 * shape.num_layers) ** -0.5
            layer.self_attn.o_proj.weight.data.mul_(depth_scale)
            layer.mlp.down_proj.weight.data.mul_(depth_scale)

    def forward(
        self, input_ids: torch.Tensor, cache: list[LayerCache] | None = None
    ) -> TargetOutput:
        """Run tokens through the model.

        Args:
            input_ids: [B, T] int64; T = 1 behind a cache.
            cache: what an earlier call returned, one entry a layer; never modified.
        """
        num_cached = 0 if cache is None else cache[0].keys.shape[2]
        rope = rope_tables(num_cached + torch.arange(input_ids.shape[1]), self.shape)
        x = self.model.embed_tokens(input_ids)
        features = []
        new_cache = []
        for index, layer in enumerate(self.model.layers):
            x, layer_cache = layer(x, rope, None if cache is None else cache[index])
            new_cache.append(layer_cache)
            if index in self.shape.aux_layer_ids:
                features.append(x)
        logits = self.lm_head(self.model.norm(x))
        return TargetOutput(logits, torch.cat(features, dim=-1), new_cache)
