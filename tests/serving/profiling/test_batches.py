"""Synthetic batches: what the passes read of them, and the smallest tree."""

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context

from cast_sglang.serving.profiling.batches import Rows, SmallTree
from tests.support.drafts import decider_of
from tests.support.engines import HIDDEN, TOPK, make_worker, published
from tests.support.engines import STEPS as MAX_STEPS


@pytest.fixture(autouse=True)
def engine():
    with published():
        yield


@pytest.mark.parametrize(("batch_size", "context"), [(1, 7), (4, 16)])
def test_a_batch_is_one_that_decodes_after_its_contexts(batch_size, context):
    batch = Rows(make_worker(), batch_size, context).batch()
    assert batch.forward_mode == ForwardMode.DECODE and len(batch.reqs) == batch_size
    for lengths in (batch.seq_lens, batch.seq_lens_cpu, batch.orig_seq_lens):
        assert lengths.tolist() == [context] * batch_size
    assert batch.seq_lens_sum == batch_size * context
    # SGLang lets padded requests write to the first row, so it belongs to none.
    rows = list(range(1, batch_size + 1))
    assert batch.req_pool_indices.tolist() == batch.req_pool_indices_cpu.tolist() == rows
    for req in batch.reqs:
        assert len(req.origin_input_ids) == req.kv.kv_committed_len == context
        assert req.kv.kv_allocated_len == context + 2 * MAX_STEPS * TOPK
        assert not req.finished()
    assert batch.sampling_info.is_all_greedy


def test_a_batch_knows_its_lengths_on_the_host_where_the_schedulers_do():
    worker = make_worker()
    assert Rows(worker, 2, 9).batch().seq_lens_cpu.tolist() == [9, 9]
    for backend in worker.spec_v2_attn_backends:
        backend.needs_cpu_seq_lens = False
    batch = Rows(worker, 2, 9).batch()
    assert batch.seq_lens_cpu is batch.seq_lens_sum is None and batch.seq_lens.tolist() == [9, 9]
    with get_context().override_server_args(disable_overlap_schedule=True):
        assert Rows(worker, 2, 9).batch().seq_lens_sum == 18


def test_the_draft_has_proposed_the_roots_children():
    draft_input = Rows(make_worker(), 2, 9).batch().spec_info
    assert draft_input.topk_p.shape == draft_input.topk_index.shape == (2, TOPK)
    assert draft_input.hidden_states.shape == (2, HIDDEN)
    assert draft_input.hidden_states.dtype == torch.bfloat16
    assert draft_input.bonus_tokens.shape == (2,) and not draft_input.hidden_states.any()


def test_what_a_pass_changes_in_a_batch_is_not_in_the_next():
    rows = Rows(make_worker(), 2, 9)
    first = rows.batch()
    first.seq_lens += 5
    first.spec_info.topk_index += 1
    first.req_pool_indices += 1
    first.spec_info, first.forward_mode = None, ForwardMode.IDLE
    second = rows.batch()
    assert second.seq_lens.tolist() == [9, 9] and second.req_pool_indices.tolist() == [1, 2]
    assert second.forward_mode == ForwardMode.DECODE
    assert (second.spec_info.topk_index == 1).all()


def test_the_smallest_tree_has_one_layer_of_one_node_and_two_rows():
    for scores in (torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3)):
        decider = decider_of(SmallTree())
        assert decider.width(scores) == 1 and decider.width(scores) is None
        assert decider.rows(scores) == (2, None)
