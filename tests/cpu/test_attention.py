"""The attention backend: what each forward mode reads, what is stored first, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from cast_sglang.cpu.attention import (
    CastCpuAttnBackend,
    CastCpuMultiStepDraftBackend,
    check_layer,
)
from cast_sglang.cpu.compute import attend_batched
from cast_sglang.cpu.reads import causal_read
from cast_sglang.errors import HostError
from cast_sglang.serving.row_packing import find_packed_rows
from tests.support.kv_pools import make_pool

HEADS, KV_HEADS, HEAD_DIM, ROW = 4, 2, 4, 12
PLAIN = dict(
    layer_id=1,
    tp_q_head_num=HEADS,
    tp_k_head_num=KV_HEADS,
    head_dim=HEAD_DIM,
    scaling=0.3,
    sliding_window_size=-1,
    logit_cap=0,
    is_cross_attention=False,
    attn_type=AttentionType.DECODER,
)
LAYER = SimpleNamespace(**PLAIN)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def runner(generator):
    """Three requests whose slots are scattered over a pool of random keys and values."""
    pool = make_pool(size=3 * ROW, head_num=KV_HEADS, head_dim=HEAD_DIM)
    pool.storage.copy_(torch.randn(pool.storage.shape, generator=generator))
    table = torch.randperm(3 * ROW, generator=generator).view(3, ROW).int() + 1
    return SimpleNamespace(
        use_mla_backend=False,
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model_config=SimpleNamespace(context_len=ROW),
    )


def forward_batch(mode, seq_lens, **fields):
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(seq_lens),
        req_pool_indices=torch.arange(len(seq_lens)),
        seq_lens=torch.tensor(seq_lens),
        **fields,
    )


def slots_read(backend):
    """Per request and new token, the positions in its row of the slots that it sees."""
    read, found = backend.read, []
    slots = read.slots.view(read.num_requests, read.length).tolist()
    visible = read.visible
    if visible is None:
        visible = torch.ones(read.num_requests, 1, read.length, dtype=torch.bool)
    for request, masks in enumerate(visible.tolist()):
        row = backend.req_to_token[request].tolist()
        for mask in masks:
            seen = [slot for slot, sees in zip(slots[request], mask, strict=True) if sees]
            found.append(sorted(row.index(slot) for slot in seen))
    return found


def test_each_mode_reads_what_its_new_tokens_see(runner):
    backend = CastCpuAttnBackend(runner)
    backend.init_forward_metadata(forward_batch(ForwardMode.DECODE, [3, 1]))
    assert slots_read(backend) == [[0, 1, 2], [0]]
    # Two nodes behind the root, which do not see each other.
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    spec_info = SimpleNamespace(draft_token_num=3, custom_mask=tree.repeat(2, 1).flatten())
    batch = forward_batch(ForwardMode.TARGET_VERIFY, [2, 1], spec_info=spec_info)
    backend.init_forward_metadata(batch)
    first, second = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]], [[0, 1], [0, 1, 2], [0, 1, 3]]
    assert slots_read(backend) == first + second
    # The width of draft extend is that of its input; lengths already hold the new tokens.
    batch = forward_batch(ForwardMode.DRAFT_EXTEND_V2, [4, 2], input_ids=torch.zeros(4))
    backend.init_forward_metadata(batch)
    assert slots_read(backend) == [[0, 1, 2], [0, 1, 2, 3], [0], [0, 1]]


def test_a_prefill_is_read_request_by_request(runner):
    backend = CastCpuAttnBackend(runner)
    lens = dict(extend_prefix_lens=torch.tensor([0, 2]), extend_seq_lens=torch.tensor([3, 1]))
    backend.init_forward_metadata(forward_batch(ForwardMode.EXTEND, [3, 3], **lens))
    table = backend.req_to_token
    assert [read.slots.tolist() for read in backend.read] == [
        table[0, :3].tolist(),
        table[1, :3].tolist(),
    ]
    backend.init_forward_metadata(forward_batch(ForwardMode.IDLE, [1]))
    assert backend.read is None


def test_new_keys_are_stored_before_they_are_read(runner, generator):
    backend = CastCpuAttnBackend(runner)
    batch = forward_batch(ForwardMode.DECODE, [3, 1])
    batch.out_cache_loc = backend.req_to_token[[0, 1], [2, 0]].long()
    backend.init_forward_metadata(batch)
    q = torch.randn(2, HEADS * HEAD_DIM, generator=generator)
    k, v = torch.randn(2, 2, KV_HEADS, HEAD_DIM, generator=generator).unbind(0)
    out = backend.forward_decode(q, k, v, LAYER, batch)
    assert torch.equal(backend.pool.get_key_buffer(1)[batch.out_cache_loc], k)
    # The second request sees nothing but its new token, so it gets that token's values.
    own = v[1].repeat_interleave(HEADS // KV_HEADS, dim=0).flatten()
    torch.testing.assert_close(out[1], own)
    before = backend.pool.storage.clone()
    again = backend.forward_decode(q, k + 1, v + 1, LAYER, batch, save_kv_cache=False)
    assert torch.equal(backend.pool.storage, before) and torch.equal(again, out)


def test_attention_of_packed_rows_is_that_of_all_rows(runner, generator):
    """Each row sees what it would see among all of its request's rows."""
    width = 3
    backend = CastCpuAttnBackend(runner)
    seq_lens = torch.tensor([7, 4, 5])
    backend.read = causal_read(backend.req_to_token, torch.arange(3), seq_lens, width)
    queries = torch.randn(3 * width, HEADS * HEAD_DIM, generator=generator)

    def attend(q):
        return backend.forward_decode(q, None, None, LAYER, None, save_kv_cache=False)

    expected = attend(queries)
    packed_rows = find_packed_rows(torch.tensor([3, 1, 2]), width)
    backend.packed_rows = packed_rows
    torch.testing.assert_close(attend(queries[packed_rows]), expected[packed_rows])


