"""Faster torch versions of layers for which SGLang's own fallback reads the data several times.

Each handles every token by itself, so a token's result never depends on the rest of its batch.
"""

from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from torch.nn.functional import rms_norm as torch_rms_norm

Tensor = torch.Tensor


def register_layers(platform_key: str) -> None:
    """Make SGLang use these layers on the platform `platform_key`."""
    for layer, forward in (
        (RMSNorm, rms_norm),
        (RotaryEmbedding, rotate),
        (Llama3RotaryEmbedding, rotate),
    ):
        BaseFusedOp.register_oot_forward(layer, forward, platform_key)


def rms_norm(
    layer: RMSNorm,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the RMS norm of x; with `residual`, that of x + residual, and the sum itself.

    Only float32 uses torch's fused call. For other dtypes SGLang normalises the sum before it
    rounds it, so SGLang's own code runs.
    """
    if x.dtype != torch.float32 or x.shape[-1] != layer.hidden_size or layer.variance_size_override:
        return layer.forward_native(x, residual, post_residual_addition)
    if residual is not None:
        x = x + residual
        if post_residual_addition is not None:
            x = x + post_residual_addition
    out = torch_rms_norm(x, (layer.hidden_size,), layer.weight, layer.variance_epsilon)
    return out if residual is None else (out, x)


def rotate(
    layer: RotaryEmbedding,
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    offsets: Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[Tensor, Tensor]:
    """Apply the rotary embedding to queries and keys, with halves paired as in GPT-NeoX.

    Definition: out[i] = x[i] cos[i] - x[i + D/2] sin[i], and
        out[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i], for i < D/2.
    """
    if not layer.is_neox_style or layer.rotary_dim != layer.head_size or offsets is not None:
        return layer.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    # Axes of the gathered table: token, head, (cos, signed sin), D.
    cos, sin = rotary_table(layer, query.dtype)[positions.flatten()].unsqueeze(1).unbind(2)
    return rotate_heads(query, cos, sin), rotate_heads(key, cos, sin)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, heads * D] (or [T, heads, D]) by [T, 1, D] factors; same shape out."""
    heads = x.reshape(x.shape[0], -1, cos.shape[-1])
    swapped = heads.roll(cos.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cos, swapped, sin).view(x.shape)


def rotary_table(layer: RotaryEmbedding, dtype: torch.dtype) -> Tensor:
    """Return [positions, 2, D]: cos repeated twice, and sin with its first half negated.

    The table is stored on the layer, until SGLang replaces the cache that it was computed from.
    """
    made_from, table = layer.__dict__.get("_cast_table", (None, None))
    if made_from is not layer.cos_sin_cache or table.dtype != dtype:
        cos, sin = layer.cos_sin_cache.to(dtype).chunk(2, dim=-1)
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        layer.__dict__["_cast_table"] = (layer.cos_sin_cache, table)
    return table
