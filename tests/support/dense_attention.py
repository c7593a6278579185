"""`fa3`, `flashinfer` and `trtllm_mha` without a GPU: what they call, in plain torch.

It is strict about what it is given. A layout of another number of rows, a table that is too short,
or lengths that do not add up end the server, and wrong slots or masks give other tokens than plain
decoding.
"""

import itertools
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from sglang.srt.layers.attention.trtllm_mla_backend import TRTLLM_MLA_MAX_BATCH_SIZE

WRAPPER_BYTES = 8 << 20  # of each wrapper of `flashinfer`, for its plan
NOTHING = -math.inf  # the logarithm of a sum over no key
BACKENDS = ("triton", "fa3", "flashinfer", "trtllm_mha")


def attend(q, keys, values, scale, allowed, sinks=None):
    """Attend with rows [T, H, D] to keys [S, KV heads, D]; a row sees the keys that are allowed.

    Args:
        allowed: [T, S] bool.
        sinks: [H], scores of a key without a value.

    Returns:
        [T, H, D], and the logarithms of the sums, [H, T].
    """
    groups = q.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(groups, dim=1) for each in (keys, values))
    scores = torch.einsum("thd,shd->hts", q, keys) * scale
    scores = scores.masked_fill(~allowed, NOTHING)
    sums = scores.logsumexp(dim=2)
    if sinks is not None:
        sums = torch.logaddexp(sums, sinks.unsqueeze(1))
    return torch.einsum("hts,shd->thd", (scores - sums.unsqueeze(2)).exp(), values), sums


def up_to_the_own(rows, length, is_causal=True, window=-1):
    """Return which of `length` keys each of the last `rows` sees, [rows, length] bool.

    Args:
        window: keys before a row's own that it sees; -1 for all.
    """
    own, keys = torch.arange(length - rows, length).unsqueeze(1), torch.arange(length)
    allowed = keys <= (own if is_causal else length)
    return allowed if window < 0 else allowed & (keys >= own - window)


def attend_to_pages(
    q, k_cache, v_cache, table, lengths, ends, scale, causal, window=-1, sinks=None, qv=None
):
    """Attend with the rows of each request to its pages of a cache [pages, page, KV heads, D].

    Args:
        qv: [T, H, Dv], of latent attention: more of the queries, whose keys are the values.
        table: [B, pages] int32.
        lengths: [B] int32, keys of each request.
        ends: [B + 1] int32, where the rows of each request begin and end.

    Returns:
        As `attend`.
    """
    for layout in (table, lengths, ends):
        assert layout.dtype == torch.int32
    ends, lengths, page_size = ends.tolist(), lengths.tolist(), k_cache.shape[1]
    assert len(ends) == len(lengths) + 1 == len(table) + 1
    assert ends[0] == 0 and ends[-1] == len(q) and min(np.diff(ends)) > 0
    attended = q.new_zeros(*q.shape[:2], v_cache.shape[-1])
    sums = q.new_full((q.shape[1], len(q)), NOTHING)
    if qv is not None:
        q, k_cache = torch.cat((q, qv), dim=-1), torch.cat((k_cache, v_cache), dim=-1)
    for number, length in enumerate(lengths):
        if not length:
            continue
        pages = table[number, : math.ceil(length / page_size)].long()
        assert len(pages) * page_size >= length and int(pages.max()) < len(k_cache)
        keys, values = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        rows = slice(ends[number], ends[number + 1])
        allowed = up_to_the_own(rows.stop - rows.start, length, causal, window)
        attended[rows], sums[:, rows] = attend(q[rows], keys, values, scale, allowed, sinks)
    return attended, sums


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
    qv=None,
    k_descale=None,
    v_descale=None,
):
    """Attend as `fa3` does."""
    assert k_descale is None and v_descale is None
    assert window_size == (-1, -1) and not softcap and out is None and ver == 3
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    if cu_seqlens_k_new is not None:
        assert cu_seqlens_k_new.tolist() == [0, *cache_seqlens.cumsum(0).tolist()]
    layout = page_table, cache_seqlens, cu_seqlens_q
    attended, sums = attend_to_pages(q, k_cache, v_cache, *layout, softmax_scale, causal, qv=qv)
    return (attended, sums) if return_softmax_lse else attended


