"""A server that decodes plainly, since no draft pays, and tries again now and then."""

import pytest

from tests.server.client import generate, greedy_ids, in_parallel
from tests.server.conftest import NUM_TOKENS
from tests.support.profiles import write_profile

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def reluctant(start_server, tmp_path_factory):
    """A server by whose profile even drafts that are all accepted lose."""
    path = tmp_path_factory.mktemp("dear") / "dear.json"
    profile = write_profile(path, row_us=2_000.0, draft_us=30_000.0)
    # What it measures while it serves would soon teach it better.
    flags = ("--cast-residuals", "off")
    with start_server("cast", *flags, profile=profile, name="reluctant") as server:
        yield server


def counters(server) -> dict:
    return server.get("/server_info")["internal_states"][0]["cast"]


def test_short_requests_of_a_server_that_decodes_plainly_cost_the_draft_nothing(
    reluctant, plain, prompts
):
    """They come while the next try is far, and bring prompts that no one has sent before."""
    generate(reluctant, prompts[:4], max_new_tokens=200)
    before = counters(reluctant)
    short = [prompt[:80] for prompt in prompts[8:24]]  # so that they are not prefilled in parts
    assert greedy_ids(reluctant, short, 4, 6) == greedy_ids(plain, short, 4, 6)
    after = counters(reluctant)
    left_out = after["prompts_left_out"] - before["prompts_left_out"]
    assert 4 <= left_out <= 16
    # Tries go on: those that come meanwhile have their prompts.
    # A try covers what its prefill took, by far the most of it at these made-up costs.
    for _ in range(5):
        generate(reluctant, prompts[:4], max_new_tokens=200)
        late = counters(reluctant)
        if late["steps"] - late["plain_steps"] > after["steps"] - after["plain_steps"]:
            break
    assert late["prompts_left_out"] == after["prompts_left_out"]
    assert late["steps"] - late["plain_steps"] > after["steps"] - after["plain_steps"]


def test_it_decodes_plainly_and_the_answers_are_those_of_plain_decoding(
    reluctant, prompts, expected_ids
):
    # Until what speculation may lose is used up, it drafts; each batch size has its own account.
    assert greedy_ids(reluctant, prompts[:16], 8, NUM_TOKENS) == expected_ids[:16]
    before = counters(reluctant)
    assert greedy_ids(reluctant, prompts[:16], 8, NUM_TOKENS) == expected_ids[:16]
    assert greedy_ids(reluctant, prompts[:2], 1, NUM_TOKENS) == expected_ids[:2]
    after = counters(reluctant)
    plain = after["plain_steps"] - before["plain_steps"]
    assert plain > 0.5 * (after["steps"] - before["steps"])
    assert any(row["is_plain"] for row in after["prices"])


def test_tries_after_a_pause_draft_as_well_as_ever(reluctant, cast, prompts):
    """What plain steps left undone is done before a try, so drafts are accepted again at once."""
    before = counters(reluctant)
    for start in range(0, 24, 8):
        generate(reluctant, prompts[start : start + 8], max_new_tokens=160)
    after = counters(reluctant)
    tries = after["steps"] - after["plain_steps"] - before["steps"] + before["plain_steps"]
    assert 0 < tries < 0.2 * (after["steps"] - before["steps"])
    drafts = after["drafts_accepted"] - before["drafts_accepted"]
    nodes = after["nodes_verified"] - before["nodes_verified"]
    nodes -= after["requests"] - before["requests"]
    # A try verifies a node or two of each request; most are accepted.
    assert drafts > 0.5 * min(nodes, 8 * tries)


def test_a_request_without_drafts_between_others(cast, prompts, expected_ids):
    """Such a request takes one pass a token, while others in its batch take several."""
    modes = ["off", "throughput", "latency", "off"]

    def ask(index: int) -> dict:
        params = {"cast": modes[index]}
        return generate(cast, prompts[index], max_new_tokens=NUM_TOKENS, custom_params=params)

    answers = in_parallel(ask, range(4), workers=4)
    assert [answer["output_ids"] for answer in answers] == expected_ids[:4]
    passes = [answer["meta_info"]["spec_verify_ct"] for answer in answers]
    assert passes[0] == passes[3] == NUM_TOKENS - 1
    assert max(passes[1:3]) < NUM_TOKENS - 1
