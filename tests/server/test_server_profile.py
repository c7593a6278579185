"""Profile once, then serve: the shipped way, in bfloat16 and without naming the profile."""

import json
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.servers import CPU_PLATFORM
from cast_sglang.costs.profiles import load_profile
from tests.server.client import generate
from tests.server.conftest import NUM_TOKENS
from tests.support.launches import profile
from tests.support.preloaded import run

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


# What is measured grows with the largest batch and the longest context.
SMALL = ("--max-running-requests", "4", "--context-length", "1024")


@pytest.fixture(scope="module")
def cache(pair, tmp_path_factory) -> Path:
    """Measure a profile into a cache directory of its own; return the directory."""
    cache = tmp_path_factory.mktemp("cache")
    flags = ["--quick", "--budget-seconds", "20", "--dtype", "bfloat16", *SMALL]
    flags += ["--model-path", pair.target, "--speculative-draft-model-path", pair.draft]
    flags += ["--max-total-tokens", "16384"]
    env = {**CPU_PLATFORM, "XDG_CACHE_HOME": str(cache)}
    code, output = run(profile, flags, env, cache / "profile.log")
    assert code == 0, output[-3000:]
    done = [line for line in output.splitlines() if line.startswith('{"output"')]
    summary = json.loads(done[-1])
    assert Path(summary["output"]).is_relative_to(cache)
    return cache


def test_profile_is_valid_and_says_what_it_measured(cache):
    (path,) = (cache / "cast_sglang" / "profiles").glob("*.json")
    measured = load_profile(path)
    assert measured.provenance.dtype == "bfloat16"
    assert not measured.provenance.estimated
    assert measured.target.token_counts[0] == 1
    # It ends with a short real run, whose steps were predicted by the tables.
    serving = measured.serving
    assert serving.steps > 10 and 0.05 < serving.median_ratio < 20
    assert {"acceptance", "prices", "corrections"} <= serving.learned.keys()


def test_server_finds_the_profile_of_its_machine(cache, start_server, prompts):
    env = {"CAST_ALLOW_FOREIGN_PROFILE": "0", "XDG_CACHE_HOME": str(cache)}
    flags = ("--dtype", "bfloat16", *SMALL)
    with start_server("cast", *flags, name="cast-bf16", profile="auto", **env) as server:
        answers = generate(server, prompts[:8], max_new_tokens=NUM_TOKENS)
        assert all(answer["meta_info"]["spec_accept_length"] > 1 for answer in answers)
        state = server.get("/server_info")["internal_states"][0]["cast"]
        # Predictions are for a machine that does nothing else; only nonsense fails here.
        assert 0.05 < state["predicted_to_measured"] < 20


def test_server_without_a_profile_measures_one(start_server, prompts, tmp_path):
    env = {"CAST_ALLOW_FOREIGN_PROFILE": "0", "XDG_CACHE_HOME": str(tmp_path)}
    # In float32, of which no profile is shipped.
    with start_server("cast", *SMALL, name="cast-measured", profile="auto", **env) as server:
        (path,) = (tmp_path / "cast_sglang" / "profiles").glob("*.json")
        measured = load_profile(path)
        assert measured.provenance.dtype == "float32" and not measured.provenance.estimated
        assert measured.plain is None and measured.step_overhead_us is not None
        # What the short run learned is there before the first request but SGLang's own; its steps
        # are not counted.
        state = server.get("/server_info")["internal_states"][0]["cast"]
        assert measured.serving.steps > state["steps"]
        octaves = [row["batch_sizes"] for row in measured.serving.learned["prices"]]
        assert [row["batch_sizes"] for row in state["prices"]] == octaves and len(octaves) > 1
        answers = generate(server, prompts[:8], max_new_tokens=NUM_TOKENS)
        assert all(answer["meta_info"]["spec_accept_length"] > 1 for answer in answers)
        state = server.get("/server_info")["internal_states"][0]["cast"]
        assert state["profile"] == {"path": str(path), "estimated": False}
        # Only served steps count, and their passes were timed.
        assert state["steps"] < NUM_TOKENS * 3 and state["residuals"]

        reset = {"server_args": {"cast_reset_residuals": 1}}
        response = httpx.post(f"{server.url}/set_internal_state", json=reset)
        assert response.is_success and response.json() == [True]
        state = server.get("/server_info")["internal_states"][0]["cast"]
        assert state["residuals"] == []
