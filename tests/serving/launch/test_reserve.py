"""What CAST takes on paper is what SGLang's own code, and CAST's, allocates."""

import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.verify_mask import tree_mask_numel
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from cast_sglang.config import CastConfig
from cast_sglang.serving.drafting.attention import triton_tree_backend_class
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.host_patches.passes import sharing_buffers
from cast_sglang.serving.launch import reserve
from cast_sglang.serving.launch.backends import VERIFY_BACKENDS
from cast_sglang.serving.launch.model_bytes import KV_SPLITS
from cast_sglang.serving.launch.reserve import (
    GRAPH_BYTES,
    OWN_BYTES,
    Captured,
    Shapes,
    describe_reserve,
    reserve_of,
    shrink_envelope,
)
from cast_sglang.serving.step_room import STOCK_TREE, stock_slots

SHAPES = Shapes(
    num_steps=8,
    topk=8,
    num_draft_tokens=32,
    max_requests=48,
    captured_requests=16,
    context=1000,
    vocab_size=5000,
    hidden_bytes=96,
    kv_bytes=4096,
    draft_kv_bytes=512,
    draft_heads=4,
    draft_head_dim=16,
    draft_kv_splits=KV_SPLITS,
    overlaps=True,
    is_whole=True,
)
LARGE = SHAPES._replace(vocab_size=128_000, is_whole=False)
LONGEST = 1000 + 65  # what is reserved behind the context has room in what is as long


def sizes(**changes):
    return {item.name: item.size for item in reserve_of(SHAPES._replace(**changes)).items}


@pytest.mark.parametrize(
    ("tree", "page_size"),
    [(STOCK_TREE, 1), ((8, 8, 32), 1), ((3, 1, 4), 1), ((3, 1, 4), 16), ((6, 1, 7), 16)],
)
def test_slots_are_those_that_sglang_reserves(tree, page_size):
    steps, topk, tokens = tree
    settings = get_context().override_server_args(
        device="cpu",
        page_size=page_size,
        speculative_algorithm="EAGLE3",
        speculative_num_steps=steps,
        speculative_eagle_topk=topk,
        speculative_num_draft_tokens=tokens,
    )
    with settings:
        assert stock_slots(*tree) == get_alloc_reserve_per_decode()


def test_only_what_is_beyond_sglangs_own_tree_is_counted():
    steps, topk, tokens = STOCK_TREE
    same = reserve_of(SHAPES._replace(num_steps=steps, topk=topk, num_draft_tokens=tokens))
    assert (same.slots, same.stock_slots) == (22, 40)
    names = {item.name for item in same.items}
    assert not names & {"slots of the cache", "table of requests", "logits of verify"}
    more = reserve_of(SHAPES)
    assert (more.slots, more.stock_slots) == (65, 40)
    assert reserve_of(SHAPES._replace(overlaps=False)).slots == 56
    # A step that copies may bring as many tokens as it has rows, and the next one begins behind it.
    small = {"num_steps": 3, "topk": 4, "num_draft_tokens": 8, "is_whole": False}
    slots = [reserve_of(SHAPES._replace(**small, copy_depth=depth)).slots for depth in (0, 7)]
    assert slots == [9 + 4, 9 + 8]
    # Where trees keep within what SGLang's default tree takes, there is nothing more to take.
    within = reserve_of(SHAPES._replace(is_whole=False))
    assert within.slots == 40 and "slots of the cache" not in {item.name for item in within.items}
    found = sizes()
    assert found["slots of the cache"] == 48 * 25 * 4096
    assert found["table of requests"] == 48 * 88 * torch.int32.itemsize
    assert found["logits of verify"] == 48 * 24 * 5000 * torch.float32.itemsize
    # Slots of the cache are there for requests too, so they are not memory beside it.
    assert more.total == sum(found.values()) - found["slots of the cache"]


def test_nothing_is_taken_for_graphs_that_are_not_captured():
    assert not [name for name in sizes(captured_requests=0) if "captured" in name]


