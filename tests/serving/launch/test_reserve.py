"""What CAST takes on paper is what SGLang's own code, and CAST's, allocates."""

import pytest
import torch
from sglang.srt.layers.attention.verify_mask import tree_mask_numel
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from cast_sglang.serving.drafting.attention import triton_tree_backend_class
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.launch.reserve import (
    KV_SPLITS,
    Shapes,
    describe_reserve,
    reserve_of,
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
    overlaps=True,
    is_whole=True,
)


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
    cells = tree_mask_numel(TreeMaskMode.FULL_MASK, 16, 32, 1000)
    assert sizes()["mask of captured verify"] == cells * torch.uint8.itemsize


def test_draft_layers_list_what_their_backend_allocates():
    backend = object.__new__(triton_tree_backend_class())
    facts = dict.fromkeys(("dllm_attention", "sliding_window_size", "swa_v_head_dim"))
    facts |= {"num_head": 4, "max_kv_splits": KV_SPLITS, "v_head_dim": 16, "device": "cpu"}
    facts |= {"lean_total_programs": 0, "lean_block_m": 1, "use_sliding_window_kv_pool": False}
    facts |= {"is_draft_runner": True, "skip_prefill": True, "num_draft_tokens": 32}
    vars(backend).update(facts, max_context_len=1000)
    backend.capture_lists(16 * 8, 8)
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
