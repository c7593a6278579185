"""The draft worker without a model: chains of copies, plain steps, and batches that change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.base_spec_worker import EagleDraftWorkerBase
from sglang.srt.speculative.eagle_info import EagleDraftInput

from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.serving.copies import Copies
from cast_sglang.serving.drafting import copied as module
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.drafting.copied import CopyDraftWorker
from cast_sglang.serving.drafting.draws import Draws
from cast_sglang.serving.drafting.tools import StepTools
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.step import PLAIN_SHAPE
from cast_sglang.serving.step_room import StepRoom

ROWS = 7


class Rows(TreePolicy):
    """Verifies a preset number of rows; 1 is a plain step."""

    def __init__(self, rows):
        self.rows = rows

    def breadth(self, scores, costs):
        raise AssertionError("no layer is grown")

    def deepen(self):
        raise AssertionError("no layer is grown")

    def beats_plain(self, scores, costs, shares_out=False):
        return self.rows > 1

    def rerank(self, scores, costs):
        return self.rows


@pytest.fixture
def built(monkeypatch):
    """What is handed to the builder of verify inputs."""
    calls = []

    def build(batch, parent_rows, draft_tokens, depth, **named):
        calls.append(SimpleNamespace(parents=parent_rows, tokens=draft_tokens, depth=depth))
        return SimpleNamespace(spec_steps=depth, topk=named["topk"])

    monkeypatch.setattr(module, "build_verify_input", build)
    return calls


def make_worker(rows, is_ragged=False, max_layers=ROWS - 1, max_rows=ROWS):
    worker = CopyDraftWorker.__new__(CopyDraftWorker)
    EagleDraftWorkerBase.__init__(worker)
    worker.device, worker.target_worker = "cpu", None
    worker.plain_input = lambda batch: "plain"
    reads = HostReads("cpu")
    decider = Decider(Rows(rows), max_missing=4, topk=1, is_ragged=is_ragged)
    facts = StepFacts(
        batch_size=2,
        costs=None,
        weights=None,
        missing_rows=0,
        max_layers=9,
        max_rows=max_rows,
        max_nodes=0,
    )
    decider.begin_step(facts)
    worker.tools = StepTools(
        decider=decider,
        calibration=None,
        reads=reads,
        clock=PassClock("cpu"),
        recorder=None,
        backlog=Backlog(4, 4),
        is_ragged=is_ragged,
        graph_plan=None,
        verify_sizes=tuple(range(2, ROWS + 1)),
        room=StepRoom(max_layers, max_rows, 0, max_layers),
        draws=Draws("cpu", seed=0, topk=1),
        copies=Copies(reads, topk=1, num_nodes=ROWS - 1, max_tokens=4096, vocab_size=100),
    )
    return worker


class Request:
    """As much of a request as copies are made of."""

    def __init__(self, text, top_k):
        self.origin_input_ids, self.output_ids = text[:-1], text[-1:]
        self.sampling_params = SimpleNamespace(top_k=top_k, custom_params=None)


def batch_of(*texts, top_ks=(1, 20)):
    reqs = [Request(text, top_k) for text, top_k in zip(texts, top_ks, strict=False)]
    return SimpleNamespace(
        reqs=reqs,
        spec_info=EagleDraftInput(bonus_tokens=torch.tensor([text[-1] for text in texts])),
        seq_lens=torch.tensor([len(text) - 1 for text in texts]),
    )


REPEATS, FRESH = [1, 2, 3, 4, 5, 6] * 4, list(range(10, 30))


def test_a_copied_chain_is_verified_beside_a_request_without_one(built):
    worker = make_worker(rows=5)
    verify_input = worker.draft(batch_of(REPEATS, FRESH))
    [call] = built
    assert call.tokens.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert call.parents.tolist() == [[0, 1, 2, 3], [-1] * 4]  # nothing hangs in the other
    assert call.depth == 4 and verify_input.topk == 1
    # Where requests have equal rows, the other one's run empty, and count as none.
    assert verify_input.num_rows is None
    assert verify_input.rows_with_nodes.tolist() == [5, 1]
    shape = worker.last_shape
    assert (shape.widths, shape.num_draft_tokens, shape.depth) == ((), 5, 4)


def test_where_rows_may_be_unequal_each_has_what_it_needs(built):
    worker = make_worker(rows=5, is_ragged=True)
    verify_input = worker.draft(batch_of(FRESH, REPEATS))
    assert verify_input.num_rows.tolist() == verify_input.rows_with_nodes.tolist() == [1, 5]
    assert worker.last_shape.mean_rows == 3.0


def test_one_that_samples_is_copied_too(built):
    worker = make_worker(rows=3)
    worker.draft(batch_of(FRESH, REPEATS))
    assert built[0].tokens.tolist() == [[0, 0], [1, 2]]


def test_the_room_of_a_step_ends_the_chain(built):
    worker = make_worker(rows=ROWS, max_layers=2)
    worker.draft(batch_of(REPEATS, REPEATS))
    assert built[0].tokens[0].tolist() == [1, 2, 0, 0, 0, 0]
    assert worker.last_shape.depth == 2
    worker = make_worker(rows=ROWS, max_rows=4)
    worker.draft(batch_of(REPEATS, REPEATS))
    assert built[1].tokens.shape == (2, 3)


@pytest.mark.parametrize("texts", [(REPEATS, REPEATS), (FRESH, FRESH)])
def test_a_plain_step_where_nothing_pays(built, texts):
    worker = make_worker(rows=1)
    assert worker.draft(batch_of(*texts)) == "plain"
    assert worker.last_shape is PLAIN_SHAPE and not built
    # What was found is judged all the same by the token that comes.
    assert worker.tools.copies._selection.top_scores_index.shape == (2, 0)


def test_a_step_that_is_timed_without_copies_is_plain(built):
    worker = make_worker(rows=5)
    worker.tools.copies = None
    assert worker.draft(batch_of(REPEATS, REPEATS)) == "plain"


def test_batches_are_taken_apart_and_put_together():
    """As the scheduler does it where the step before has ended."""
    worker = make_worker(rows=5)
    first = worker._draft_extend_for_prefill(None, None, torch.tensor([4, 5, 6]), None)
    second = EagleDraftInput(bonus_tokens=torch.tensor([7, 8]))
    result = GenerationBatchResult(next_draft_input=second)
    worker._draft_extend_for_decode(None, result, kv_loc_plan=None)
    assert second.topk_p.shape == second.topk_index.shape == (2, 0)
    second.filter_batch(torch.tensor([1]))
    second.merge_batch(first)
    assert second.bonus_tokens.tolist() == [8, 4, 5, 6]
    second.filter_batch(torch.tensor([0, 3]))
    assert second.bonus_tokens.tolist() == [8, 6] and second.hidden_states is None


def test_there_is_no_model():
    worker = make_worker(rows=5)
    assert worker.draft_runners == [] and worker.extend_graphs is None
    assert worker.weight_load_time == 0 and worker.preloaded_weights_bytes == 0
    assert not any(worker.graph_memory_usage.values())
    worker.alloc_memory_pool()
    worker.init_attention_backends()
    worker.init_cuda_graphs()
    costs = object()
    assert worker.layer_costs(costs) is costs
    with worker.plain_step(None):
        worker.catch_up(None)
    assert worker.last_extend_rows == 0 and not np.any(
        worker.tools.backlog.num_missing(np.arange(2))
    )