def flash_attn_varlen_func(
    *,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    causal,
    return_softmax_lse=False,
    out=None,
    ver=3,
):
    """Attend as `fa3` does with prompts of latent attention: [T, H, D] to [S, H, D]."""
    assert causal and not return_softmax_lse and out is None and ver == 3
    attended = q.new_zeros(*q.shape[:2], v.shape[-1])
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    parts = [(slice(a, b), slice(c, d)) for (a, c), (b, d) in itertools.pairwise(ends)]
    assert parts[-1][0].stop == len(q) and parts[-1][1].stop == len(k)
    for rows, keys in parts:
        num_rows, length = rows.stop - rows.start, keys.stop - keys.start
        assert num_rows <= max_seqlen_q and length <= max_seqlen_k
        allowed = up_to_the_own(num_rows, length)
        attended[rows], _ = attend(q[rows], k[keys], v[keys], softmax_scale, allowed)
    return attended


def merge_states(first, first_sums, second, second_sums, *args, **kwargs):
    """Merge attention [T, H, D] over two sets of keys by the logarithms of their sums [T, H]."""
    sums = torch.logaddexp(first_sums, second_sums)
    weights = [(part - sums).exp().nan_to_num(0.0) for part in (first_sums, second_sums)]
    return first * weights[0].unsqueeze(2) + second * weights[1].unsqueeze(2), sums


def trtllm_decode(
    *,
    query,
    kv_cache,
    block_tables,
    seq_lens,
    max_seq_len,
    bmm1_scale,
    bmm2_scale,
    window_left,
    sinks,
    out,
    q_len_per_req=1,
    mask=None,
    **unread,
):
    """Attend as `trtllm_mha` decodes and verifies: so many rows each, the last keys their own."""
    assert bmm2_scale == 1.0 and out is None and mask is None
    assert len(query) == len(seq_lens) * q_len_per_req
    assert q_len_per_req <= int(seq_lens.min()) and int(seq_lens.max()) <= max_seq_len
    ends = torch.arange(len(seq_lens) + 1, dtype=torch.int32) * q_len_per_req
    caches = (cache.transpose(1, 2) for cache in kv_cache)  # from [pages, KV heads, page, D]
    layout = block_tables, seq_lens, ends
    return attend_to_pages(query, *caches, *layout, bmm1_scale, True, window_left, sinks)[0]


def trtllm_prompts(
    *,
    query,
    kv_cache,
    block_tables,
    seq_lens,
    max_q_len,
    max_kv_len,
    bmm1_scale,
    cum_seq_lens_q,
    causal,
    window_left,
    sinks,
    out,
    **unread,
):
    """Attend as `trtllm_mha` does with prompts."""
    assert out is None
    assert int(cum_seq_lens_q.diff().max()) <= max_q_len and int(seq_lens.max()) <= max_kv_len
    caches = (cache.transpose(1, 2) for cache in kv_cache)
    layout = block_tables, seq_lens, cum_seq_lens_q
    return attend_to_pages(query, *caches, *layout, bmm1_scale, causal, window_left, sinks)[0]


class RaggedPrompts:
    """`flashinfer`'s wrapper for the tokens of prompts among themselves."""

    def __init__(self, workspace, layout, backend):
        assert layout == "NHD"

    def begin_forward(self, qo_indptr, kv_indptr, q_heads, kv_heads, head_dim, *, q_data_type):
        assert torch.equal(qo_indptr, kv_indptr)
        self._ends = qo_indptr.tolist()

    def forward_return_lse(self, q, k, v, *, causal, sm_scale, logits_soft_cap, window_left=-1):
        assert causal and window_left == -1 and not logits_soft_cap and self._ends[-1] == len(q)
        attended, sums = torch.zeros_like(q), q.new_zeros(len(q), q.shape[1])
        for begin, end in zip(self._ends, self._ends[1:], strict=False):
            rows, allowed = slice(begin, end), up_to_the_own(end - begin, end - begin)
            found = attend(q[rows], k[rows], v[rows], sm_scale, allowed)
            attended[rows], sums[rows] = found[0], found[1].T
        return attended, sums

    def forward(self, *args, **kwargs):
        return self.forward_return_lse(*args, **kwargs)[0]


