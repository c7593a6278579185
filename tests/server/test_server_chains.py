"""Chains: CAST chooses how long they get and how many rows are verified, on pages of any size."""

from pathlib import Path

import pytest
import torch

from tests.server.client import generate, greedy_ids
from tests.server.conftest import NUM_PROMPTS, NUM_TOKENS, ServerFactory
from tests.server.homogeneity import homogeneity_p_value
from tests.server.test_server_laws import ALPHA, LAWS, sample
from tests.server.test_server_limits import Ask, Served, compare, token_ids
from tests.support.checkpoints import write_eagle1_draft, write_mtp_target

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

STEPS = 6
# By the made-up costs alone, which say that drafts pay, on every machine.
ALWAYS = ("--cast-residuals", "off")
CHAIN = ("--speculative-eagle-topk", "1", "--speculative-num-steps", str(STEPS))


@pytest.fixture(scope="module")
def chain(start_server: ServerFactory):
    with start_server("cast", *CHAIN, "--random-seed", "1", *ALWAYS) as server:
        yield server


@pytest.mark.parametrize(("batch", "count"), [(1, 16), (8, NUM_PROMPTS)])
def test_greedy_tokens_of_chains_equal_plain_decoding(chain, prompts, expected_ids, batch, count):
    assert greedy_ids(chain, prompts[:count], batch, NUM_TOKENS) == expected_ids[:count]


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
    law = LAWS["warm top_k and top_p"]
    (ours, passes), (theirs, _) = (sample(each, prompts[0], 720, **law) for each in (chain, plain))
    assert (passes < ours.shape[1] - 1).any()  # drafts were accepted
    for last in range(ours.shape[1]):
        assert homogeneity_p_value(ours[:, : last + 1], theirs[:, : last + 1]) > ALPHA


def test_greedy_tokens_on_pages_equal_plain_decoding(start_server, prompts, expected_ids):
    flags = (*CHAIN, *ALWAYS, "--page-size", "16")
    with start_server("cast", *flags, name="cast-pages") as server:
        assert greedy_ids(server, prompts, 8, NUM_TOKENS) == expected_ids
        # One that was there before is read from its pages.
        again = generate(server, prompts[0] * 3, max_new_tokens=NUM_TOKENS)
        twice = generate(server, prompts[0] * 3, max_new_tokens=NUM_TOKENS)
        assert twice["meta_info"]["cached_tokens"] >= 16
        assert twice["output_ids"] == again["output_ids"]


@pytest.mark.extended
@pytest.mark.parametrize("pool", [16384, 640])
def test_chains_on_pages_at_the_limits_of_context_and_memory(start_server, pool):
    """A pool hardly larger than one request has no whole page left for drafts."""
    limits = ("--context-length", "512", "--max-total-tokens", str(pool))
    flags = (*CHAIN, *ALWAYS, "--page-size", "16")
    with (
        start_server("plain", *limits, name=f"plain-{pool}") as plain,
        start_server("cast", *flags, *limits, name=f"cast-pages-{pool}") as cast,
    ):
        served = Served(plain, cast, 512, pool)
        text = token_ids()
        asks = [Ask(text[:length], None) for length in (439, 505, 504, 256)]
        compare(served, asks, workers=1)
        asks = [Ask(text[300 * i : 300 * i + n], None) for i, n in enumerate((303, 440, 390))]
        compare(served, [*asks, Ask(text[900:960], 48), Ask(text[50:400], 30)], workers=5)


def num_accepted(server) -> int:
    """Return how many drafts the server's requests have accepted."""
    lengths = server.get("/server_info")["internal_states"][0]["cast"]["accept_lens"]
    return sum((int(length) - 1) * count for length, count in lengths.items())


@pytest.mark.extended
def test_an_mtp_layer_drafts_for_its_own_target(
    start_server, pair, tmp_path, prompts, expected_ids
):
    """The same weights as another class of SGLang, whose drafts come from a layer of its own."""
    target = str(write_mtp_target(tmp_path / "mtp", Path(pair.target)))
    flags = ("--model-path", target, "--speculative-draft-model-path", target)
    with start_server("cast", *CHAIN, *ALWAYS, *flags, name="cast-mtp") as server:
        assert greedy_ids(server, prompts[:16], 8, NUM_TOKENS) == expected_ids[:16]
        assert num_accepted(server) > 0


@pytest.mark.extended
@pytest.mark.parametrize("topk", ["1", "4"])
def test_an_eagle1_draft_with_a_token_map(
    start_server, pair, tmp_path, prompts, expected_ids, topk
):
    draft = str(write_eagle1_draft(tmp_path / "eagle1", Path(pair.target)))
    often = [token for ids in expected_ids[16:] for token in ids]
    token_map = torch.tensor(sorted(set(often))[:700])
    torch.save(token_map, tmp_path / "map.pt")
    flags = ("--speculative-draft-model-path", draft, "--speculative-eagle-topk", topk)
    flags += ("--speculative-token-map", str(tmp_path / "map.pt"))
    with start_server("cast", *flags, *ALWAYS, name=f"cast-eagle1-{topk}") as server:
        assert greedy_ids(server, prompts[:16], 8, NUM_TOKENS) == expected_ids[:16]
        assert num_accepted(server) > 0
