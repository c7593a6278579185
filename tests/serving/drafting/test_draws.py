"""Draws: what is kept of a step for verify, and streams of random numbers."""

from types import SimpleNamespace

import numpy as np
import torch

from cast_sglang.config import CastConfig
from cast_sglang.serving.drafting.draws import Draws, cut_links, num_proposed
from tests.support.copies import DEVICE, watched_copies

TOPK, NUM_TOKENS, BATCH = 2, 5, 3


def sampling_info(**changes):
    values = {
        "temperatures": torch.tensor([[1.0], [0.7], [1.5]]),
        "top_ks": torch.tensor([1 << 30, 1, 3], dtype=torch.int32),
        "top_ps": torch.ones(BATCH),
        "min_ps": torch.zeros(BATCH),
    }
    return SimpleNamespace(**(values | changes))


def layer(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = BATCH * width, NUM_TOKENS
    probs = torch.rand(shape, generator=generator).sort(1, descending=True).values
    return probs / probs.sum(1, keepdim=True), torch.arange(NUM_TOKENS).repeat(len(probs), 1)


def test_without_drawn_requests_the_likeliest_tokens_are_proposed():
    draws = Draws("cpu", seed=1, topk=TOPK)
    draws.begin_step(None, sampling_info())
    probs, tokens = layer(2)
    found = draws.children(probs, tokens)
    assert found[0].equal(probs[:, :TOPK]) and found[1].equal(tokens[:, :TOPK])
    assert draws.is_drawn is None and draws.drawn(None) is None


def test_verify_gets_the_row_that_each_node_was_drawn_from():
    draws = Draws("cpu", seed=1, topk=TOPK)
    whose = np.array([True, False, True])
    draws.begin_step(whose, sampling_info())
    for width in (1, 2):
        draws.children(*layer(width, seed=width))
    # Two children of the root, two of each expanded node; 6 stands for a copy.
    index = torch.tensor([[0, 1, 3, 5], [0, 2, 4, 6], [1, 2, 3, 4]])
    drawn = draws.drawn(SimpleNamespace(top_scores_index=index))
    assert drawn.proposers.tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, -1], [0, 0, 1, 1, 2]]
    assert drawn.proposals.shape == drawn.tokens.shape == (BATCH, 3, NUM_TOKENS)
    assert drawn.is_drawn.tolist() == whose.tolist()
    assert not drawn.proposals[1].any()
    torch.testing.assert_close(drawn.proposals[0].sum(1), torch.ones(3))
    assert (drawn.proposals[2] > 0).sum(1).tolist() == [3, 3, 3]  # its top_k


def test_each_step_has_a_stream_of_its_own_that_all_ranks_share():
    whose, info = np.array([True] * BATCH), sampling_info()
    ranks = [Draws("cpu", seed=7, topk=TOPK) for _ in range(2)]
    seen = []
    for step in range(3):
        tokens = []
        for rank, draws in enumerate(ranks):
            draws.begin_step(whose, info)
            tokens.append(draws.children(*layer(4))[1])
            if rank == 0 and step == 0:
                draws.children(*layer(1))  # of a wider tree than the other rank has
        assert tokens[0].equal(tokens[1])
        seen.append(tokens[0])
    assert not seen[0].equal(seen[1]) and not seen[1].equal(seen[2])


def test_how_requests_sample_is_read_anew_when_it_changes():
    draws, whose = Draws("cpu", seed=1, topk=TOPK), np.array([True] * BATCH)
    info = sampling_info()
    draws.begin_step(whose, info)
    before = draws.is_drawn
    draws.begin_step(whose, SimpleNamespace(**vars(info)))
    assert draws.is_drawn is before
    draws.begin_step(whose, sampling_info(top_ps=torch.full((BATCH,), 0.5)))
    assert draws.is_drawn is not before


def test_links_end_before_nodes_that_may_not_be_verified():
    # Root 0 with children 1, 2, 3, and 1 with child 4; candidates 0, 1, 2 and 5.
    verify_input = SimpleNamespace(
        retrieve_next_token=torch.tensor([[1, 4, -1, -1, -1]]),
        retrieve_next_sibling=torch.tensor([[-1, 2, 3, -1, -1]]),
    )
    scores = torch.tensor([[0.5, 0.3, 0.0, 0.1, 0.1, 0.0]])
    cut_links(verify_input, torch.tensor([[0, 1, 2, 5]]), scores)
    assert verify_input.retrieve_next_token.tolist() == [[1, -1, -1, -1, -1]]
    assert verify_input.retrieve_next_sibling.tolist() == [[-1, 2, -1, -1, -1]]


def test_links_skip_nodes_that_may_not_be_verified_where_a_copy_hangs_behind_them():
    # Root 0 with children 1 to 5, of which 2, 3 and 4 are cut; 1 with child 6, cut, and 7.
    verify_input = SimpleNamespace(
        retrieve_next_token=torch.tensor([[1, 6, -1, -1, -1, -1, -1, -1]]),
        retrieve_next_sibling=torch.tensor([[-1, 2, 3, 4, 5, -1, 7, -1]]),
    )
    scores = torch.tensor([[0.5, 0.0, 0.0, 0.0, 0.4, 0.0, 0.2]])
    cut_links(verify_input, torch.arange(7)[None], scores)
    next_token, siblings = (
        links[0].tolist()
        for links in (verify_input.retrieve_next_token, verify_input.retrieve_next_sibling)
    )
    assert next_token == [1, 7, -1, -1, -1, -1, -1, -1]
    assert siblings[1] == 5 and siblings[5] == siblings[7] == -1


def test_nothing_waits_to_say_whose_drafts_are_drawn(monkeypatch):
    draws = Draws("cpu", seed=1, topk=TOPK)
    draws._device = DEVICE
    info = {name: value.to(DEVICE) for name, value in vars(sampling_info()).items()}
    with watched_copies(monkeypatch) as spy:
        draws.begin_step(np.array([True, False, True]), SimpleNamespace(**info))
    assert spy.num_copies == 1 and spy.waits == []


def test_the_draft_states_a_probability_for_chains_too():
    """SGLang takes 1 for that of a token where it keeps one token alone."""
    config = CastConfig(draws="off")
    assert [num_proposed(config, None, topk) for topk in (1, 2, 8)] == [2, 2, 8]
