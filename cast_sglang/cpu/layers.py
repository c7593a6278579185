"""Layers whose SGLang torch fallback spends several passes where fewer do.

Each works on one token at a time, so a token's result never depends on the rest of its batch.
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
    """Make SGLang dispatch its layers here on the platform that answers to `platform_key`."""
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
    """RMS norm of x, or of x + residual together with that sum.

    Only float32 takes the fused call: below it, SGLang normalises the sum before rounding it.
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
    """Rotary embedding of queries and keys, halves paired as in GPT-NeoX.

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
    """[positions, 2, D]: cos twice over, and sin with its first half negated.

    Kept on the layer until SGLang replaces the cache it was made from, to lengthen it.
    """
    made_from, table = layer.__dict__.get("_cast_table", (None, None))
    if made_from is not layer.cos_sin_cache or table.dtype != dtype:
        cos, sin = layer.cos_sin_cache.to(dtype).chunk(2, dim=-1)
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        layer.__dict__["_cast_table"] = (layer.cos_sin_cache, table)
    return table
