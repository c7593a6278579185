"""The attention backend, in plain torch: per layer one gather and one fused call for the batch.

Every forward that gives each request the same number of new tokens (decode, target verify, draft
decode, draft extend) uses a `BatchedRead`: the slots that each request reads, padded to the longest
request, and which of them each new token sees. It is built once per forward, and all layers share
it. Only prefill, whose requests differ in length, loops over the requests.
"""

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from cast_sglang.cpu.compute import attend_batched, attend_prefill
from cast_sglang.cpu.kv_pool import FusedRowKVPool
from cast_sglang.cpu.reads import (
    BatchedRead,
    DraftPrefix,
    PrefillRead,
    causal_read,
    decode_read,
    prefill_reads,
    tree_decode_read,
    verify_read,
)
from cast_sglang.errors import HostError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class CastCpuAttnBackend(AttentionBackend):
    """The `cast_cpu` attention backend: every forward mode of the target and of an EAGLE draft."""

    packed_rows: torch.Tensor | None = None
    """[T] int64, the rows that a forward runs, of the B * Q rows of its layout; None for all. The
    caller that packs the rows of a forward sets this before it and resets it after it."""

    def __init__(self, model_runner: "ModelRunner") -> None:
        super().__init__()
        if model_runner.use_mla_backend:
            raise HostError(
                "SGLANG_PLATFORM=cast_cpu supports multi-head and grouped-query attention, not MLA"
            )
        if not isinstance(model_runner.token_to_kv_pool, FusedRowKVPool):
            raise HostError(
                "SGLANG_PLATFORM=cast_cpu supports plain full attention only; got a "
                f"{type(model_runner.token_to_kv_pool).__name__}"
            )
        self.pool: FusedRowKVPool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.max_context_len = model_runner.model_config.context_len
        self.read: BatchedRead | list[PrefillRead] | None = None
        # Without a buffer, each verify allocates a mask of the size that it needs.
        self._verify_mask = VerifyMask(
            buffer=torch.empty(0, dtype=torch.bool), mode=TreeMaskMode.QLEN_ONLY, max_bs=0
        )

    @property
    def verify_mask(self) -> VerifyMask:
        return self._verify_mask

    def support_triton(self) -> bool:
        return False

    def init_forward_metadata(self, forward_batch: "ForwardBatch") -> None:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self.read = None
        elif mode.is_decode():
            self.read = decode_read(
                self.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens
            )
        elif mode.is_target_verify():
            spec_info = forward_batch.spec_info
            self.read = verify_read(
                self.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                spec_info.draft_token_num,
                spec_info.custom_mask,
            )
        elif mode.is_draft_extend_v2():
            width = forward_batch.input_ids.shape[0] // forward_batch.batch_size
            self.read = causal_read(
                self.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens, width
            )
        else:
            self.read = prefill_reads(
                self.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.extend_prefix_lens,
                forward_batch.extend_seq_lens,
                self.pool.dtype,
            )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: "RadixAttention",
        forward_batch: "ForwardBatch",
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        check_layer(layer, kwargs)
        if save_kv_cache and k is not None:
            self.pool.write(layer.layer_id, forward_batch.out_cache_loc, k, v)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        rows = self.pool.layer_rows(layer.layer_id)
        if isinstance(self.read, BatchedRead):
            packed = self.packed_rows
            if packed is None:
                return attend_batched(q, rows, self.read, layer.tp_k_head_num, layer.scaling)
            num_rows = self.read.num_requests * self.read.width
            q = q.new_zeros(num_rows, *q.shape[1:]).index_copy_(0, packed, q)
            out = attend_batched(q, rows, self.read, layer.tp_k_head_num, layer.scaling)
            return out.index_select(0, packed)
        assert self.read is not None, "init_forward_metadata has not run"
        return attend_prefill(q, rows, self.read, layer.tp_k_head_num, layer.scaling)

    # The read holds all that differs between the modes, so they run the same code.
    forward_extend = forward_decode


class CastCpuMultiStepDraftBackend:
    """Draft decode of EAGLE's fixed tree: one child backend per draft step.

    Branch k of a request owns `num_steps` slots, one per step. At step i it reads the committed
    prefix and its own slots 0..i, as with SGLang's GPU backends.
    """

    def __init__(self, model_runner: "ModelRunner", topk: int, speculative_num_steps: int) -> None:
        self.topk = topk
        self.num_steps = speculative_num_steps
        self.attn_backends = [
            CastCpuAttnBackend(model_runner) for _ in range(speculative_num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: "ForwardBatch") -> None:
        prefix = DraftPrefix.of(
            self.attn_backends[0].req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
        )
        slots = forward_batch.out_cache_loc.view(
            forward_batch.batch_size, self.topk, self.num_steps
        )
        for step, backend in enumerate(self.attn_backends):
            backend.read = tree_decode_read(prefix, slots[:, :, : step + 1])


def check_layer(layer: "RadixAttention", extra: dict[str, Any]) -> None:
    """Refuse a layer that needs more than plain causal attention.

    Raises:
        HostError: the layer has a sliding window, a logit cap or sinks, or its attention is cross
            or bidirectional.
    """
    if (
        layer.sliding_window_size > -1
        or layer.logit_cap
        or layer.is_cross_attention
        or layer.attn_type is not AttentionType.DECODER
        or any(value is not None for value in extra.values())
    ):
        raise HostError(
            "SGLANG_PLATFORM=cast_cpu supports plain causal attention only, without sliding "
            f"window, logit cap, sinks or cross attention (layer {layer.layer_id})"
        )
