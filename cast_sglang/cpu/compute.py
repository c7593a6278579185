"""The two attention computations: batched for equal widths, and per request for prefill."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from cast_sglang.cpu.reads import BatchedRead, PrefillRead


def attend_batched(
    q: torch.Tensor, rows: torch.Tensor, read: BatchedRead, num_kv_heads: int, scaling: float
) -> torch.Tensor:
    """Compute attention of `read.width` new tokens per request over the slots that it reads.

    Definition: out[b, i, h] = sum_l softmax_l(scaling * q[b, i, h] . k[b, l, h // group] + bias) v

    Args:
        q: [B * Q, heads, head_dim] float, request-major.
        rows: [slots, 2 * num_kv_heads * head_dim], dtype of q: keys, then values of one layer; see
            `FusedRowKVPool`.
        scaling: factor of q . k.

    Returns:
        [B * Q, heads * head_dim], dtype of q.
    """
    num_tokens, num_heads, head_dim = q.shape
    batch, width, length = read.num_requests, read.width, read.length
    group = num_heads // num_kv_heads
    # kv: (B, L, 2, KV heads, D)
    kv = rows.index_select(0, read.slots).view(batch, length, 2, num_kv_heads, head_dim)
    k, v = kv.transpose(1, 3).unbind(2)  # (B, KV heads, L, D)
    # Query heads that share a KV head become extra query rows, so that each key is read once.
    # folded: (B, KV heads, group * Q, D)
    folded = q.view(batch, width, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, num_kv_heads, group * width, head_dim)
    out = scaled_dot_product_attention(folded, k, v, read.bias_for(group, q.dtype), scale=scaling)
    out = out.view(batch, num_kv_heads, group, width, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_tokens, num_heads * head_dim)


def attend_prefill(
    q: torch.Tensor, rows: torch.Tensor, reads: list[PrefillRead], num_kv_heads: int, scaling: float
) -> torch.Tensor:
    """Compute causal attention of each request's new tokens over its prefix and themselves.

    Args and Returns: as for `attend_batched`, with T new tokens in all, one request after another.
    """
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(num_heads, num_tokens, head_dim)
    queries = q.transpose(0, 1)
    for read in reads:
        kv = rows.index_select(0, read.slots).view(-1, 2, num_kv_heads, head_dim)
        k, v = kv.permute(1, 2, 0, 3).unbind(0)  # (KV heads, L, D)
        for start, stop, visible in read.blocks:
            seen = k.shape[1] if visible is None else visible.shape[1]
            out[:, start:stop] = scaled_dot_product_attention(
                queries[None, :, start:stop],
                k[None, :, :seen],
                v[None, :, :seen],
                visible,
                is_causal=visible is None,
                scale=scaling,
                enable_gqa=num_heads != num_kv_heads,
            )[0]
    return out.transpose(0, 1).reshape(num_tokens, num_heads * head_dim)
