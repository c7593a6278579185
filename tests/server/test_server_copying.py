"""Copied drafts change how fast greedy answers come, and no token of them."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.copied import edits, tables
from benchmarks.harness.counters import cast_state
from benchmarks.harness.servers import Server
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.records import TracedStep, candidate_parents, unpacked
from tests.server.client import generate, greedy_ids, in_parallel, post_generate
from tests.server.conftest import NUM_TOKENS, ServerFactory
from tests.server.homogeneity import homogeneity_p_value
from tests.server.test_server_laws import ALPHA, sample
from tests.server.test_server_trace import check_replayed

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copying") / "t.jsonl"


@pytest.fixture(scope="module")
def copying(start_server: ServerFactory, trace_path: Path) -> Iterator[Server]:
    """Its trees depend on the made-up costs alone, and not on how busy the machine is."""
    flags = ("--cast-copying", "on", "--cast-trace", str(trace_path), "--cast-residuals", "off")
    with start_server("cast", *flags, name="copying") as server:
        yield server


@pytest.fixture(scope="module")
def repeating(prompts) -> list[str]:
    """Prompts that say what they have said before, and stop in the middle of it."""
    again = [f"{prompt}\n\n{prompt[: len(prompt) // 2]}" for prompt in prompts[:30]]
    return again + [item.turns[0] for item in edits()[:12] + tables()[:8]]


@pytest.fixture(scope="module")
def repeated_ids(plain, repeating) -> list[list[int]]:
    """Plain decoding's answers."""
    return greedy_ids(plain, repeating, 8, NUM_TOKENS)


@pytest.mark.parametrize(("batch", "every"), [(1, 3), (8, 1)])
def test_greedy_tokens_equal_plain_decoding(copying, repeating, repeated_ids, batch, every):
    before = cast_state(copying)
    assert greedy_ids(copying, repeating[::every], batch, NUM_TOKENS) == repeated_ids[::every]
    after = cast_state(copying)
    accepted = after["copies_accepted"] - before["copies_accepted"]
    drafts = after["drafts_accepted"] - before["drafts_accepted"]
    assert 0 < accepted <= drafts
    assert after["copy_bytes"] > 0 and after["copies"]


def test_sampled_tokens_have_the_law_of_plain_decoding(copying, plain, repeating):
    """Where the text has been said before, so that copies hang beside draws.

    Early, as the server learns how seldom they are accepted there, and then tries fewer.
    """
    before = cast_state(copying)["copies_accepted"]
    (ours, _), (theirs, _) = in_parallel(
        lambda server: sample(server, repeating[0], 720, temperature=1.0),
        [copying, plain],
        workers=2,
    )
    assert cast_state(copying)["copies_accepted"] > before
    for last in range(ours.shape[1]):
        for of in (slice(last, last + 1), slice(0, last + 1)):
            assert homogeneity_p_value(ours[:, of], theirs[:, of]) > ALPHA


def test_text_without_repeats_is_served_as_before(copying, prompts, expected_ids):
    assert greedy_ids(copying, prompts, 8, NUM_TOKENS) == expected_ids


@pytest.mark.parametrize("tokens", [[7] * 1000, [7, 8, 9] * 300])
def test_text_of_one_token(copying, plain, tokens):
    wanted = {"max_new_tokens": NUM_TOKENS}
    answer = generate(copying, tokens, **wanted)["output_ids"]
    assert answer == generate(plain, tokens, **wanted)["output_ids"]


def test_a_path_of_copies_ends_with_the_context(copying, plain, pair):
    """It would be longer than what is left."""
    config = json.loads((Path(pair.target) / "config.json").read_text())
    size, wanted = config["max_position_embeddings"] - 20, {"max_new_tokens": 20}
    tokens = ([7, 8, 9] * size)[:size]
    answer = generate(copying, tokens, **wanted)["output_ids"]
    assert answer == generate(plain, tokens, **wanted)["output_ids"] and 10 < len(answer) < 21


