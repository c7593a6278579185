"""A server without a draft model: copies where they pay, plain steps elsewhere, same answers."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.copied import edits, tables
from benchmarks.harness.counters import cast_state
from benchmarks.harness.servers import Server
from tests.server.client import generate, greedy_ids, in_parallel, post_generate
from tests.server.conftest import NUM_TOKENS, REQUEST_FLAGS, ServerFactory
from tests.server.homogeneity import homogeneity_p_value
from tests.server.test_server_laws import ALPHA, sample
from tests.support.profiles import write_profile

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

ROWS = 12


@pytest.fixture(scope="module")
def draftless(start_server: ServerFactory, tmp_path_factory) -> Iterator[Server]:
    """A server for which rows cost next to nothing, so that every copy is worth a try."""
    profile = write_profile(tmp_path_factory.mktemp("profiles") / "cheap-rows.json", row_us=1.0)
    flags = ("--cast-profile", str(profile), "--cast-residuals", "off")
    flags += ("--speculative-num-draft-tokens", str(ROWS), *REQUEST_FLAGS)
    with start_server("cast+draft=none", *flags, name="draftless") as server:
        yield server


@pytest.fixture(scope="module")
def repeating(prompts) -> list[str]:
    """Prompts that say what they have said before, and stop in the middle of it."""
    again = [f"{prompt}\n\n{prompt[: len(prompt) // 2]}" for prompt in prompts[:12]]
    return again + [item.turns[0] for item in edits()[:8] + tables()[:4]]


@pytest.fixture(scope="module")
def repeated_ids(plain, repeating) -> list[list[int]]:
    """Plain decoding's answers."""
    return greedy_ids(plain, repeating, 8, NUM_TOKENS)


def gained(server: Server, before: dict, *names: str) -> list[float]:
    after = cast_state(server)
    return [after[name] - before[name] for name in names]


@pytest.mark.parametrize(("batch", "every"), [(1, 3), (8, 1)])
def test_greedy_tokens_equal_plain_decoding(draftless, repeating, repeated_ids, batch, every):
    before = cast_state(draftless)
    assert greedy_ids(draftless, repeating[::every], batch, NUM_TOKENS) == repeated_ids[::every]
    copied, drafts, steps = gained(draftless, before, "copies_accepted", "drafts_accepted", "steps")
    # The last step is taken in by the next one.
    assert abs(copied - drafts) <= ROWS * batch < drafts and steps > 0
    layers, nodes = gained(draftless, before, "layers_grown", "nodes_drafted")
    assert layers == nodes == 0


def test_a_text_that_repeats_itself_takes_fewer_steps_than_tokens(draftless, plain):
    tokens, wanted = [7, 8, 9] * 100, {"max_new_tokens": NUM_TOKENS}
    before = cast_state(draftless)
    answer = generate(draftless, tokens, **wanted)
    assert answer["output_ids"] == generate(plain, tokens, **wanted)["output_ids"]
    steps, drafts = gained(draftless, before, "steps", "drafts_accepted")
    assert steps + drafts >= NUM_TOKENS - 1
    length = answer["meta_info"]["completion_tokens"] / answer["meta_info"]["spec_verify_ct"]
    assert length == pytest.approx(NUM_TOKENS / steps, rel=0.1) and length > 1.5


def test_text_without_copies_is_decoded_plainly(draftless, plain):
    """Every token of the prompt is another one, so for a while nothing was said before."""
    tokens = list(range(300, 400))
    wanted = {"max_new_tokens": 6}
    before = cast_state(draftless)
    answer = generate(draftless, tokens, **wanted)["output_ids"]
    assert answer == generate(plain, tokens, **wanted)["output_ids"]
    steps, plain_steps, rows = gained(draftless, before, "steps", "plain_steps", "nodes_verified")
    assert plain_steps >= steps - 3
    assert rows - steps <= 3 * ROWS


def test_ordinary_text_is_served_as_by_plain_decoding(draftless, prompts, expected_ids):
    assert greedy_ids(draftless, prompts[:16], 8, NUM_TOKENS) == expected_ids[:16]


def test_requests_that_sample_are_copied_beside_greedy_ones(draftless, repeating, repeated_ids):
    sampled: list = []

    def sample() -> None:
        wanted = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 2 * NUM_TOKENS}
        sampled.extend(generate(draftless, [[7, 8, 9] * 60] * 4, **wanted))

    beside = threading.Thread(target=sample)
    beside.start()
    assert greedy_ids(draftless, repeating[:8], 8, NUM_TOKENS) == repeated_ids[:8]
    beside.join()
    assert [len(answer["output_ids"]) for answer in sampled] == [2 * NUM_TOKENS] * 4


def test_copied_tokens_have_the_law_of_plain_decoding(draftless, plain, prompts, pytestconfig):
    """Where a context has an earlier continuation, and samples follow it or do not."""
    prompt, num_samples = f"{prompts[0]}\n\n{prompts[0]}", pytestconfig.getoption("--law-samples")
    sampling = {"temperature": 1.0, "top_p": 0.9}
    before = cast_state(draftless)
    (ours, passes), (theirs, _) = in_parallel(
        lambda server: sample(server, prompt, num_samples, **sampling), [draftless, plain], 2
    )
    assert gained(draftless, before, "copies_accepted")[0] > 0 and (passes == 1).any()
    for last in range(ours.shape[1]):
        assert homogeneity_p_value(ours[:, : last + 1], theirs[:, : last + 1]) > ALPHA


def test_a_request_that_wants_no_drafts_gets_none(draftless, plain):
    wanted = {"max_new_tokens": 16, "custom_params": {"cast": "off"}}
    before = cast_state(draftless)
    answer = generate(draftless, [7, 8, 9] * 60, **wanted)["output_ids"]
    assert answer == generate(plain, [7, 8, 9] * 60, max_new_tokens=16)["output_ids"]
    steps, plain_steps, drafts = gained(
        draftless, before, "steps", "plain_steps", "drafts_accepted"
    )
    assert plain_steps == steps and drafts == 0


def test_up_to_the_end_of_the_context(draftless, plain, pair):
    config = json.loads((Path(pair.target) / "config.json").read_text())
    tokens = ([7, 8, 9] * config["max_position_embeddings"])[
        : config["max_position_embeddings"] - 20
    ]
    wanted = {"max_new_tokens": 20}
    answer = generate(draftless, tokens, **wanted)["output_ids"]
    assert answer == generate(plain, tokens, **wanted)["output_ids"] and 10 < len(answer) < 21


def test_state_and_weights_of_a_server_without_a_draft(draftless, pair):
    state, info = cast_state(draftless), draftless.get("/server_info")
    assert state["copies"] and state["copy_bytes"] > 0
    assert state["reliability"] == [] and state["prices"] and state["profile"]["path"]
    assert info["speculative_draft_model_path"] is None
    sizes = [
        info[f"speculative_{name}"] for name in ("num_steps", "eagle_topk", "num_draft_tokens")
    ]
    assert sizes == [ROWS - 1, 1, ROWS]
    response = post_update(draftless, str(pair.draft))
    assert not response["success"] and "has none" in response["message"]
    assert post_generate(draftless, "Hello", max_new_tokens=2).is_success


def post_update(server: Server, path: str) -> dict:
    url = f"{server.url}/update_weights_from_disk"
    return httpx.post(url, json={"model_path": path}, timeout=120.0).json()
