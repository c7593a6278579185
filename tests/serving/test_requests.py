"""What is read from requests: their modes, and whether drafts serve them exactly."""

import logging
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from cast_sglang.policy.lookahead import KEEP
from cast_sglang.serving import requests
from cast_sglang.serving.request_modes import LATENCY, OFF, THROUGHPUT
from cast_sglang.serving.stats import StepStats
from tests.support.request_modes import BAD_CUSTOM_PARAMS, BAD_MODES


def batch_of(*custom_params):
    return [
        SimpleNamespace(sampling_params=SimpleNamespace(custom_params=params))
        for params in custom_params
    ]


def test_modes_of_a_batch():
    batch = batch_of(None, {"cast": "off"}, {"other": 1}, {"cast": "latency"})
    assert requests.modes_of(batch) == (THROUGHPUT, OFF, THROUGHPUT, LATENCY)
    assert requests.modes_of([]) == ()


def test_a_mode_that_was_never_checked_does_not_end_the_scheduler():
    batch = batch_of(*({"cast": value} for value in BAD_MODES), *BAD_CUSTOM_PARAMS)
    assert set(requests.modes_of(batch)) == {THROUGHPUT}


@pytest.fixture
def determinism(monkeypatch):
    """Whether inference is deterministic; off unless a test changes it."""
    state = SimpleNamespace(enable_deterministic_inference=False)
    monkeypatch.setattr(requests, "get_exec", lambda: SimpleNamespace(deterministic=state))
    return state


class Request:
    """Like SGLang's, one that equals itself alone."""

    def __init__(self, num_tokens=1, processor=None, **params):
        self.sampling_params = SamplingParams(**params)
        self.output_ids, self.is_finished = [7] * num_tokens, False
        self.origin_input_ids, self.cached_tokens = [0] * 30, 0
        self.custom_logit_processor = processor

    def finished(self):
        return self.is_finished


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({}, None),
        ({"temperature": 0.0}, None),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.2, "logit_bias": {"3": 1.0}}, None),
        ({"sampling_seed": 3}, None),
        ({"frequency_penalty": 0.1}, "a penalty"),
        ({"presence_penalty": -0.1}, "a penalty"),
        ({"repetition_penalty": 1.1, "temperature": 0.0}, "a penalty"),
        ({"min_new_tokens": 5}, "min_new_tokens"),
        ({"min_new_tokens": 5, "num_tokens": 5}, None),
        ({"processor": "{}"}, "a custom logit processor"),
    ],
)
def test_what_drafts_cannot_serve_exactly_is_decoded_plainly(determinism, params, reason):
    assert requests.why_plain(Request(**params)) == reason
    batch = [Request(), Request(**params)]
    weights = requests.RunningRequests().update(batch, lambda count: None)
    assert (weights is None) if reason is None else (weights.tolist() == [1.0, 0.0])


def test_seeds_matter_where_inference_is_deterministic(determinism):
    determinism.enable_deterministic_inference = True
    assert requests.why_plain(Request()) == "a seed"
    assert requests.why_plain(Request(temperature=0.0)) is None


@pytest.mark.parametrize(
    ("params", "truncates"),
    [
        ({}, False),
        ({"top_k": 5}, False),
        ({"top_p": 0.5}, False),
        ({"top_k": 5, "top_p": 0.5}, True),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.1, "temperature": 0.0}, False),
    ],
)
def test_only_cuts_that_verify_lacks_are_made_here(determinism, params, truncates):
    running = requests.RunningRequests()
    running.update([Request(), Request(**params)], lambda count: None)
    assert (running.sampling is not None) == truncates
    if truncates:
        assert running.sampling == (True, None)


def test_a_request_is_counted_once_and_a_reason_is_told_once(determinism, caplog):
    running, stats = requests.RunningRequests(), StepStats()
    other, first, second = Request(), Request(frequency_penalty=1.0), Request(presence_penalty=1.0)
    # The first one is retracted for a step, and comes back.
    batches = ([other], [other, first], [other], [first], [first, second])
    with caplog.at_level(logging.INFO, logger=requests.logger.name):
        for reqs in batches:
            assert not running.are(reqs)
            running.update(reqs, stats.record_plain_requests)
            assert running.are(reqs)
    assert stats.snapshot()["plain_requests"] == 2
    assert caplog.text.count("because of a penalty") == 1
    assert running.sampling.is_plain.tolist() == [True, True]


def test_min_new_tokens_are_tokens_also_after_a_retraction(determinism):
    req = Req("a", "", array("q", [1, 2]), SamplingParams(max_new_tokens=20, min_new_tokens=3))
    is_plain = []
    for _ in range(2):
        for _ in range(4):
            req.output_ids.append(7)
            req.decode_batch_idx += 1
            is_plain.append(requests.why_plain(req) is not None)
        req.reset_for_retract()
    assert is_plain == [True, True] + [False] * 6


def prefill_of(*reqs, chunked=None):
    return SimpleNamespace(reqs=list(reqs), chunked_req=chunked)


NO_DRAFTS = [
    {"custom_params": {"cast": "off"}},
    {"frequency_penalty": 0.5},
    {"processor": "{}"},
]


