"""What a CAST server counts, and that it gives back what a request held."""

import time
from collections.abc import Callable

import httpx
import pytest

from benchmarks.harness.servers import Server
from tests.server.client import GREEDY, generate, loads
from tests.server.conftest import NUM_TOKENS

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


def cast_state(server: Server) -> dict:
    return server.get("/server_info")["internal_states"][0]["cast"]


def metrics(server: Server) -> dict[str, float]:
    """Return the server's `cast:` metrics, summed over their labels."""
    values: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30.0).text.splitlines():
        if line.startswith("cast:"):
            name = line.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(line.rpartition(" ")[2])
    return values


def test_figures_of_a_request_agree(cast, prompts):
    info = generate(cast, prompts[0], max_new_tokens=NUM_TOKENS)["meta_info"]
    passes = info["spec_verify_ct"]
    assert info["completion_tokens"] == NUM_TOKENS
    assert info["spec_accept_length"] == pytest.approx(NUM_TOKENS / passes)
    assert info["spec_num_correct_drafts"] > 0
    # Prefill gives the first token; each pass its drafts and one more, the last may overshoot.
    assert info["spec_num_correct_drafts"] + passes + 1 >= NUM_TOKENS


@pytest.mark.parametrize("mode", ["throughput", "off"])
def test_a_requests_accept_rate_is_of_the_drafts_that_were_verified(cast, prompts, mode):
    before = cast_state(cast)
    custom_params = {"cast": mode}
    info = generate(cast, prompts[2], max_new_tokens=NUM_TOKENS, custom_params=custom_params)
    info, after = info["meta_info"], cast_state(cast)

    def gained(name):
        return after[name] - before[name]

    proposed = gained("nodes_verified") - gained("requests")
    assert info["spec_num_proposed_drafts"] == proposed
    assert info["spec_cap_length"] == pytest.approx(gained("nodes_verified") / gained("requests"))
    if mode == "off":
        assert proposed == info["spec_accept_rate"] == 0
        assert gained("plain_steps") == gained("steps")
    else:
        assert info["spec_accept_rate"] == pytest.approx(gained("drafts_accepted") / proposed)


def test_counters_move_with_the_requests(cast, prompts):
    before, exported_before = cast_state(cast), metrics(cast)
    answer = generate(cast, prompts[1], max_new_tokens=NUM_TOKENS)
    after, exported_after = cast_state(cast), metrics(cast)
    passes = answer["meta_info"]["spec_verify_ct"]

    assert after["steps"] - before["steps"] == passes
    assert after["requests"] - before["requests"] == passes
    drafts = after["drafts_accepted"] - before["drafts_accepted"]
    assert drafts == answer["meta_info"]["spec_num_correct_drafts"]
    assert after["nodes_verified"] - before["nodes_verified"] >= 2 * passes
    assert after["mean_accept_len"] > 1
    assert after["mean_measured_us"] > 0
    assert sum(after["accept_lens"].values()) == after["accepted_requests"]

    after["request_steps"], before["request_steps"] = after["requests"], before["requests"]
    for name in (
        *("steps", "plain_steps", "request_steps", "layers_grown"),
        *("nodes_drafted", "nodes_verified", "drafts_accepted"),
    ):
        exported = f"cast:{name}_total"
        assert exported_after[exported] - exported_before[exported] == after[name] - before[name]


def test_a_cancelled_request_gives_back_its_memory(cast, prompts):
    body = {
        "text": prompts[7],
        "sampling_params": {**GREEDY, "max_new_tokens": 2000},
        "stream": True,
    }
    with httpx.stream("POST", f"{cast.url}/generate", json=body, timeout=60.0) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data:"))
        for _ in range(5):
            next(lines)
        wait_until(lambda: loads(cast)["num_running_reqs"] == 1, "the request runs")
    # Leaving `with` closes the connection.
    wait_until(lambda: loads(cast)["num_running_reqs"] == 0, "the request ends")
    cast.flush_cache()
    # The server checks its pools when idle and ends if a slot is lost; it still serves.
    assert generate(cast, prompts[8], max_new_tokens=8)["meta_info"]["completion_tokens"] == 8
    cast.flush_cache()
    wait_until(lambda: loads(cast)["num_used_tokens"] == 0, "no token is held")


def test_profiler_writes_a_trace_of_the_steps_asked_for(cast, prompts, tmp_path):
    body = {"output_dir": str(tmp_path), "num_steps": 3, "activities": ["CPU"]}
    response = httpx.post(f"{cast.url}/start_profile", json=body, timeout=60.0)
    assert response.is_success, response.text
    generate(cast, prompts[9], max_new_tokens=NUM_TOKENS)
    wait_until(lambda: list(tmp_path.glob("*.trace.json.gz")), "there is a trace")


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds} s until {what}"
        time.sleep(0.1)


def test_an_idle_server_uses_no_core(cast):
    """Several servers share a machine in the benchmarks, so those that wait must not poll."""
    import psutil

    def cpu_seconds() -> float:
        processes = [psutil.Process(cast.pid), *psutil.Process(cast.pid).children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    loads(cast)
    time.sleep(1.0)
    before = cpu_seconds()
    time.sleep(4.0)
    # One that polls takes a core or more, and on a busy machine no less than a good part of it.
    assert cpu_seconds() - before < 0.3 * 4.0