def test_nothing_is_taken_for_a_draft_that_is_not_there():
    chain = {"num_steps": 31, "topk": 1, "hidden_bytes": 0, "draft_heads": 0, "draft_head_dim": 0}
    found = sizes(**chain)
    assert not [name for name in found if "draft" in name or "states" in name]
    assert found["mask of captured verify"] > 0
    assert reserve_of(SHAPES._replace(**chain)).slots == 65  # its rows, those of the step before


def test_the_mask_is_as_large_as_sglang_makes_it():
    cells = tree_mask_numel(TreeMaskMode.FULL_MASK, 16, 32, LONGEST)
    assert sizes()["mask of captured verify"] == cells * torch.uint8.itemsize


def test_draft_layers_list_what_their_backend_allocates():
    backend = object.__new__(triton_tree_backend_class())
    facts = dict.fromkeys(("dllm_attention", "sliding_window_size", "swa_v_head_dim"))
    facts |= {"num_head": 4, "max_kv_splits": KV_SPLITS, "v_head_dim": 16, "device": "cpu"}
    facts |= {"lean_total_programs": 0, "lean_block_m": 1, "use_sliding_window_kv_pool": False}
    facts |= {"is_draft_runner": True, "skip_prefill": True, "num_draft_tokens": 32}
    vars(backend).update(facts, max_context_len=LONGEST)
    backend.capture_lists(16 * 8)
    found = sizes()
    assert found["lists of captured draft layers"] == backend.tree_kv_indices.nbytes
    results = backend.cuda_graph_attn_logits.nbytes + backend.cuda_graph_attn_lse.nbytes
    assert found["partial results of captured draft layers"] == results


def test_states_of_plain_steps_are_kept_for_every_request():
    import numpy as np

    backlog = Backlog(48, 32)
    rows = torch.zeros(1, 48, dtype=torch.bfloat16)
    backlog.add(np.array([0]), rows, torch.zeros(1, dtype=torch.int64))
    assert rows.nbytes == SHAPES.hidden_bytes
    assert sizes()["states kept for plain steps"] == backlog._hidden_states.nbytes


def test_people_read_one_line():
    line = describe_reserve(reserve_of(SHAPES))
    assert "each of at most 48 requests reserves 65 slots of the cache (40 with" in line
    assert "the draft takes 12% of a slot" in line and "\n" not in line
    assert "logits of verify 0.02 GiB" in line


def test_an_object_of_fa3_keeps_no_more_than_is_counted(monkeypatch):
    """For graphs of each number of rows, beside what the objects share (`sharing_buffers`)."""
    if not torch.cuda.is_available():  # its kernels do not load
        kernels = SimpleNamespace(merge_state_v2=None)
        monkeypatch.setitem(sys.modules, "sgl_kernel", kernels)
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    def captured(rows, topk):
        backend = object.__new__(FlashAttentionBackend)
        facts = dict.fromkeys(("local_attn_builder", "use_mla", "is_encoder_decoder"))
        facts |= {"max_context_len": LONGEST, "page_size": 1, "device": "cpu", "has_swa": False}
        facts |= {"use_sliding_window_kv_pool": False, "speculative_step_id": 0}
        facts |= {"topk": topk, "speculative_num_draft_tokens": rows, "skip_prefill": False}
        facts |= {"is_draft_runner": False, "_get_scheduler_metadata": object}
        vars(backend).update(facts)
        backend.init_cuda_graph_state(16, 16 * rows)
        return backend

    owner = captured(32, 8)
    for rows, topk in ((1, 1), (4, 8), (17, 8)):
        backend = captured(rows, topk)
        with sharing_buffers(backend, owner):
            backend.init_cuda_graph_state(16, 16 * rows)
        theirs = {id(part) for part in _tensors(owner)}
        own = [part for part in _tensors(backend) if id(part) not in theirs]
        taken = sum(part.nbytes for part in own if part.data_ptr() not in _places(owner))
        found = sizes(captured=Captured(own_rows=(rows,)), backend="fa3")
        found = found["backends of captured verify by rows"]
        assert 0.8 * found <= taken <= found


