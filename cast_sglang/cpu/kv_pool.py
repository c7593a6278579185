"""A KV pool that stores a slot's keys and values in one row, so that one gather reads both."""

import contextlib
import math
import mmap
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from cast_sglang.errors import HostError


class FusedRowKVPool(MHATokenToKVPool):
    """SGLang's pool, with one allocation [layers, slots, 2, heads, head_dim] for keys and values.

    `k_buffer` and `v_buffer` are strided views of it, per layer [slots, heads, head_dim], as SGLang
    expects them. A row of `layer_rows` is the same memory: a slot's keys, then its values.
    """

    def _create_buffers_normal(self) -> None:
        if self.head_dim != self.v_head_dim or self.store_dtype != self.dtype:
            raise HostError(
                "SGLANG_PLATFORM=cast_cpu needs keys and values of one head size, stored in the "
                f"model's precision; got head_dim {self.head_dim}/{self.v_head_dim} and "
                f"--kv-cache-dtype {self.dtype}"
            )
        # Slots 0 up to page_size are padding: SGLang writes the keys of dummy tokens there.
        shape = (self.layer_num, self.size + self.page_size, 2, self.head_num, self.head_dim)
        zeros = _zeros_as_used(math.prod(shape) * self.store_dtype.itemsize)
        self.storage = zeros.view(self.store_dtype).view(shape)
        self.rows = self.storage.flatten(2)
        self.k_buffer = list(self.storage[:, :, 0].unbind(0))
        self.v_buffer = list(self.storage[:, :, 1].unbind(0))

    def layer_rows(self, layer_id: int) -> torch.Tensor:
        """Return [slots, 2 * heads * head_dim], the rows of one layer, as a view of the pool."""
        return self.rows[layer_id - self.start_layer]

    def write(self, layer_id: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys and values of new tokens.

        Args:
            slots: [T] int64, distinct except for padding slots.
            k: [T, heads, head_dim], dtype of the pool.
            v: the same.
        """
        self.layer_rows(layer_id).index_copy_(0, slots, torch.stack((k, v), dim=1).flatten(1))

    def _store_kv_layer(
        self,
        layer_idx: int,
        loc: torch.Tensor,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.write(layer_idx + self.start_layer, loc, cache_k, cache_v)

    def _init_kv_copy_and_warmup(self) -> None:
        # SGLang moves slots by a Triton kernel over raw pointers; here two torch ops do it.
        self._kv_copy_config = None

    def _move_kv_cache_impl(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        # Most accepted tokens are in the right slots already. A move copies the row of every layer.
        moves = src_loc != tgt_loc
        # The gather completes before the scatter starts, so overlapping moves are safe.
        moved = self.rows.index_select(1, src_loc[moves].long())
        self.rows.index_copy_(1, tgt_loc[moves].long(), moved)


def _zeros_as_used(num_bytes: int) -> torch.Tensor:
    """Return [num_bytes] uint8 zeros whose memory is allocated on first use, in huge pages.

    `torch.zeros` would allocate all of it now. With small pages, a step that first uses some slots
    waits for hundreds of page faults: 20 ms for 56 slots of 9 layers on two cores of an EPYC.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
