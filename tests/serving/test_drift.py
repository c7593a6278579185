"""Drift: a draft that no longer fits is noticed soon, and hard text is not taken for one."""

import numpy as np
import pytest

from cast_sglang.policy.acceptance import DRAWN, GREEDY, SAMPLED, Acceptance
from cast_sglang.policy.outcomes import VerifiedNodes
from cast_sglang.serving.drift import COLLAPSED, LEAST_PASSES, WINDOW, Drift


class Server:
    """Passes of one request, whose nodes are accepted by some law of the draft's probability."""

    def __init__(self, kind=GREEDY, seed=0):
        self.acceptance = Acceptance()
        self.drift = Drift(self.acceptance)
        self.kinds, self.rng = np.array([kind]), np.random.default_rng(seed)
        self.collapses = 0

    def serve(self, passes, law, least=0.1, most=0.95):
        """Serve until a collapse begins or ends, for so many passes at most; return how many."""
        before = self.drift.is_collapsed
        for number in range(1, passes + 1):
            shares = self.rng.uniform(least, most, (1, 4))
            accepted = self.rng.random((1, 4)) < law(shares)
            # A chain: a node is tried where its parent was accepted.
            tried = np.cumprod(np.concatenate([[[1]], accepted[:, :-1]], axis=1), axis=1) > 0
            nodes = VerifiedNodes(shares, np.array([[1, 2, 3, 4]]), tried, accepted & tried)
            self.drift.update(nodes, self.kinds)
            if self.drift.is_collapsed != before:
                return number
        return passes


def fits(shares):
    return shares


def rejected(shares):
    return 0.04 * shares


@pytest.mark.parametrize("kind", [GREEDY, SAMPLED, DRAWN])
@pytest.mark.parametrize("seed", range(4))
def test_a_draft_that_no_longer_fits_is_noticed_within_some_windows(kind, seed):
    server = Server(kind, seed)
    assert server.serve(1000, fits) == 1000 and server.drift.ratio > 0.5
    # The first window holds passes of before; of the others each pass expects half a node or more.
    assert server.serve(500, rejected) < 3 * WINDOW / 0.5
    assert server.drift.is_collapsed and server.drift.ratio < COLLAPSED
    # By now the curves in use expect hardly anything, and it is still one.
    server.serve(2000, rejected)
    assert server.drift.is_collapsed
    assert server.serve(500, fits) < 3 * WINDOW / 0.5 and not server.drift.is_collapsed


def test_a_wrong_draft_is_noticed_at_a_first_start():
    server = Server()
    assert server.serve(200, rejected) < 2 * WINDOW / 0.5 and server.drift.is_collapsed


@pytest.mark.parametrize("seed", range(4))
def test_hard_text_and_an_overconfident_draft_are_no_collapse(seed):
    server = Server(seed=seed)
    server.serve(1000, lambda shares: 0.6 * shares)  # never calibrated
    assert not server.drift.is_collapsed
    server.serve(2000, lambda shares: 0.5 * shares, least=0.01, most=0.2)
    server.serve(1000, lambda shares: 0.6 * shares)
    assert not server.drift.is_collapsed


def test_many_equal_requests_that_err_together_are_no_collapse():
    acceptance = Acceptance()
    drift, kinds = Drift(acceptance), np.full(32, GREEDY)
    rng = np.random.default_rng(0)
    for _ in range(400):
        accepted = np.full((32, 1), rng.random() < 0.9)
        one = np.ones((32, 1), np.int64)
        nodes = VerifiedNodes(np.full((32, 1), 0.9), one, one > 0, accepted)
        drift.update(nodes, kinds)
        assert not drift.is_collapsed


def test_what_an_earlier_server_learned_is_remembered():
    """A draft of which much less was accepted than it says, and still is, has not collapsed."""

    def modest(shares):
        return 0.15 * shares

    before = Server()
    assert before.serve(2000, modest) < 2000  # without a memory it seems to be one
    before.serve(2000, modest)
    server = Server(seed=1)
    server.acceptance.load_state(before.acceptance.state())
    assert server.serve(2000, modest) == 2000 and server.drift.ratio > 0.5


@pytest.mark.parametrize("requests", [1, 64])
def test_a_window_ends_when_enough_was_expected_of_enough_passes(requests):
    drift = Drift(Acceptance())
    shares = np.full((requests, 4), 0.5)
    nodes = VerifiedNodes(shares, np.ones((requests, 4), int), shares > 0.0, shares > 1.0)
    kinds = np.full(requests, GREEDY)
    ended = [drift.update(nodes, kinds) for _ in range(2 * LEAST_PASSES)]
    assert ended == ([False] * (LEAST_PASSES - 1) + [True]) * 2 and drift.ratio == 0.0


def test_a_window_of_few_nodes_a_pass_is_longer():
    drift = Drift(Acceptance())
    share = np.full((1, 1), 0.25)
    nodes = VerifiedNodes(share, np.ones((1, 1), int), share > 0.0, share > 1.0)
    ended = [drift.update(nodes, np.array([GREEDY])) for _ in range(int(WINDOW / 0.25))]
    assert not any(ended[:-1]) and ended[-1]