class Paged:
    """`flashinfer`'s wrapper for rows over slots of the cache.

    What runs reads the buffers of the layout, as a captured kernel does, and a captured one has the
    number of requests and rows of its first layout.
    """

    def __init__(
        self,
        workspace,
        layout,
        *,
        backend,
        use_cuda_graph=False,
        use_tensor_cores=False,
        qo_indptr_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        **buffers,
    ):
        assert layout == "NHD" and backend == "fa2"
        self.is_cuda_graph_enabled, self._rows = use_cuda_graph, None
        self._qo_indptr_buf, self._mask_indptr_buf = qo_indptr_buf, mask_indptr_buf
        self._custom_mask_buf = custom_mask_buf
        # The wrapper of decode names its buffers otherwise.
        for name, buffer in buffers.items():
            setattr(self, f"_{name.removesuffix('fer')}", buffer)
        # What SGLang's own plan reads and calls, `fast_prefill_plan`.
        self._backend, self._max_total_num_rows = backend, None
        self.device, self._float_workspace_buffer = torch.device("cpu"), workspace
        self._int_workspace_buffer = torch.empty(WRAPPER_BYTES, dtype=torch.uint8)
        self._pin_memory_int_workspace_buffer = None
        self._cached_module = SimpleNamespace(plan=self._take_plan)

    def lay_out(self, qo_indptr, kv_indptr, kv_indices, last_page_len, page_size, mask, window=-1):
        """Take the layout of a pass."""
        assert page_size == 1 and window == -1 and (last_page_len == 1).all()
        for layout in (qo_indptr, kv_indptr, kv_indices, last_page_len):
            assert layout.dtype == torch.int32
        assert len(qo_indptr) == len(kv_indptr) == len(last_page_len) + 1
        rows, lengths = qo_indptr.diff(), kv_indptr.diff()
        assert qo_indptr[0] == kv_indptr[0] == 0 and (rows > 0).all() and (lengths >= 0).all()
        assert kv_indptr[-1] <= len(kv_indices)
        packed = mask_indptr = None
        if mask is not None:
            packed, mask_indptr = packed_mask(mask, (rows * lengths).tolist())
        if not self.is_cuda_graph_enabled:
            self._qo_indptr_buf, self._paged_kv_indptr_buf = qo_indptr.clone(), kv_indptr.clone()
            self._paged_kv_indices_buf = kv_indices.clone()
            self._custom_mask_buf, self._mask_indptr_buf = packed, mask_indptr
            return
        self._rows = self._rows or int(qo_indptr[-1])
        assert self._rows == int(qo_indptr[-1]) and len(self._paged_kv_indptr_buf) == len(kv_indptr)
        self._paged_kv_indptr_buf.copy_(kv_indptr)
        if kv_indices is not self._paged_kv_indices_buf:
            assert len(kv_indices) <= len(self._paged_kv_indices_buf)
            self._paged_kv_indices_buf[: len(kv_indices)].copy_(kv_indices)
        if self._qo_indptr_buf is None:  # of decode, which has one row each
            self._qo_indptr_buf = qo_indptr.clone()
        self._qo_indptr_buf.copy_(qo_indptr)
        assert (packed is None) == (self._custom_mask_buf is None)
        if packed is not None:
            assert len(packed) <= len(self._custom_mask_buf)
            self._custom_mask_buf[: len(packed)].copy_(packed)
            self._mask_indptr_buf.copy_(mask_indptr)

    def _take_plan(self, workspace, on_device, pinned, qo_indptr, kv_indptr, lengths, rows, *rest):
        """Check a captured pass that SGLang has laid out by what the host knows."""
        assert self._rows == rows == int(qo_indptr[-1])
        assert torch.equal(qo_indptr, self._qo_indptr_buf)
        assert torch.equal(kv_indptr, self._paged_kv_indptr_buf)
        assert torch.equal(lengths, kv_indptr.diff())

    def forward_return_lse(
        self,
        q,
        kv_cache,
        *,
        sm_scale,
        logits_soft_cap,
        k_scale,
        v_scale,
        causal=True,
        window_left=-1,
    ):
        assert window_left == -1 and not logits_soft_cap and k_scale is v_scale is None
        ends, begins = self._qo_indptr_buf.tolist(), self._paged_kv_indptr_buf.tolist()
        assert ends[-1] == len(q)
        attended, sums = torch.zeros_like(q), q.new_full((len(q), q.shape[1]), NOTHING)
        for number in range(len(ends) - 1):
            rows, slots = slice(*ends[number : number + 2]), slice(*begins[number : number + 2])
            num_rows, length = rows.stop - rows.start, slots.stop - slots.start
            if not length:
                continue
            allowed = up_to_the_own(num_rows, length, causal)
            if self._custom_mask_buf is not None:
                begin = int(self._mask_indptr_buf[number])
                allowed = unpacked_mask(self._custom_mask_buf[begin:], num_rows, length)
                assert allowed.diagonal(length - num_rows).all()  # each row sees itself
            keys, values = (cache[self._paged_kv_indices_buf[slots].long()] for cache in kv_cache)
            found = attend(q[rows], keys, values, sm_scale, allowed)
            attended[rows], sums[rows] = found[0], found[1].T
        return attended, sums

    def forward(self, *args, **kwargs):
        return self.forward_return_lse(*args, **kwargs)[0]


