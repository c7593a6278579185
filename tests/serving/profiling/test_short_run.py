"""A short real run: its texts, the requests that it sends, and when it ends."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.serving.profiling import short_run
from cast_sglang.serving.profiling.short_run import complete_profile, serve_texts
from cast_sglang.serving.texts import read_texts
from tests.support.builders import make_profile


class Tokenizer:
    """One token a word; a chat gets one more at its end."""

    chat_template = "yes"

    def encode(self, text):
        return list(range(len(text.split())))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return messages[0]["content"] + " assistant"


class Worker:
    def __init__(self, scheduler, batch=5, context=1000):
        self.scheduler, self.device, self.max_draft_tokens = scheduler, "cpu", 8
        self.limits = Limits(batch, context, max_verify_rows=8, max_width=4)
        self.cast_stats = self.stats = object()
        self.tools = SimpleNamespace(recorder="the server's")
        self.learned = SimpleNamespace(content=lambda: {"prices": [self.scheduler.batches]})
        self.used = []

    def use_profile(self, found):
        self.used.append(found)


class Scheduler:
    """Answers each batch at once, in `seconds` of a clock that this advances."""

    def __init__(self, clock, seconds=1.0, tokenizer=True, pool=10_000, **worker):
        self.clock, self.seconds, self.batches = clock, seconds, []
        self.tokenizer = Tokenizer() if tokenizer else None
        self.max_total_num_tokens, self.waiting = pool, []
        self.tp_group = SimpleNamespace(world_size=1)
        self.gracefully_exit = self.is_flushed = False
        self.output_streamer = SimpleNamespace(send_to_detokenizer=None, rust_server=None)
        self.draft_worker = Worker(self, **worker)

    def is_fully_idle(self):
        return not self.waiting

    def handle_generate_request(self, request):
        self.waiting.append(request)

    def flush_cache(self, empty_cache):
        self.is_flushed = True

    def ingest_requests(self):
        raise AssertionError("nothing is served but the short run")

    def loop(self):
        while not self.gracefully_exit:
            self.ingest_requests()
            if self.waiting:
                self.batches.append(self.waiting)
                worker = self.draft_worker
                assert worker.tools.recorder is None and worker.cast_stats is not worker.stats
                worker.cast_stats.record_time(10.0, 15.0)
                torch.rand(1)  # as sampling does
                self.clock.now += self.seconds
                self.waiting = []


@pytest.fixture
def clock(monkeypatch):
    from sglang.srt.managers import scheduler

    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(short_run.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(scheduler, "dispatch_event_loop", lambda scheduler: scheduler.loop())
    return clock


def test_batches_grow_and_half_of_their_requests_are_sampled(clock):
    scheduler = Scheduler(clock, batch=5)
    record = serve_texts(scheduler, budget_seconds=60.0)
    assert [len(batch) for batch in scheduler.batches] == [1, 1, 2, 4, 5]
    temperatures = [each.sampling_params for batch in scheduler.batches for each in batch]
    # SGLang makes of temperature 0 that only the best token is left.
    greedy = [params.top_k == 1 for params in temperatures]
    assert greedy == [index % 2 == 0 for index in range(len(greedy))]
    prompts = [each.input_ids for batch in scheduler.batches for each in batch]
    assert len(prompts[1]) == len(read_texts()[1][1].split()) + 1  # a chat
    assert record.steps == 5 and record.median_ratio == 1.5
    assert record.median_error == pytest.approx(1 / 3, abs=1e-3)
    assert record.learned["prices"] == [scheduler.batches]


def test_the_server_sees_nothing_of_it(clock):
    scheduler = Scheduler(clock)
    worker, before = scheduler.draft_worker, torch.random.get_rng_state()
    serve_texts(scheduler, budget_seconds=60.0)
    assert worker.cast_stats is worker.stats and worker.tools.recorder == "the server's"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert scheduler.is_flushed and not scheduler.gracefully_exit


def test_the_budget_ends_it(clock):
    scheduler = Scheduler(clock, seconds=10.0, batch=64)
    serve_texts(scheduler, budget_seconds=35.0)
    # The next one may take twice as long as the last.
    assert [len(batch) for batch in scheduler.batches] == [1, 1]
    assert clock.now == 120.0


def test_prompts_and_answers_share_a_short_context(clock):
    scheduler = Scheduler(clock, context=60)
    serve_texts(scheduler, budget_seconds=60.0)
    for request in scheduler.batches[0]:
        assert len(request.input_ids) <= 30
        assert request.sampling_params.max_new_tokens == 30 - 8


@pytest.mark.parametrize("settings", [{"tokenizer": False}, {"context": 16}, {"pool": 10}])
def test_where_nothing_can_be_served_nothing_is(clock, settings):
    scheduler = Scheduler(clock, **settings)
    assert serve_texts(scheduler, budget_seconds=60.0) is None
    assert scheduler.batches == []


def test_every_rank_takes_what_rank_0_saw(clock):
    scheduler = Scheduler(clock)
    seen = []

    def broadcast(own, src):
        seen.append(own)
        return own

    scheduler.tp_group = SimpleNamespace(world_size=2, broadcast_object=broadcast)
    record = serve_texts(scheduler, budget_seconds=60.0)
    # Before each batch, whether it runs; at the end, the record.
    assert seen == [True] * 5 + [False, record]


def test_the_worker_starts_from_what_the_run_learned(clock):
    scheduler = Scheduler(clock)
    found = FoundProfile(make_profile(), "p.json", [])
    completed = complete_profile(scheduler, found)
    assert scheduler.draft_worker.used == [found, completed]
    assert completed.profile.serving.steps == 5
    assert completed.profile.target == found.profile.target


def test_without_a_run_the_tables_serve(clock):
    scheduler = Scheduler(clock, tokenizer=False)
    found = FoundProfile(make_profile(), "p.json", [])
    assert complete_profile(scheduler, found) == found
    assert scheduler.draft_worker.used == [found]


def test_a_failure_leaves_the_scheduler_its_own(clock):
    scheduler = Scheduler(clock)
    own = scheduler.ingest_requests

    def fail(request):
        raise RuntimeError("out of memory")

    scheduler.handle_generate_request = fail
    with contextlib.suppress(RuntimeError):
        serve_texts(scheduler, budget_seconds=60.0)
    assert scheduler.ingest_requests == own
    assert scheduler.draft_worker.tools.recorder == "the server's"
