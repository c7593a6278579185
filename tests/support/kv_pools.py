"""The CPU platform's cache of keys and values, small."""

import torch

from cast_sglang.cpu.kv_pool import FusedRowKVPool


def make_pool(dtype=torch.float32, **changes):
    fields = dict(
        size=32,
        page_size=1,
        dtype=dtype,
        head_num=2,
        head_dim=4,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
        enable_kv_cache_copy=True,
    )
    return FusedRowKVPool(**(fields | changes))
