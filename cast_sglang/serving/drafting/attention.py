"""Attention over one layer of a draft tree, for the backends that can express it.

A layer's query rows are B * W nodes. Each attends to its request's committed prefix, whose slots
stand in `req_to_token`, and to its own ancestors and itself, whose slots the worker passes.
SGLang's multi-step draft backends cannot express that: they give every branch one line of slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cast_sglang.errors import HostError
from cast_sglang.ops import ops_for

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
    max_rows = draft_runner.req_to_token_pool.size * topk
    backend = triton_tree_backend_class()(
        draft_runner,
        skip_prefill=True,
        kv_indptr_buf=torch.zeros(max_rows + 1, dtype=torch.int32, device=draft_runner.device),
    )
    # A draft with MLA asks the backend for its name, which else is the target's.
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = "triton"
    return backend


def triton_tree_backend_class() -> type:
    """Return SGLang's `triton` backend with tree layers on top, eager and captured."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    class TritonTreeDraftBackend(TritonAttnBackend):
        """Triton decode attention whose rows are tree nodes."""

        # Sizes of eager layers' slot lists; a server whose layers are captured needs none.
        needs_cpu_seq_lens = True

        def init_tree_metadata(self, forward_batch: ForwardBatch, path_slots: torch.Tensor) -> None:
            spec_info = forward_batch.spec_info
            spec_info.kv_indptr, spec_info.kv_indices = self._new_lists(forward_batch, path_slots)
            depth = torch.full((1,), path_slots.shape[2], device=self.device)
            self.list_slots(forward_batch, path_slots, depth)
            self.init_forward_metadata(forward_batch)

        def list_slots(
            self, forward_batch: ForwardBatch, path_slots: torch.Tensor, depth: torch.Tensor
        ) -> None:
            """Write the lists of a layer into the tensors of `forward_batch.spec_info`."""
            ops_for(self.device).list_slots(
                self.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                path_slots,
                depth,
                forward_batch.spec_info.kv_indptr,
                forward_batch.spec_info.kv_indices,
            )

        def _new_lists(
            self, forward_batch: ForwardBatch, path_slots: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            batch_size, width, depth = path_slots.shape
            if forward_batch.seq_lens_cpu is None:
                num_slots = batch_size * width * self.max_context_len
            else:
                num_slots = width * (int(forward_batch.seq_lens_cpu.sum()) + batch_size * depth)
            indptr = torch.empty(batch_size * width + 1, dtype=torch.int32, device=self.device)
            return indptr, torch.empty(num_slots, dtype=torch.int64, device=self.device)

        def capture_lists(self, max_nodes: int) -> None:
            """Allocate what captured layers of up to `max_nodes` nodes read and write."""
            num_slots = max_nodes * self.max_context_len  # ancestors included, see `hooks`
            self.tree_kv_indptr = torch.zeros(max_nodes + 1, dtype=torch.int32, device=self.device)
            self.tree_kv_indices = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
            self.init_cuda_graph_state(max_nodes, max_nodes, kv_indices_buf=self.tree_kv_indices)

        def init_captured_tree_metadata(
            self, forward_batch: ForwardBatch, path_slots: torch.Tensor, depth: torch.Tensor
        ) -> None:
            """As `init_tree_metadata`, in the buffers of `capture_lists`: all on the device."""
            num_nodes = path_slots.shape[0] * path_slots.shape[1]
            spec_info = forward_batch.spec_info
            spec_info.kv_indptr = self.tree_kv_indptr[: num_nodes + 1]
            spec_info.kv_indices = self.tree_kv_indices
            self.list_slots(forward_batch, path_slots, depth)
            self.get_num_kv_splits(
                self.cuda_graph_num_kv_splits[:num_nodes], forward_batch.seq_lens
            )
            self.init_forward_metadata_out_graph(forward_batch, in_capture=True)

    return TritonTreeDraftBackend
