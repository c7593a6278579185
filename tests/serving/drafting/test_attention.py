"""Attention backends of the draft."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.eagle_info import EagleDraftInput

from cast_sglang.errors import HostError
from cast_sglang.serving.drafting.attention import create_tree_backend, triton_tree_backend_class
from cast_sglang.serving.host_patches import hooks, passes


def test_unknown_backend_names_the_flag():
    with pytest.raises(HostError, match="--speculative-draft-attention-backend triton"):
        create_tree_backend(SimpleNamespace(draft_attention_backend="fa3"), topk=4)


# Tokens of the longest request, and slots that it reserves behind them.
CONTEXT, RESERVED = 40, 12


@pytest.fixture
def backend(monkeypatch):
    """SGLang's own metadata code on the CPU, without a model behind it."""
    backend = object.__new__(triton_tree_backend_class())
    facts = dict.fromkeys(("dllm_attention", "sliding_window_size", "swa_v_head_dim"))
    facts |= dict.fromkeys(("window_kv_indptr", "lean_total_programs", "lean_block_m"), 1)
    facts |= {"use_sliding_window_kv_pool": False, "is_draft_runner": True, "skip_prefill": True}
    facts |= {"num_head": 2, "max_kv_splits": 3, "v_head_dim": 4, "dcp_size": 1, "device": "cpu"}
    facts |= {"static_kv_splits": True, "enable_deterministic": False, "num_draft_tokens": 8}
    table = torch.randint(1, 10_000, (6, CONTEXT + RESERVED)).to(torch.int32)
    monkeypatch.setattr(hooks, "is_cast", lambda: True)
    monkeypatch.setattr(passes, "slots_reserved", lambda: RESERVED)

    def init(backend):
        vars(backend).update(facts, max_context_len=CONTEXT, req_to_token=table)

    hooks._leave_room(init, backend)
    return backend


def layer_batch(lens, width, depth):
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(lens),
        req_pool_indices=torch.randperm(6)[: len(lens)],
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens),
        out_cache_loc=torch.arange(len(lens) * width),
        encoder_lens=None,
        spec_info=EagleDraftInput(),
    ), torch.randint(1, 10_000, (len(lens), width, depth))


def listed(backend):
    """What each node reads, by the metadata that the kernels get."""
    metadata = backend.forward_metadata
    ends = metadata.kv_indptr.tolist()
    assert metadata.kv_indices.dtype == torch.int64  # a slot times a row of keys exceeds 32 bits
    assert (metadata.num_kv_splits[: len(ends) - 1] == 3).all()
    return [metadata.kv_indices[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]


@pytest.mark.parametrize(
    ("lens", "width", "depth"), [([5], 1, 1), ([7, 1, 30], 3, 4), ([2, 2], 2, 5)]
)
def test_captured_and_eager_layers_read_prefix_and_path(backend, lens, width, depth):
    batch, path = layer_batch(lens, width, depth)
    expected = [
        backend.req_to_token[batch.req_pool_indices[b], : lens[b]].tolist() + path[b, w].tolist()
        for b in range(len(lens))
        for w in range(width)
    ]
    backend.init_tree_metadata(batch, path)
    assert listed(backend) == expected
    # Lengths that the host does not know: room for the longest.
    batch.seq_lens_cpu = None
    backend.init_tree_metadata(batch, path)
    assert listed(backend) == expected

    backend.capture_lists(max_nodes=12)
    # Of a wider and deeper buffer, as a captured layer takes it.
    buffer = torch.zeros(len(lens), width + 1, 6, dtype=torch.int64)
    buffer[:, :width, :depth] = path
    backend.init_captured_tree_metadata(batch, buffer[:, :width], torch.tensor([depth]))
    assert listed(backend) == expected
    metadata = backend.forward_metadata
    assert metadata.attn_logits is backend.cuda_graph_attn_logits
    assert metadata.kv_indices is backend.tree_kv_indices


@pytest.mark.parametrize("is_known", [True, False])
def test_lists_hold_requests_that_run_past_the_limit_of_the_context(backend, is_known):
    """All that are captured at once, with what a step in flight has brought them."""
    width, depth = 2, 5
    batch, path = layer_batch([CONTEXT + RESERVED - depth] * 3, width, depth)
    if not is_known:
        batch.seq_lens_cpu = None
    backend.capture_lists(max_nodes=3 * width)
    for init in (
        lambda: backend.init_tree_metadata(batch, path),
        lambda: backend.init_captured_tree_metadata(batch, path, torch.tensor([depth])),
    ):
        init()
        prefix = backend.req_to_token[batch.req_pool_indices[2], :-depth].tolist()
        assert listed(backend)[-1] == prefix + path[2, 1].tolist()


def test_what_captures_call_is_there():
    """Parameters of SGLang's that only a GPU would reach."""
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.distributed.parallel_state import graph_capture
    from sglang.srt.model_executor.cuda_graph_config import with_phase
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner, model_capture_mode
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import (
        FullCudaGraphBackend,
    )
    from sglang.srt.model_executor.runner_backend.utils import resolve_decode_backend
    from sglang.srt.model_executor.runner_utils import pool
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import (
        EAGLEDraftExtendCudaGraphRunner,
    )

    def takes(function, *names):
        assert set(names) <= set(inspect.signature(function).parameters), function

    takes(DecodeCudaGraphRunner, "model_runner", "speculative_num_draft_tokens")
    takes(EAGLEDraftExtendCudaGraphRunner, "eagle_worker")
    takes(FullCudaGraphBackend.capture_one, "shape_key", "forward_fn")
    takes(FullCudaGraphBackend.capture_session, "stream")
    takes(FullCudaGraphBackend.replay, "shape_key", "static_forward_batch")
    takes(resolve_decode_backend, "cuda_graph_runner")
    takes(graph_capture, "stream")
    takes(with_phase, "config", "phase")
    assert callable(model_capture_mode) and callable(pool.get_or_create_global_graph_capture_stream)
    fields = namespace_of(ServerArgs)
    assert {"cuda_graph_config", "speculative_num_draft_tokens"} <= set(fields)
