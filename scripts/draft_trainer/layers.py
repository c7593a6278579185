"""The parts that the target and its draft share, in plain torch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each broadcasting to [B, 1, T, head_dim]


@dataclass(frozen=True)
class Shape:
    """Sizes of a pair. The draft has the target's, but one layer and its own vocabulary."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    # Layers whose *output* the draft sees; SGLang takes it as the input of the layer after.
    aux_layer_ids: tuple[int, ...]
    ties_embeddings: bool = False  # the target's head is its embedding

    @property
    def state_size(self) -> int:
        """Numbers kept of each token: the outputs of the aux layers, and the normed last state."""
        return (len(self.aux_layer_ids) + 1) * self.hidden_size


def usual_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """Return an early, a middle and a late layer, the ones SGLang takes where none are named."""
    return (1, num_layers // 2 - 1, num_layers - 4)


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B, num_kv_heads, T, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor


def rope_tables(positions: torch.Tensor, shape: Shape) -> Rope:
    """Return the half-rotation tables for positions [T] or [B, T]."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = positions[..., None].float() * shape.rope_theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)[..., None, :, :]
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate x [B, heads, T, head_dim]."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def repeat_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Give every query head its key or value head: [B, num_heads, T, head_dim]."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def init_weights(module: nn.Module) -> None:
    """Start matrices small; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class RMSNorm(nn.Module):
    """Scale to unit mean square, in float32 as SGLang does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class MLP(nn.Module):
    """Gated feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Projections of grouped-query attention; the draft's input is twice the hidden size wide."""

    def __init__(self, shape: Shape, input_size: int) -> None:
        super().__init__()
        self._head_dim = shape.head_dim
        self.q_proj = nn.Linear(input_size, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)

    def project(self, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, LayerCache]:
        """Return rotated queries [B, num_heads, T, head_dim] and the keys and values of x."""
        heads = (*x.shape[:2], -1, self._head_dim)
        queries = self.q_proj(x).view(heads).transpose(1, 2)
        keys = self.k_proj(x).view(heads).transpose(1, 2)
        values = self.v_proj(x).view(heads).transpose(1, 2)
        return apply_rope(queries, rope), LayerCache(apply_rope(keys, rope), values)

    def merge(self, heads: torch.Tensor) -> torch.Tensor:
        """Bring [B, num_heads, T, head_dim] back to [B, T, hidden]."""
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def attend_causal(queries: torch.Tensor, cache: LayerCache) -> torch.Tensor:
    """Attend from the last T slots of a cache: the whole of it, or one new token behind it.

    Args:
        queries: [B, num_heads, T, head_dim], T = 1 or the length of the cache.

    Returns:
        [B, num_heads, T, head_dim].
    """
    num_heads, length = queries.shape[1:3]
    if length > 1:
        keys, values = (repeat_heads(x, num_heads) for x in cache)
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    # One token: the heads of a group are rows over the same keys, so nothing has to be copied.
    grouped = queries.view(queries.shape[0], cache.keys.shape[1], -1, queries.shape[-1])
    return F.scaled_dot_product_attention(grouped, *cache).view(queries.shape)