class PagedRows(Paged):
    """That of prompts and verify."""

    def begin_forward(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        last_page_len,
        q_heads,
        kv_heads,
        head_dim,
        page_size,
        *,
        custom_mask=None,
        window_left=-1,
        **unread,
    ):
        # It reads all of this on the host. So it may at capture, and not before each replay.
        assert self._rows is None
        layout = qo_indptr, kv_indptr, kv_indices, last_page_len, page_size
        self.lay_out(*layout, custom_mask, window_left)


class PagedDecode(Paged):
    """That of decode."""

    def begin_forward(
        self, kv_indptr, kv_indices, last_page_len, q_heads, kv_heads, head_dim, page_size, **unread
    ):
        rows = torch.arange(len(kv_indptr), dtype=torch.int32)
        self.lay_out(rows, kv_indptr, kv_indices, last_page_len, page_size, None)


def fast_decode_plan(wrapper, kv_indptr, *args, global_override_indptr_cpu, **kwargs):
    """Lay out a captured decode pass; it takes the lengths from the host."""
    assert torch.equal(global_override_indptr_cpu, kv_indptr)
    PagedDecode.begin_forward(wrapper, kv_indptr, *args, **kwargs)


def packed_mask(mask, cells):
    """Return a flat mask in bytes of eight cells, and where each request's begin, [B + 1] int32."""
    assert mask.dtype == torch.bool and sum(cells) <= len(mask)
    parts = mask[: sum(cells)].split(cells)
    parts = [np.packbits(part.numpy(), bitorder="little") for part in parts]
    indptr = torch.tensor([0, *np.cumsum([len(part) for part in parts])], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(parts)), indptr


def unpacked_mask(packed, num_rows, length):
    """Return the mask of one request, [rows, length] bool."""
    bits = np.unpackbits(packed.numpy(), count=num_rows * length, bitorder="little")
    return torch.from_numpy(bits).bool().view(num_rows, length)


class OnTheHost:
    """torch, for a module that makes tensors on CUDA by name."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *args, device=None, **kwargs):
        return torch.empty(*args, **kwargs)

    def zeros(self, *args, device=None, **kwargs):
        return torch.zeros(*args, **kwargs)


def counters(device, num_q_heads, max_batch_size):
    """Make the counters of `trtllm_mha`'s kernels, of 4 bytes, for as many requests as SGLang."""
    requests = max(TRTLLM_MLA_MAX_BATCH_SIZE, max_batch_size)
    return torch.zeros(4 * requests * num_q_heads, dtype=torch.uint8)


def install() -> None:
    """Make them backends of this process."""
    kernels, flash = ModuleType("sgl_kernel"), ModuleType("sgl_kernel.flash_attn")
    kernels.merge_state_v2 = merge_states
    flash.flash_attn_with_kvcache = flash_attn_with_kvcache
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    flash.get_scheduler_metadata = lambda **sizes: None
    sys.modules.update({"sgl_kernel": kernels, "sgl_kernel.flash_attn": flash})
    from sglang.srt.arg_groups import attention_hook
    from sglang.srt.layers.attention import flashattention_backend as fa3
    from sglang.srt.layers.attention import flashinfer_backend as flashinfer
    from sglang.srt.layers.attention import trtllm_mha_backend as trtllm
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from cast_sglang.serving.launch import backends

    fa3.flash_attn_with_kvcache = flash_attn_with_kvcache
    fa3.flash_attn_varlen_func = flash_attn_varlen_func
    fa3.merge_state_v2_wrapper = fa3.merge_state_v2 = merge_states
    ATTENTION_BACKENDS["fa3"] = fa3.FlashAttentionBackend
    flashinfer.torch = OnTheHost()
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = PagedRows
    flashinfer.BatchDecodeWithPagedKVCacheWrapper = PagedDecode
    flashinfer.BatchPrefillWithRaggedKVCacheWrapper = RaggedPrompts
    flashinfer.fast_decode_plan, flashinfer._safe_merge_state = fast_decode_plan, merge_states
    trtllm.flashinfer = SimpleNamespace(
        decode=SimpleNamespace(trtllm_batch_decode_with_kv_cache=trtllm_decode),
        prefill=SimpleNamespace(trtllm_batch_context_with_kv_cache=trtllm_prompts),
    )
    trtllm.make_persistent_multi_ctas_kv_counter_buffer = counters
    platform = attention_hook.get_platform()
    blackwell = SimpleNamespace(is_sm90=False, is_sm100=True, is_sm120=False)
    attention_hook.get_platform = lambda: OneOf(blackwell, platform)
    backends._backends_of_the_cpu = lambda server_args: BACKENDS


class OneOf:
    """An object with the attributes of the first of these that has them."""

    def __init__(self, *objects):
        self._objects = objects

    def __getattr__(self, name):
        return getattr(next(each for each in self._objects if hasattr(each, name)), name)
