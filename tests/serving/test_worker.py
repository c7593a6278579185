"""The step's bookkeeping around SGLang's passes; whole steps of real models: `tests/server`."""

import contextlib
import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import step_units
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.fixed import FixedPolicy
from cast_sglang.serving import worker as module
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.drafting.draws import Draws
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.tools import StepTools
from cast_sglang.serving.graphs.backends import VerifyBackends
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.requests import RunningRequests
from cast_sglang.serving.served_costs import ServedCosts
from cast_sglang.serving.stats import StepStats
from cast_sglang.serving.step import DraftShape
from cast_sglang.serving.step_room import Envelope
from cast_sglang.serving.worker import CastWorker
from tests.support.builders import make_profile
from tests.support.drafts import FakeModel, Widths, decider_of

STEPS, TOPK, ROWS, SLOTS = 4, 3, 8, 9
SHAPE = DraftShape(widths=(2, 1), num_draft_tokens=5, num_rows=None, depth=3)


class Policy(Widths):
    """A policy that drafts or not, and remembers what its steps brought."""

    drafts = True

    def __init__(self):
        super().__init__([])
        self.brought = []

    def speculate(self, batch_size, costs, *others):
        return self.drafts

    def observe(self, batch_size, accepted_mean, time_units):
        self.brought.append((batch_size, accepted_mean, time_units))


class DraftWorker:
    """A draft worker whose trees have one shape."""

    last_shape, last_extend_rows, parallel_layout = SHAPE, 3, None

    def __init__(self):
        self.layer_costs = EagleDrafter(FakeModel(), STEPS).layer_costs
        self.log = []

    def catch_up(self, batch):
        self.log.append("catch up")

    @contextlib.contextmanager
    def plain_step(self, draft_input):
        self.log.append("plain")
        self.last_extend_rows = 0
        yield


@pytest.fixture
def worker(monkeypatch):
    """A worker without SGLang's part and without a profile."""
    monkeypatch.setattr(module, "draft_tp_context", lambda layout: contextlib.nullcontext())
    schedule = SimpleNamespace(max_running_requests=4)
    monkeypatch.setattr(module, "get_schedule", lambda: schedule)
    worker = CastWorker.__new__(CastWorker)
    worker.config, worker.device = CastConfig(residuals="off"), "cpu"
    worker.topk, worker.speculative_num_steps = TOPK, STEPS
    worker.speculative_num_draft_tokens = worker.max_draft_tokens = ROWS
    runner = SimpleNamespace(model_config=SimpleNamespace(context_len=1024))
    runner.attn_backend = SimpleNamespace(packed_rows=None)
    runner.forward = runner.sampler = None
    runner.decode_cuda_graph_runner = runner.decode_attention_backend_str = None
    runner.decode_num_tokens_per_req = lambda: ROWS
    worker._target_worker = SimpleNamespace(model_runner=runner)
    worker.backends = VerifyBackends(runner)
    worker.cast_stats, worker.clock = StepStats(), PassClock("cpu")
    worker.costs = ServedCosts(worker.config, worker.clock, worker.cast_stats)
    worker.calibration = worker.verify_graphs = worker._last_done = None
    worker._running = RunningRequests()
    worker.learned = SimpleNamespace(save_when_due=lambda num_steps: None)
    worker._verify_sizes = tuple(range(2, ROWS + 1))
    worker._envelope = Envelope(STEPS, TOPK, ROWS)
    worker._pending, worker._observing = deque(), 0.0
    worker._num_steps = 0
    worker._draft_worker = DraftWorker()
    worker.tools = StepTools(
        decider=decider_of(Policy()),
        calibration=None,
        reads=HostReads("cpu"),
        clock=worker.clock,
        recorder=None,
        backlog=Backlog(SLOTS, 8),
        is_ragged=False,
        graph_plan=None,
        verify_sizes=worker._verify_sizes,
        room=worker._envelope.whole,
        draws=Draws("cpu", seed=0, topk=TOPK),
    )
    return worker


@pytest.fixture
def profiled(worker):
    limits = Limits(max_batch_size=4, max_context=1024, max_verify_rows=ROWS, max_width=TOPK)
    worker.costs.use(FoundProfile(make_profile(), Path("some.json"), []), limits)
    return worker


@pytest.fixture
def passes(monkeypatch):
    """Stand in for SGLang's step; collect how many layers each is to draft."""
    layers = []

    def forward(self, batch, *args, **kwargs):
        layers.append(self.speculative_num_steps)
        return "result"

    monkeypatch.setattr(EAGLEWorkerV2, "forward_batch_generation", forward)
    return layers