def test_requests_that_sample_are_copied_and_those_beside_them_are_exact(
    copying, repeating, repeated_ids
):
    """Their law: `test_server_laws.py`."""
    sampling = threading.Thread(
        target=generate,
        args=(copying, repeating[8:16]),
        kwargs={"temperature": 1.0, "max_new_tokens": 2 * NUM_TOKENS},
    )
    sampling.start()
    assert greedy_ids(copying, repeating[:8], 8, NUM_TOKENS) == repeated_ids[:8]
    sampling.join()
    assert any(row["is_sampled"] for row in cast_state(copying)["copies"])


def test_requests_of_a_pool_copy_from_each_other_and_stay_exact(
    copying, plain, repeating, repeated_ids
):
    """The second time in the pool there is more to copy; in another pool there is not."""
    passes = []  # of a request each; tokens accepted behind the end of an answer save none
    for pool in ("one", "one", "two"):
        before = cast_state(copying)
        wanted = {"max_new_tokens": NUM_TOKENS, "custom_params": {"cast_pool": pool}}
        answers = generate(copying, repeating[:4], **wanted)
        assert [answer["output_ids"] for answer in answers] == repeated_ids[:4]
        after = cast_state(copying)
        passes.append(after["requests"] - before["requests"])
    assert passes[1] < passes[0] and passes[1] < passes[2]


@pytest.mark.parametrize("pool", [7, "", ["a"], {"id": "a"}, True])
def test_a_pool_of_another_type_is_refused(copying, pool):
    response = post_generate(copying, [1, 2, 3], custom_params={"cast_pool": pool})
    assert response.status_code == 400 and "custom_params.cast_pool" in response.text


def test_an_aborted_request_leaves_nothing_behind(copying, repeating, repeated_ids):
    long = threading.Thread(
        target=post_generate,
        args=(copying, repeating[:4]),
        kwargs={"max_new_tokens": 2000},
    )
    before = cast_state(copying)["steps"]
    long.start()
    while cast_state(copying)["steps"] < before + 5:
        time.sleep(0.05)
    httpx.post(f"{copying.url}/abort_request", json={"abort_all": True}, timeout=60.0)
    long.join()
    assert greedy_ids(copying, repeating[4:8], 4, NUM_TOKENS) == repeated_ids[4:8]


def test_a_retracted_request_goes_on_as_plain_decoding_would(copying, plain, repeating):
    """Its text is read anew when it runs again."""
    wanted = {"max_new_tokens": 8 * NUM_TOKENS}  # some are left when the request to retract comes
    answers: list[dict] = []
    running = threading.Thread(
        target=lambda: answers.extend(generate(copying, repeating[:4], **wanted))
    )
    before = cast_state(copying)["steps"]
    running.start()
    while cast_state(copying)["steps"] < before + 2:
        time.sleep(0.005)
    for path, body in (("pause_generation", {"mode": "retract"}), ("continue_generation", {})):
        httpx.post(f"{copying.url}/{path}", json=body, timeout=60.0).raise_for_status()
    running.join()
    expected = generate(plain, repeating[:4], **wanted)
    assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in expected]
    assert any(a["meta_info"]["num_retractions"] for a in answers)


def deepest(step: TracedStep, topk: int) -> int:
    """Return the length of the longest path that was verified."""
    lengths = [0]
    for request in step.requests:
        parents, depth = candidate_parents(request, topk), {-1: 0}
        for node in unpacked(request.verified, "int32").tolist():
            depth[node] = depth[parents[node]] + 1
        lengths.append(max(depth.values()))
    return max(lengths)


def test_replay_makes_the_choices_of_the_server(copying, trace_path, repeating, made_up_profile):
    """Of all that the tests above have asked, and of requests that come and end."""
    for batch in (1, 3, 2):
        generate(copying, repeating[:batch], max_new_tokens=NUM_TOKENS)
    copying.get("/server_info")  # also writes the last steps
    trace = read_trace(trace_path)
    alone = [
        node >= len(request.probs) // 4
        for step in trace.steps
        for request in step.requests
        for node in request.accepted
    ]
    assert any(alone) and not all(alone)
    # Paths of copies were longer than the tree may have layers.
    longest = max(deepest(step, trace.header.topk) for step in trace.steps)
    assert longest > trace.header.num_steps
    check_replayed(trace, made_up_profile)
