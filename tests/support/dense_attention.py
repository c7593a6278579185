"""`fa3` without a GPU: its entry functions in plain torch, strict about what they are given.

A layout of another number of rows, a table that is too short, or lengths that do not add up end the
server, and wrong slots give other tokens than plain decoding.
"""

import math
import sys
from types import ModuleType

import torch

NOTHING = -math.inf  # the logarithm of a sum over no key


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    *,
    page_table,
    cache_seqlens,
    cu_seqlens_q,
    max_seqlen_q,
    softmax_scale,
    causal,
    cu_seqlens_k_new=None,
    window_size=(-1, -1),
    softcap=0.0,
    return_softmax_lse=False,
    num_splits=0,
    scheduler_metadata=None,
    out=None,
    ver=3,
):
    """Attend with rows [T, H, D] to a paged cache [pages, page, KV heads, D].

    Returns:
        [T, H, D], and with `return_softmax_lse` the logarithms of the sums, [H, T].
    """
    assert window_size == (-1, -1) and not softcap and out is None and ver == 3
    for layout in (page_table, cache_seqlens, cu_seqlens_q):
        assert layout.dtype == torch.int32
    ends, lengths = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    counts = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    assert ends[0] == 0 and ends[-1] == len(q) and min(counts) > 0
    assert max(counts) <= max_seqlen_q and len(counts) == len(lengths) == len(page_table)
    if cu_seqlens_k_new is not None:
        assert cu_seqlens_k_new.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    page_size, groups = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    attended, sums = torch.zeros_like(q), q.new_full((q.shape[1], len(q)), NOTHING)
    for number, (begin, count, length) in enumerate(zip(ends, counts, lengths, strict=False)):
        if not length:
            continue
        pages = page_table[number, : math.ceil(length / page_size)].long()
        assert len(pages) * page_size >= length and int(pages.max()) < len(k_cache)
        keys, values = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(groups, dim=1)
            for cache in (k_cache, v_cache)
        )
        rows = slice(begin, begin + count)
        scores = torch.einsum("thd,shd->hts", q[rows], keys) * softmax_scale
        if causal:
            last = torch.arange(count).unsqueeze(1) + length - count
            scores = scores.masked_fill(torch.arange(length) > last, NOTHING)
        sums[:, rows] = scores.logsumexp(dim=2)
        attended[rows] = torch.einsum("hts,shd->thd", scores.softmax(dim=2), values)
    return (attended, sums) if return_softmax_lse else attended


def merge_states(first, first_sums, second, second_sums, *args, **kwargs):
    """Merge attention [T, H, D] over two sets of keys by the logarithms of their sums [T, H]."""
    sums = torch.logaddexp(first_sums, second_sums)
    weights = [(part - sums).exp().nan_to_num(0.0) for part in (first_sums, second_sums)]
    return first * weights[0].unsqueeze(2) + second * weights[1].unsqueeze(2), sums


def install() -> None:
    """Make `fa3` a backend of this process."""
    kernels, flash = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.flash_attn")
    kernels.merge_state_v2 = merge_states
    flash.flash_attn_with_kvcache = flash.flash_attn_varlen_func = flash_attn_with_kvcache
    flash.get_scheduler_metadata = lambda **sizes: None
    sys.modules.update({"sgl_kernel": kernels, "sgl_kernel.flash_attn": flash})
    from sglang.srt.layers.attention import flashattention_backend as module
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from cast_sglang.serving.launch import backends

    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.merge_state_v2_wrapper = module.merge_state_v2 = merge_states
    ATTENTION_BACKENDS["fa3"] = module.FlashAttentionBackend
    backends._backends_of_the_cpu = lambda server_args: ("triton", "fa3")