class Request(SimpleNamespace):
    """Like SGLang's, one that equals itself alone."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def request(left=500):
    return Request(
        sampling_params=SamplingParams(max_new_tokens=left, temperature=0.0),
        output_ids=[],
        decode_batch_idx=1,
        custom_logit_processor=None,
        rid="a",
        kv=SimpleNamespace(kv_committed_len=100, kv_allocated_len=200),
        finished=lambda: False,
        origin_input_ids=[0] * 30,
        cached_tokens=0,
    )


def batch_of(*reqs, is_prefill=False):
    return SimpleNamespace(
        reqs=list(reqs),
        chunked_req=None,
        forward_mode=SimpleNamespace(is_extend=lambda: is_prefill),
        is_extend_in_batch=False,
        req_pool_indices_cpu=torch.arange(1, 1 + len(reqs)),
        seq_lens_cpu=torch.full((len(reqs),), 128),
        spec_info=SimpleNamespace(draft_token_num=1),
        sampling_info=None,
        return_hidden_states=False,
    )


def missing(worker, *slots):
    return worker.tools.backlog.num_missing(np.array(slots))


def test_a_step_with_a_tree_is_counted_with_its_layers(worker, passes):
    batch = batch_of(request(), request())
    assert worker.forward_batch_generation(batch) == "result"
    assert passes == [STEPS] and worker._draft_worker.log == []
    state = worker.cast_stats.snapshot()
    assert (state["steps"], state["plain_steps"], state["requests"]) == (1, 0, 2)
    # The root's children, and those of the expanded nodes.
    assert state["layers_grown"] == 3 and state["nodes_drafted"] == 2 * TOPK * (1 + 2 + 1)
    assert state["nodes_verified"] == 2 * 5


@pytest.mark.parametrize(
    ("widths", "rows", "most"), [((2, 1), 5, 4), ((), 2, 2), ((3, 3, 3), 3, 3), ((), 8, 2)]
)
def test_a_step_brings_no_more_than_its_longest_path_and_a_token(
    worker, passes, widths, rows, most
):
    worker._draft_worker.last_shape = DraftShape(widths, rows, None, min(len(widths) + 1, rows - 1))
    worker.forward_batch_generation(batch_of(request()))
    assert worker._pending[0].max_tokens == most


def test_a_plain_step_drafts_nothing(worker, passes):
    # Without a profile the policy is not asked, but there is no room for drafts.
    worker.forward_batch_generation(batch_of(request(left=1)))
    assert passes == [0] and worker.speculative_num_steps == STEPS
    assert worker._draft_worker.log == ["plain"]
    state = worker.cast_stats.snapshot()
    assert (state["steps"], state["plain_steps"], state["nodes_drafted"]) == (1, 1, 0)
    assert state["nodes_verified"] == 1 and worker._pending[0].max_tokens == 1


def test_layers_are_back_after_a_plain_step_that_fails(worker):
    with pytest.raises(RuntimeError), worker._plain_step(batch_of(request())):
        raise RuntimeError
    assert worker.speculative_num_steps == STEPS


def test_a_full_backlog_is_worked_off_while_decoding_is_plain(profiled, passes, monkeypatch):
    monkeypatch.setattr("cast_sglang.policy.decider.PROBE_SHARE", 10.0)  # it is cheap
    profiled.tools.decider.policy.drafts = False
    backlog, slots = profiled.tools.backlog, np.array([1])
    for _ in range(backlog.capacity):
        assert profiled._draft_worker.log.count("catch up") == 0
        backlog.add(slots, torch.zeros(1, 2), torch.zeros(1))
        profiled.forward_batch_generation(batch_of(request()))
    assert profiled._draft_worker.log[-2:] == ["catch up", "plain"]


def test_a_prefill_is_no_step_and_brings_the_draft_up_to_date(worker, passes):
    worker.tools.backlog.add(np.array([1, 2]), torch.zeros(2, 4), torch.zeros(2))
    worker.clock.begin_step(1, None, drafts=False)
    worker.forward_batch_generation(batch_of(request(), is_prefill=True))
    worker.clock.begin_step(1, None, drafts=False)
    assert not worker.clock.follows_alike and missing(worker, 1) == 0 and missing(worker, 2) == 1
    assert worker.cast_stats.snapshot()["steps"] == 0 and not worker._pending


def test_a_prefill_behind_which_nothing_is_drafted_leaves_the_draft_out(worker, passes):
    worker.tools.decider.policy.plain_steps = lambda batch_size: 20
    for left, leaves_out in ((500, False), (21, True), (22, False)):
        worker.forward_batch_generation(batch_of(request(left), request(3), is_prefill=True))
        assert worker.tools.num_left_out == 2 * leaves_out
    assert worker.cast_stats.snapshot()["prompts_left_out"] == 2


def test_steps_are_expected_to_take_what_the_tables_say(profiled, passes):
    profiled.forward_batch_generation(batch_of(request(), request()))
    table = profiled.costs.table
    units = step_units(table, SHAPE.widths, 5.0, 3)
    step = profiled._pending[0]
    assert step.units == pytest.approx(units)
    assert step.predicted_us == pytest.approx(units * table.unit_us)
    assert step.expected_us == pytest.approx(step.predicted_us)
    profiled.tools.decider.policy.drafts = False
    profiled.forward_batch_generation(batch_of(request(), request()))
    plain = profiled._pending[1]
    assert plain.units is None and plain.predicted_us < step.predicted_us


def test_a_step_that_looked_for_copies_in_vain_is_plain_and_is_learned_from(
    profiled, passes, monkeypatch
):
    """Without a draft there are no layers, and looking takes its time all the same."""
    monkeypatch.setattr(profiled, "has_draft", False, raising=False)
    draft = profiled._draft_worker
    draft.last_shape, draft.last_extend_rows = module.PLAIN_SHAPE, 0.0
    profiled.forward_batch_generation(batch_of(request(), request()))
    state, step = profiled.cast_stats.snapshot(), profiled._pending[0]
    assert (state["plain_steps"], state["layers_grown"], state["nodes_drafted"]) == (1, 0, 0)
    costs = profiled.costs.current
    assert step.units == pytest.approx(float(costs.verify[0]) + costs.overhead)
    assert step.num_layers == 1 and step.max_tokens == 1


def test_costs_are_looked_up_when_requests_change_and_now_and_then(profiled, passes, monkeypatch):
    looked_up = []
    monkeypatch.setattr(profiled.costs, "look_up", lambda *args: looked_up.append(args[0]))
    one, two = request(), request()
    profiled.forward_batch_generation(batch_of(one))
    profiled.forward_batch_generation(batch_of(one))
    profiled.forward_batch_generation(batch_of(one, two))
    assert looked_up == [1, 2]
    for _ in range(module.LOOK_UP_EVERY):
        profiled.forward_batch_generation(batch_of(one, two))
    assert looked_up == [1, 2, 2]


class Recorder:
    """A recorder that keeps nothing."""

    is_full = False

    def begin_step(self, batch):
        pass

    def on_step(self, report):
        pass


def test_every_rank_looks_costs_up_in_the_same_steps(profiled, passes, monkeypatch):
    """Only rank 0 records, and it stops when the file is full; a rank that differs would hang."""
    looked_up = []
    monkeypatch.setattr(profiled.costs, "look_up", lambda *args: looked_up.append(args[1]))
    profiled.config = CastConfig(residuals="off", trace="t.jsonl")
    one, steps = request(), 2 * module.LOOK_UP_EVERY + 1
    profiled.tools.recorder = recorder = Recorder()
    for is_full in (False, True):
        recorder.is_full = is_full
        for _ in range(steps):
            profiled.forward_batch_generation(batch_of(one))
    of_rank_0 = looked_up.copy()
    assert profiled.tools.recorder is None  # as on the other ranks
    looked_up.clear()
    for _ in range(2 * steps):
        profiled.forward_batch_generation(batch_of(one))
    assert looked_up == of_rank_0 and len(looked_up) == 2 * steps


def test_results_reach_the_policy_and_the_counters(profiled, passes, monkeypatch):
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    policy = profiled.tools.decider.policy
    profiled.forward_batch_generation(batch_of(request(), request()))
    units = profiled._pending[0].units
    profiled.on_verify_complete_cpu([2, 1])
    assert policy.brought == [(2, 1.5, units)]
    state = profiled.cast_stats.snapshot()
    assert state["drafts_accepted"] == 3 and state["accept_lens"] == {"2": 1, "3": 1}
    assert state["timed_steps"] == 0  # there is no step before it
    profiled.forward_batch_generation(batch_of(request(), request()))
    clock.now = 1.25
    profiled.on_verify_complete_cpu([0, 0])
    state = profiled.cast_stats.snapshot()
    assert state["timed_steps"] == 1 and state["measured_us"] == pytest.approx(250_000)
    # A plain step says nothing about trees.
    policy.drafts = False
    profiled.forward_batch_generation(batch_of(request()))
    profiled.on_verify_complete_cpu([0])
    assert len(policy.brought) == 2


def test_a_step_behind_a_prefill_is_not_timed(profiled, passes):
    """Its distance from the step before is not its time."""
    for is_prefill in (False, True, False, False):
        profiled.forward_batch_generation(batch_of(request(), is_prefill=is_prefill))
        if not is_prefill:
            profiled.on_verify_complete_cpu([1])
    assert profiled.cast_stats.snapshot()["timed_steps"] == 1


def test_results_without_a_step_are_ignored(worker, passes):
    worker.on_verify_complete_cpu([1])
    worker.forward_batch_generation(batch_of(request()))
    worker.discard_pending_steps()
    worker.on_verify_complete_cpu([1])
    assert worker.cast_stats.snapshot()["drafts_accepted"] == 0


@pytest.mark.parametrize(
    ("rows", "is_path", "topk"), [(5, False, TOPK), (5, True, 1), (1, False, 1)]
)
def test_verify_runs_at_the_steps_width(worker, monkeypatch, rows, is_path, topk):
    seen = []

    def verify(self, batch):
        seen.append((self.speculative_num_draft_tokens, self.topk))
        raise RuntimeError

    monkeypatch.setattr(EAGLEWorkerV2, "verify", verify)
    batch = batch_of(request())
    batch.spec_info = SimpleNamespace(draft_token_num=rows, is_path=is_path)
    with pytest.raises(RuntimeError):
        worker.verify(batch)
    assert seen == [(rows, topk)]
    assert (worker.speculative_num_draft_tokens, worker.topk) == (ROWS, TOPK)


def test_verify_packs_requests_of_unequal_rows(worker, monkeypatch):
    backend, packed = worker.target_worker.model_runner.attn_backend, []
    result = SimpleNamespace(
        accept_index=None,
        accept_lens=None,
        next_token_ids=None,
        logits_output=SimpleNamespace(next_token_logits=None),
    )

    def verify(self, batch):
        packed.append(backend.packed_rows.tolist())
        return result

    monkeypatch.setattr(EAGLEWorkerV2, "verify", verify)
    batch = batch_of(request(), request())
    batch.spec_info = SimpleNamespace(draft_token_num=3, num_rows=np.array([1, 3]))
    assert worker.verify(batch) is result
    assert packed == [[0, 3, 4, 5]] and backend.packed_rows is None


def test_the_largest_shapes_of_a_server(worker):
    limits = worker.limits
    assert (limits.max_batch_size, limits.max_context) == (4, 1024)
    assert (limits.max_verify_rows, limits.max_width) == (ROWS, TOPK)
    assert limits.max_extend_rows == STEPS + 1  # no path is longer than the tree is deep
    worker._envelope = Envelope(STEPS, TOPK, 3)
    assert worker.limits.max_extend_rows == 3


@pytest.mark.parametrize(("policy", "lacks"), [("auto", True), ("fixed", True), ("eagle", False)])
def test_a_policy_that_reads_costs_lacks_a_profile(worker, policy, lacks):
    worker.config = CastConfig(policy=policy)
    assert worker.lacks_profile == lacks
    limits = worker.limits
    worker.costs.use(FoundProfile(make_profile(), Path("some.json"), []), limits)
    assert not worker.lacks_profile


def test_a_full_trace_grows_whole_trees_whatever_the_policy(worker):
    assert isinstance(worker._build_policy(False), AutoPolicy)
    worker.config = CastConfig(policy="fixed")
    fixed = worker._build_policy(False)
    assert isinstance(fixed, FixedPolicy)
    worker.config = CastConfig(policy="auto", trace="t.jsonl", trace_full=True)
    whole = worker._build_policy(False)
    assert not isinstance(whole, AutoPolicy)
    assert whole.breadth(torch.full((1, TOPK), 1e-6), None) == TOPK


def test_the_state_for_an_operator_is_json(worker, profiled, passes):
    profiled.forward_batch_generation(batch_of(request()))
    state = json.loads(json.dumps(profiled.cast_state()))
    assert state["steps"] == 1 and state["profile"] == {"path": "some.json", "estimated": False}
    assert state["residuals"] == state["prices"] == state["reliability"] == []
