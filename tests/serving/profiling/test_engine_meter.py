"""The meter of an engine: the cache slots that it takes, the trees it verifies, what it times."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.cpu.kernels import build_tree
from cast_sglang.serving.profiling import engine_meter as module
from cast_sglang.serving.profiling.batches import SmallTree
from cast_sglang.serving.profiling.engine_meter import EngineMeter
from tests.support.engines import CONTEXT, HIDDEN, STEPS, TOPK, make_worker, published


@pytest.fixture
def clock(monkeypatch):
    """The time that the meter reads; passes move it."""
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def worker(monkeypatch):
    context = contextlib.nullcontext()
    monkeypatch.setattr(
        "sglang.srt.speculative.spec_utils.draft_tp_context", lambda layout: context
    )
    with published():
        yield make_worker()


def takes(clock, seconds, result=None, log=None):
    """Return a pass that takes this time."""

    def run(*args, **kwargs):
        if log is not None:
            log.append(args)
        clock.now += seconds
        return result

    return run


def test_requests_have_slots_of_their_own_while_there_are_enough():
    worker = make_worker(num_rows=5, num_slots=5 * CONTEXT)
    EngineMeter(worker)
    slots = worker.req_to_token_pool.req_to_token
    assert sorted(slots.flatten().tolist()) == list(range(1, 5 * CONTEXT + 1))


def test_slots_are_shared_beyond_the_pool_and_put_back(worker):
    table = worker.req_to_token_pool.req_to_token
    table.copy_(torch.arange(table.numel()).view(table.shape))
    before = table.clone()
    worker.tools.backlog.add(np.array([2]), torch.zeros(1, 2), torch.zeros(1))
    meter = EngineMeter(worker)
    assert table.min() == 1 and table.max() == 90  # slot 0 is padding
    assert worker.tools.backlog.num_missing(np.array([2])) == 0
    meter.close()
    assert torch.equal(table, before)


def test_no_more_tokens_are_measured_than_the_pool_holds(worker):
    limits = EngineMeter(worker).limits()
    assert limits == EngineMeter.limits_of(worker) and limits.max_tokens == 90
    assert (limits.max_batch_size, limits.max_context) == (4, CONTEXT)


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_verify_is_timed_over_a_line_of_nodes(worker, clock, monkeypatch, rows):
    built, seen = [], []

    def build(batch, draft_input, parents, index, tokens, probs, **sizes):
        built.append((parents, index, tokens, sizes))
        return SimpleNamespace()

    monkeypatch.setattr(
        "sglang.srt.speculative.eagle_worker_common.build_eagle_verify_input", build
    )
    worker.verify = takes(clock, 0.25, log=seen)
    assert EngineMeter(worker).verify(2, 10, rows) == 0.25
    [(batch,)] = seen
    assert batch.seq_lens.tolist() == [10, 10] and batch.spec_info.spec_steps == rows - 1
    [(parents, index, tokens, sizes)] = built
    assert sizes["num_draft_tokens"] == sizes["topk"] == rows
    assert batch.spec_info.topk == TOPK
    assert tokens.shape == index.shape == (2, rows - 1)
    # In SGLang's own builder each node hangs below the one before it.
    mask = torch.zeros(2 * rows * rows, dtype=torch.bool)
    positions = torch.zeros(2 * rows, dtype=torch.int64)
    links = torch.full((3, 2, rows), -1)
    modes = sizes["topk"], sizes["num_steps"], rows, TreeMaskMode.QLEN_ONLY
    build_tree(parents, index, batch.seq_lens, mask, positions, *links, *modes)
    line = torch.ones(rows, rows, dtype=torch.bool).tril()
    assert torch.equal(mask.view(2, rows, rows), line.expand(2, -1, -1))
    assert positions.view(2, rows)[1].tolist() == list(range(10, 10 + rows))
    assert links[1, 0].tolist() == [*range(1, rows), -1] and (links[2] == -1).all()


def test_a_plain_verify_has_the_root_alone(worker, clock):
    worker._build_trivial_verify_input = lambda batch: "root"
    seen = []
    worker.verify = takes(clock, 0.125, log=seen)
    assert EngineMeter(worker).verify(3, 10, 1) == 0.125
    assert seen[0][0].spec_info == "root" and len(seen[0][0].reqs) == 3


@pytest.mark.parametrize("width", [1, TOPK])
def test_a_layer_is_timed_in_the_middle_of_a_tree(worker, clock, monkeypatch, width):
    slots = torch.arange(2 * STEPS * TOPK)

    def prepare(draft_input, pool, batch, *args):
        spec_info = SimpleNamespace(hidden_states=draft_input.hidden_states)
        batch = SimpleNamespace(out_cache_loc=slots, seq_lens=batch.seq_lens, spec_info=spec_info)
        return batch, None, None

    monkeypatch.setattr("sglang.srt.speculative.eagle_worker_common.prepare_for_draft", prepare)
    draft, seen = worker.draft_worker, []
    draft.topk, draft.req_to_token_pool = TOPK, worker.req_to_token_pool
    draft.model.forward_layer = takes(clock, 0.5, log=seen)
    assert EngineMeter(worker).draft(2, 10, width) == 0.5
    [(batch, path_slots)] = seen
    assert path_slots.shape == (2, width, STEPS // 2)
    tree = slots.view(2, STEPS, TOPK)
    assert path_slots[1, width - 1].tolist() == tree[1, : STEPS // 2, width - 1].tolist()
    assert batch.out_cache_loc.tolist() == tree[:, 1, :width].flatten().tolist()
    assert batch.positions.tolist() == [11] * 2 * width
    assert len(batch.input_ids) == len(batch.spec_info.hidden_states) == 2 * width


def test_a_captured_layer_is_timed_without_its_preparation(worker, clock, monkeypatch):
    def prepare(draft_input, pool, batch, *args):
        return SimpleNamespace(spec_info=draft_input), None, None

    monkeypatch.setattr("sglang.srt.speculative.eagle_worker_common.prepare_for_draft", prepare)
    draft, seen = worker.draft_worker, []
    draft.topk, draft.req_to_token_pool = TOPK, worker.req_to_token_pool
    layers = SimpleNamespace(prepare=takes(clock, 9.0), run=takes(clock, 0.25, log=seen))
    sizes = GraphSizes({2: (1, 2, TOPK)})
    draft.drafter.graphs = SimpleNamespace(
        holds=lambda batch: True, layers=lambda batch: layers, sizes=sizes
    )
    assert EngineMeter(worker).draft(2, 10, 2) == 0.25
    [(frontier, width)] = seen
    assert width == 2 and all(part.shape == (2, TOPK) for part in frontier)


def test_of_a_drafter_of_one_pass_a_layer_is_what_taking_it_in_takes(worker, clock, monkeypatch):
    """And its pass is timed with draft extend, where each tree pays for it once."""

    def prepare(draft_input, pool, batch, *args):
        return SimpleNamespace(spec_info=draft_input), None, None

    monkeypatch.setattr("sglang.srt.speculative.eagle_worker_common.prepare_for_draft", prepare)
    draft, begun = worker.draft_worker, []
    draft.topk, draft.req_to_token_pool = TOPK, worker.req_to_token_pool
    probs = torch.rand(2, TOPK + 1).sort(1, descending=True).values
    tokens = torch.zeros(2, TOPK + 1, dtype=torch.int64)

    def run(frontier, width):
        clock.now += 0.25
        return probs.repeat_interleave(width, dim=0), tokens.repeat_interleave(width, dim=0)

    draft.drafter = SimpleNamespace(
        graphs=None,
        takes_one_pass=True,
        layers_held=1,
        begin=takes(clock, 2.0, log=begun),
        root=lambda draft_input: (probs, tokens),
        layers=lambda batch: SimpleNamespace(run=run),
    )
    meter = EngineMeter(worker)
    assert meter.draft(2, 10, 2) == 0.25
    draft._draft_extend_for_decode = takes(clock, 0.5)
    monkeypatch.setattr(meter, "_accepted", lambda batch, rows: None)
    assert meter.draft_extend(2, 10, 3) == 2.5
    assert [call[2] for call in begun] == [STEPS, STEPS]


def test_draft_extend_is_timed_over_rows_that_were_all_accepted(worker, clock):
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    worker._build_trivial_verify_input = lambda batch: "root"
    logits_output = LogitsProcessorOutput(torch.zeros(1, 50), torch.ones(1, HIDDEN))
    result = GenerationBatchResult(
        logits_output=logits_output,
        next_token_ids=torch.ones(1, dtype=torch.int64),
        accept_lens=torch.ones(1, dtype=torch.int32),
        accept_index=torch.ones(1, 1, dtype=torch.int32),
        speculative_num_draft_tokens=1,
    )
    verifies, seen = [], []
    worker.verify = takes(clock, 7.0, result, log=verifies)
    worker.draft_worker._draft_extend_for_decode = takes(clock, 0.5, log=seen)
    meter = EngineMeter(worker)
    assert meter.draft_extend(2, 10, 3) == 0.5 and meter.draft_extend(1, 10, 2) == 0.5
    assert len(verifies) == 1  # what verify returns is made once
    batch, accepted = seen[0]
    table = worker.req_to_token_pool.req_to_token
    assert batch.out_cache_loc.tolist() == table[1:3, 10:13].flatten().tolist()
    assert accepted.accept_lens.tolist() == [3, 3] and accepted.accept_index.shape == (2, 3)
    assert accepted.logits_output.hidden_states.shape == (6, HIDDEN)
    assert len(accepted.next_token_ids) == 6 and accepted.new_seq_lens.tolist() == [13, 13]


def with_methods(obj, **methods):
    """Give an object methods of its class, as those that a meter wraps are."""
    return type("Timed", (type(obj),), methods)(**vars(obj))


def test_overhead_is_what_a_step_takes_beside_its_passes(worker, clock, monkeypatch):
    monkeypatch.setattr(EngineMeter, "_shortest_context", 10)
    policies = []

    def step(worker, batch):
        policies.append(worker.tools.decider.policy)
        assert worker.cast_stats != "the server's"
        # Synthetic outcomes teach the server nothing.
        assert worker.calibration is worker.tools.calibration != "the server's"
        draft = worker.draft_worker
        clock.now += 0.125
        draft.model.forward_layer("batch", path_slots="slots")
        draft.drafter.graphs.run()
        assert worker.verify(batch) == "verified"
        draft._draft_extend_for_decode(batch)
        clock.now += 0.125

    draft = with_methods(worker.draft_worker, _draft_extend_for_decode=takes(clock, 2.0))
    draft.model = with_methods(draft.model, forward_layer=takes(clock, 0.5))
    draft.drafter.graphs = with_methods(SimpleNamespace(), run=takes(clock, 0.25))
    worker.draft_worker = draft
    passes = {"verify": takes(clock, 4.0, "verified"), "forward_batch_generation": step}
    worker = with_methods(worker, **passes)
    assert EngineMeter(worker).step_overhead(2) == 0.25
    assert [type(policy) for policy in policies] == [SmallTree]
    # The server's own are back, and the step's result is expected by nobody.
    assert worker.tools.decider.policy == worker.cast_stats == "the server's"
    assert worker.calibration == worker.tools.calibration == "the server's"
    assert worker.discarded == 1
    wrapped = (worker, "verify"), (draft, "_draft_extend_for_decode")
    wrapped += (draft.model, "forward_layer"), (draft.drafter.graphs, "run")
    for owner, name in wrapped:
        assert name not in vars(owner)


# Shapes between the sizes of the grid, as refinement and held-out points have, and their graphs.
OFF_GRID = [("verify", 5, 8), ("verify", 7, 8), ("draft", 2, 3), ("draft_extend", 1, 2)]


@pytest.mark.parametrize(("kind", "size", "replayed"), OFF_GRID)
def test_a_size_without_a_graph_is_timed_as_what_runs_in_its_place(
    worker, clock, monkeypatch, kind, size, replayed
):
    def captured(*sizes):
        return SimpleNamespace(sizes=GraphSizes({4: sizes}), holds=lambda batch: True)

    worker.verify_graphs = captured(1, 2, 3, 4, 8)
    worker.draft_worker.extend_graphs = captured(2, 3, 4)
    worker.draft_worker.drafter.graphs = captured(1, 3)
    ran = []
    prepared = lambda *args: (SimpleNamespace(), None, None)  # noqa: E731
    monkeypatch.setattr("sglang.srt.speculative.eagle_worker_common.prepare_for_draft", prepared)
    worker.draft_worker.topk, worker.draft_worker.req_to_token_pool = TOPK, worker.req_to_token_pool
    worker.draft_worker.drafter.graphs.layers = lambda batch: None
    meter = EngineMeter(worker)
    monkeypatch.setattr(meter, "verify_path", lambda b, c, rows, depth: ran.append(rows))
    monkeypatch.setattr(meter, "_captured_layer", lambda layers, batch, width: ran.append(width))
    monkeypatch.setattr(meter, "_accepted", lambda batch, rows: ran.append(rows))
    worker.draft_worker._draft_extend_for_decode = takes(clock, 0.5)
    getattr(meter, kind)(2, 10, size)
    assert ran == [replayed]


def test_a_batch_beyond_the_graphs_is_timed_as_it_is(worker, monkeypatch):
    worker.verify_graphs = SimpleNamespace(sizes=GraphSizes({1: (1, 2, 8)}))
    meter, ran = EngineMeter(worker), []
    monkeypatch.setattr(meter, "verify_path", lambda b, c, rows, depth: ran.append((rows, depth)))
    meter.verify(2, 10, 5)
    meter.verify(1, 10, 5)
    assert ran == [(5, 4), (8, 7)]