def _tensors(backend):
    found = [part for part in vars(backend).values() if isinstance(part, torch.Tensor)]
    for table in vars(backend).values():
        if isinstance(table, dict):
            found += [part for part in table.values() if isinstance(part, torch.Tensor)]
    mask = backend.verify_mask
    return found + ([mask.buffer] if mask is not None else [])


def _places(backend):
    return {part.data_ptr() for part in _tensors(backend)}


def test_graphs_are_bounded_by_their_number_and_what_they_return():
    found = sizes(captured=Captured(num_graphs=3, held_rows=100), activation_bytes=40)
    assert found["graphs"] == 3 * GRAPH_BYTES
    assert found["states in graphs"] == 100 * SHAPES.hidden_bytes
    assert found["activations in graphs"] == 16 * (32 - STOCK_TREE[2]) * 40
    # `triton` decodes plain steps by a list, the others by what verify has too.
    assert found["lists of captured plain steps"] == 16 * LONGEST * torch.int64.itemsize
    for name in ("fa3", "flashinfer", "trtllm_mha"):
        assert "lists of captured plain steps" not in sizes(backend=name)


def test_every_backend_with_an_object_for_each_number_of_rows_is_counted():
    each = {name for name, backend in VERIFY_BACKENDS.items() if backend.rows == "each"}
    assert each == set(OWN_BYTES)
    # Verify on `flashinfer` and `trtllm_mha` reads no mask that is made once.
    masked = {name for name in VERIFY_BACKENDS if "mask of captured verify" in sizes(backend=name)}
    assert masked == {"triton", "fa3"}


@pytest.fixture
def launch(monkeypatch):
    """A launch on a GPU, of which shapes, graphs and memory are given."""

    def shrink(most_rows=32, memory_gib=80, fraction=0.8, **settings):
        captured = Captured(most_rows=most_rows)
        monkeypatch.setattr(
            reserve, "_shapes_of_server", lambda args, config, launch: shapes_of(args)
        )
        monkeypatch.setattr(reserve, "captures_decode", lambda args: True)
        monkeypatch.setattr(
            "sglang.srt.utils.common.get_device_memory_capacity", lambda device: memory_gib * 1024
        )

        def shapes_of(args):
            return LARGE._replace(
                captured=captured,
                topk=args.speculative_eagle_topk,
                num_draft_tokens=args.speculative_num_draft_tokens,
            )

        args = SimpleNamespace(
            speculative_num_steps=8,
            speculative_eagle_topk=8,
            speculative_num_draft_tokens=32,
            mem_fraction_static=fraction,
            device="cuda",
        )
        said = shrink_envelope(args, CastConfig(**settings), None)
        return (args.speculative_eagle_topk, args.speculative_num_draft_tokens), said

    return shrink


def test_the_envelope_stays_where_it_can_pay_and_fits(launch):
    assert launch() == ((8, 32), None)
    assert launch(fraction=None) == ((8, 32), None)


def test_rows_that_cannot_pay_are_not_reserved(launch):
    shape, said = launch(most_rows=20)
    assert shape == (8, 20) and "from 8-8-32 to 8-8-20; by the profile no more rows" in said
    assert launch(most_rows=1)[0] == (8, 2)


def test_an_envelope_that_does_not_fit_shrinks_to_sglangs_default_tree_at_least(launch):
    shape, said = launch(memory_gib=24, fraction=0.96)
    assert shape[0] == 8 and 8 < shape[1] < 32 and "--mem-fraction-static leaves, 0.48" in said
    totals = [reserve_of(LARGE._replace(num_draft_tokens=shape[1] + n)).total for n in (0, 1)]
    assert totals[0] <= 0.48 * 2**30 < totals[1]
    assert launch(memory_gib=24, fraction=1.0)[0] == (STOCK_TREE[1], STOCK_TREE[2])


def test_shapes_that_are_promised_or_asked_for_stay(launch):
    assert launch(most_rows=4, policy="fixed") == ((8, 32), None)
    assert launch(most_rows=4, verify_sizes=(2, 32)) == ((8, 32), None)
