"""What is read from requests: their modes, and how long their answers get."""

from types import SimpleNamespace

import pytest

from cast_sglang.errors import ConfigError
from cast_sglang.policy.request_modes import LATENCY, OFF, THROUGHPUT
from cast_sglang.serving import requests
from cast_sglang.serving.requests import HALF_LIFE, AnswerLengths
from tests.support.request_modes import BAD_CUSTOM_PARAMS, BAD_MODES


class Request(SimpleNamespace):
    """As much of SGLang's request as is read; compared by identity like it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def finished(self) -> bool:
        return self.is_finished


def request(is_finished: bool = True) -> Request:
    return Request(is_finished=is_finished)


def test_tokens_over_ends():
    lengths = AnswerLengths()
    first, second, retracted = request(), request(), request(is_finished=False)
    lengths.note([first, second, retracted])
    lengths.count(10)
    assert lengths.mean_tokens is None
    lengths.note([second, first])  # in another order, and without one that comes back
    assert lengths.mean_tokens is None
    lengths.note([second])
    assert lengths.mean_tokens == pytest.approx(10, rel=0.03)
    lengths.count(30)  # of the one that runs: long ones count before they end
    assert lengths.mean_tokens == pytest.approx(40, rel=0.03)


def test_a_new_kind_of_answers_is_followed():
    lengths = AnswerLengths()
    for num_tokens, count in ((100, 500), (20, HALF_LIFE)):
        for _ in range(count):
            lengths.note([request()])
            lengths.count(num_tokens)
    lengths.note([])
    assert lengths.mean_tokens == pytest.approx(60, abs=2)


def test_answers_without_tokens_are_no_division_by_zero():
    lengths = AnswerLengths()
    lengths.note([request()])
    lengths.note([])
    assert lengths.mean_tokens == 1.0


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


@pytest.mark.parametrize("algorithm", ["CAST", "EAGLE3", None])
def test_only_a_cast_server_checks_modes(monkeypatch, algorithm):
    spec = SimpleNamespace(speculative_algorithm=algorithm)
    monkeypatch.setattr(requests, "get_spec", lambda: spec)
    good, bad = (SimpleNamespace(custom_params={"cast": value}) for value in ("off", "fast"))
    requests.check_mode(None, good, 32_000)
    if algorithm == "CAST":
        with pytest.raises(ConfigError, match="custom_params.cast"):
            requests.check_mode(None, bad, 32_000)
    else:
        requests.check_mode(None, bad, 32_000)