@pytest.mark.parametrize("params", NO_DRAFTS)
def test_prompts_behind_which_nothing_is_ever_drafted_are_left_out(determinism, params):
    running, other = requests.RunningRequests(), Request(max_new_tokens=50)
    never = Request(max_new_tokens=50, **params)
    assert running.left_out(prefill_of(never), lambda size: 0) == 1
    # The requests of a prefill run through the draft together.
    assert running.left_out(prefill_of(never, other), lambda size: 0) == 0
    soon = Request(max_new_tokens=50, min_new_tokens=3)
    assert running.left_out(prefill_of(soon), lambda size: 0) == 0


def test_without_a_draft_model_no_prompt_is_left_out_and_no_child_is_drawn(determinism):
    running, req = requests.RunningRequests(draws=True, has_draft=False), Request(max_new_tokens=5)
    assert running.left_out(prefill_of(req), lambda size: 100) == 0
    assert running.update([req], lambda count: None) is None and running.drawn is None


@pytest.mark.parametrize(
    ("tokens", "generated", "steps", "is_left_out"),
    [(10, 0, 9, True), (10, 0, 8, False), (10, 2, 7, True), (1, 0, 0, False), (1, 0, 1, True)],
)
def test_prompts_of_requests_that_end_before_the_next_try_are_left_out(
    determinism, tokens, generated, steps, is_left_out
):
    """The prefill brings a token; a request that comes back after a retraction has some."""
    running = requests.RunningRequests()
    req = Request(max_new_tokens=tokens, num_tokens=generated)
    assert running.left_out(prefill_of(req), lambda size: steps) == is_left_out
    long = Request(max_new_tokens=1000)
    assert running.left_out(prefill_of(req, long), lambda size: steps) == 0
    assert running.left_out(prefill_of(req, chunked=long), lambda size: steps) == 0


def test_nothing_is_left_out_where_prompts_are_found_in_the_cache_again(determinism):
    """A later request would draft behind it."""
    running, req = requests.RunningRequests(), Request(max_new_tokens=5)

    def left_out(cached):
        req.cached_tokens = cached
        return running.left_out(prefill_of(req), lambda size: 100)

    assert [left_out(0) for _ in range(5)] == [1] * 5
    assert left_out(1) == 1  # as the token that all prompts begin with
    assert [left_out(25) for _ in range(3)] == [0] * 3
    # It is over when the last fifty prompts or so have found nothing.
    later = [left_out(0) for _ in range(150)]
    assert later[:20] == [0] * 20 and later[-1] == 1


def test_tries_are_looked_for_at_the_batch_size_to_come(determinism):
    running, asked = requests.RunningRequests(), []
    old = [Request(), Request(), Request()]
    running.update(old, lambda count: None)
    old[1].is_finished = True
    one, two = Request(), Request()
    for batch in (prefill_of(one, two), prefill_of(two, Request())):
        running.left_out(batch, lambda size: asked.append(size) or 0)
    assert asked == [4, 5]  # the second part of a prompt is no further request
    running.update([one], lambda count: None)
    running.left_out(prefill_of(Request()), lambda size: asked.append(size) or 0)
    assert asked[2] == 2


def test_a_request_whose_prompt_was_left_out_gets_no_drafts_until_it_is_prefilled_anew(determinism):
    running = requests.RunningRequests(draws=True)
    short, other = Request(max_new_tokens=5), Request(frequency_penalty=1.0)
    latency = Request(custom_params={"cast": "latency"})

    def weights(*reqs):
        found = running.update(reqs, lambda count: None)
        return found if found is None else found.tolist()

    assert weights(short) is None
    assert running.prompts(None).num_left_out == 0
    running.left_out(prefill_of(short), lambda size: 10)
    assert weights(short) == [0.0] and running.prompts(None).num_left_out == 1
    assert running.drawn is None and running.sampling is None
    # Those with drafts weigh 1 in the mean.
    assert weights(latency, short, other) == [1.0, 0.0, 0.0]
    assert running.drawn.tolist() == [True, False, False]
    # Verify lacks nothing for a root without drafts; for a penalty it does.
    assert running.sampling.is_plain.tolist() == [False, False, True]
    running.left_out(prefill_of(short), lambda size: 0)
    assert weights(short) is None
    # A request that never gets drafts is none that a try waits for.
    off = Request(custom_params={"cast": "off"})
    assert running.left_out(prefill_of(off), lambda size: 0) == 1
    assert weights(latency, off) == [1.0, 0.0] and running.prompts(None).num_left_out == 0


def test_prompts_are_weighed_by_the_answers_that_they_are_for(determinism):
    """The part that the cache held takes the draft nothing."""
    running = requests.RunningRequests()
    long, short = Request(max_new_tokens=40), Request(max_new_tokens=10)
    short.cached_tokens = 10
    running.update([long, short], lambda count: None)
    assert running.prompts(None)[:3] == ((30 + 20) / 2, (40 + 10) / 2, None)
    for cached, reuse in ((10, 1 / 3), (0, KEEP * 10 / (30 + KEEP * 30))):
        short.cached_tokens = cached
        running.left_out(prefill_of(short), lambda size: 0)
        running.update([long, short], lambda count: None)
        found = running.prompts(7.5)
        assert found.reuse == pytest.approx(reuse) and found.prompt_row_us == 7.5
        # Where prompts are found again, the draft runs them in any case.
        assert found.prompt_rows == 0.0
