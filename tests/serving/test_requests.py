"""What is read from requests: their modes."""

from types import SimpleNamespace

import pytest

from cast_sglang.errors import ConfigError
from cast_sglang.policy.request_modes import LATENCY, OFF, THROUGHPUT
from cast_sglang.serving import requests
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
