"""Chains: CAST chooses how long they get and how many rows are verified, on pages of any size."""

import pytest

from tests.server.client import generate, greedy_ids
from tests.server.conftest import NUM_TOKENS, ServerFactory
from tests.server.homogeneity import homogeneity_p_value
from tests.server.test_server_lossless import ALPHA, sample

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

STEPS = 6
CHAIN = ("--speculative-eagle-topk", "1", "--speculative-num-steps", str(STEPS))


@pytest.fixture(scope="module")
def chain(start_server: ServerFactory):
    with start_server("cast", *CHAIN, "--random-seed", "1") as server:
        yield server


@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_tokens_of_chains_equal_plain_decoding(chain, prompts, expected_ids, batch):
    assert greedy_ids(chain, prompts, batch, NUM_TOKENS) == expected_ids


def test_a_chain_is_as_long_as_it_pays(chain, prompts):
    def counters() -> dict:
        return chain.get("/server_info")["internal_states"][0]["cast"]

    shapes, tokens = set(), 0
    before = counters()
    for prompt in prompts[:10]:
        start = counters()
        answer = generate(chain, prompt, max_new_tokens=NUM_TOKENS)
        end = counters()
        tokens += len(answer["output_ids"])
        steps = end["steps"] - start["steps"]
        shapes.add((end["nodes_verified"] - start["nodes_verified"]) / steps)
    after = counters()
    steps = after["steps"] - before["steps"]
    assert len(shapes) > 1  # rows differ from request to request
    assert tokens / steps > 1.3  # and some are accepted
    # The draft states what it believes, so its chances are more than one.
    predicted = {round(row["drafted"] / row["num_nodes"], 1) for row in after["reliability"]}
    assert len(predicted) > 3


def test_sampled_tokens_of_chains_have_plain_decodings_distribution(plain, chain, prompts):
    ours, theirs = (sample(server, prompts[0], num_tokens=3) for server in (chain, plain))
    for last in range(ours.shape[1]):
        assert homogeneity_p_value(ours[:, : last + 1], theirs[:, : last + 1]) > ALPHA


def test_greedy_tokens_on_pages_equal_plain_decoding(start_server, prompts, expected_ids):
    flags = (*CHAIN, "--page-size", "16")
    with start_server("cast", *flags, name="cast-pages") as server:
        assert greedy_ids(server, prompts, 8, NUM_TOKENS) == expected_ids
        # One that was there before is read from its pages.
        again = generate(server, prompts[0] * 3, max_new_tokens=NUM_TOKENS)
        twice = generate(server, prompts[0] * 3, max_new_tokens=NUM_TOKENS)
        assert twice["meta_info"]["cached_tokens"] >= 16
        assert twice["output_ids"] == again["output_ids"]
