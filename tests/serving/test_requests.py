"""What is read from requests: their modes, and whether drafts serve them exactly."""

import logging
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from cast_sglang.policy.request_modes import LATENCY, OFF, THROUGHPUT
from cast_sglang.serving import requests
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
        self.output_ids = [7] * num_tokens
        self.custom_logit_processor = processor


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
    weights = requests.request_weights([Request(), Request(**params)])
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