def test_a_step_of_eagles_tree_reads_its_branch_so_far(runner, generator):
    topk, num_steps = 2, 3
    backend = CastCpuMultiStepDraftBackend(runner, topk, num_steps)
    assert len(backend.attn_backends) == num_steps - 1
    batch = forward_batch(ForwardMode.DECODE, [2, 1])
    table = runner.req_to_token_pool.req_to_token
    # Behind its prefix a request has the slots of one branch, then those of the next.
    batch.out_cache_loc = torch.cat((table[0, 2:8], table[1, 1:7])).long()
    backend.init_forward_metadata(batch)
    first, second = backend.attn_backends
    assert slots_read(first) == [[0, 1, 2], [0, 1, 5], [0, 1], [0, 4]]
    assert slots_read(second) == [[0, 1, 2, 3], [0, 1, 5, 6], [0, 1, 2], [0, 4, 5]]
    q = torch.randn(4, HEADS, HEAD_DIM, generator=generator)
    rows = runner.token_to_kv_pool.layer_rows(1)
    expected = attend_batched(q, rows, second.read, KV_HEADS, 0.3)
    out = second.forward_decode(q.flatten(1), None, None, LAYER, batch, save_kv_cache=False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window_size", 0),
        ("sliding_window_size", 128),
        ("logit_cap", 30.0),
        ("is_cross_attention", True),
        ("attn_type", AttentionType.ENCODER_ONLY),
        ("attn_type", AttentionType.DECODER_BIDIRECTIONAL),
    ],
)
def test_layers_of_other_attention_are_refused(field, value):
    with pytest.raises(HostError, match=r"plain causal attention only.*\(layer 1\)"):
        check_layer(SimpleNamespace(**{**PLAIN, field: value}), {})


def test_further_arguments_of_a_layer_are_refused_where_they_say_something():
    check_layer(LAYER, {"sinks": None, "q_rope": None})
    with pytest.raises(HostError, match="sinks"):
        check_layer(LAYER, {"sinks": torch.zeros(HEADS)})


def test_models_of_other_caches_are_refused(runner):
    runner.use_mla_backend = True
    with pytest.raises(HostError, match="SGLANG_PLATFORM=cast_cpu.*not MLA"):
        CastCpuAttnBackend(runner)
    runner.use_mla_backend, runner.token_to_kv_pool = False, object()
    with pytest.raises(HostError, match="full attention only; got a object"):
        CastCpuAttnBackend(runner)
