"""Attention over one layer of a draft tree, for the backends that can express it.

A layer's query rows are B * W nodes. Each attends to its request's committed prefix, whose slots
stand in `req_to_token`, and to its own ancestors and itself, whose slots the worker passes.
SGLang's multi-step draft backends cannot say that: they give every branch one line of slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cast_sglang.errors import HostError

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def create_tree_backend(draft_runner: ModelRunner, topk: int) -> Any:
    """Return the draft runner's attention backend with `init_tree_metadata` on top.

    Raises:
        HostError: the draft's attention backend cannot run a tree layer.
    """
    from sglang.srt.speculative.draft_utils import attention_backends

    name = draft_runner.draft_attention_backend or attention_backends()[1]
    if name == "cast_cpu":
        return _cpu_tree_backend(draft_runner)
    if name == "triton":
        return _triton_tree_backend(draft_runner, topk)
    raise HostError(
        f"no tree attention for the draft on {name!r}; pass "
        "--speculative-draft-attention-backend triton"
    )


def _cpu_tree_backend(draft_runner: ModelRunner) -> Any:
    from cast_sglang.cpu.attention import CastCpuAttnBackend
    from cast_sglang.cpu.reads import DraftPrefix, tree_decode_read

    class CpuTreeDraftBackend(CastCpuAttnBackend):
        """The CPU platform's attention; all layers of a step share one read of the prefix."""

        _step: ForwardBatch | None = None
        _prefix: DraftPrefix

        def init_tree_metadata(self, forward_batch: ForwardBatch, path_slots: torch.Tensor) -> None:
            if forward_batch is not self._step:
                self._step = forward_batch
                self._prefix = DraftPrefix.of(
                    self.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens
                )
            self.read = tree_decode_read(self._prefix, path_slots)

    return CpuTreeDraftBackend(draft_runner)


def _triton_tree_backend(draft_runner: ModelRunner, topk: int) -> Any:
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    class TritonTreeDraftBackend(TritonAttnBackend):
        """Triton decode attention whose rows are tree nodes."""

        def init_tree_metadata(self, forward_batch: ForwardBatch, path_slots: torch.Tensor) -> None:
            spec_info = forward_batch.spec_info
            spec_info.kv_indptr, spec_info.kv_indices = tree_kv_indices(
                self.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                int(forward_batch.seq_lens_cpu.sum()),
                path_slots,
            )
            self.init_forward_metadata(forward_batch)

    max_rows = draft_runner.req_to_token_pool.size * topk
    return TritonTreeDraftBackend(
        draft_runner,
        skip_prefill=True,
        kv_indptr_buf=torch.zeros(max_rows + 1, dtype=torch.int32, device=draft_runner.device),
    )


def tree_kv_indices(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_sum: int,
    path_slots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Build the packed slot list of each node of a layer: committed prefix, then own path.

    Definition: row (b, w) = req_to_token[req_pool_indices[b], :seq_lens[b]] ++ path_slots[b, w]

    Args:
        req_to_token: [rows, max_context] int, slot of each request's token.
        req_pool_indices: [B] int64. seq_lens: [B] int64, committed lengths.
        seq_lens_sum: sum of `seq_lens`, known to the host, so that no size is read back.
        path_slots: [B, W, depth] int64.

    Returns:
        kv_indptr [B * W + 1] int32 and kv_indices [seq_lens_sum * W + B * W * depth] int32.

    Effects: pure; no host sync.
    """
    batch_size, width, depth = path_slots.shape
    device = path_slots.device
    num_rows = batch_size * width
    prefix = seq_lens.to(torch.int64).repeat_interleave(width, output_size=num_rows)
    kv_indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
    kv_indptr[1:] = torch.cumsum(prefix + depth, dim=0)

    total = seq_lens_sum * width + num_rows * depth
    row = torch.arange(num_rows, device=device).repeat_interleave(prefix + depth, output_size=total)
    offset = torch.arange(total, device=device) - kv_indptr[row]
    beyond_prefix = offset - prefix[row]
    from_path = path_slots.view(num_rows, depth)[row, beyond_prefix.clamp(min=0)]
    from_prefix = req_to_token[
        req_pool_indices[row // width], torch.minimum(offset, prefix[row] - 1)
    ]
    return kv_indptr, torch.where(beyond_prefix >= 0, from_path, from_prefix).to(torch.int32)
