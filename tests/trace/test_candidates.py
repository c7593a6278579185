"""What a trace tells of each candidate, on one tree drawn by hand.

Candidates 0, 1 below the root; 2, 3 below candidate 1; 4, 5 below candidate 0; 6, 7 below 4.
"""

import numpy as np
import pytest
import torch

from cast_sglang.ops import reference
from cast_sglang.trace.candidates import RecordedTrees, ReplayedTree, recorded_reward
from cast_sglang.trace.records import TracedRequest, TracedStep, packed
from cast_sglang.tree import DraftTree

TOPK = 2
PROBS = [0.6, 0.3, 0.5, 0.4, 0.7, 0.2, 0.9, 0.1]


def request(**changes):
    arrays = {"probs": PROBS, "expanded": [1, 0, 4], "verified": [0, 4, 6]}
    arrays |= {"target_probs": [0.8, 0.5, 0.25], **changes}
    values = {
        name: packed(np.array(value), "int32" if name in ("expanded", "verified") else "float32")
        for name, value in arrays.items()
        if name in ("probs", "chances", "expanded", "verified", "target_probs")
    }
    rest = {name: value for name, value in arrays.items() if name not in values}
    return TracedRequest(request=0, context=9, **values, **rest)


def step(*requests, widths=(2, 1), num_layers=3):
    return TracedStep(
        step=1,
        context=9.0,
        widths=list(widths),
        num_layers=num_layers,
        num_draft_tokens=4,
        extend_rows=2.0,
        requests=list(requests),
    )


def test_each_candidate_knows_its_children_and_its_target():
    recorded = RecordedTrees(step(request(follows=[0, 4])), TOPK)
    assert recorded.first_child[0].tolist() == [4, 2, -1, -1, 6, -1, -1, -1, -1]
    assert recorded.accepted[0, :-1].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert np.isnan(recorded.accepted[0, -1])  # index -1: a candidate that was not recorded
    known = np.nonzero(~np.isnan(recorded.target_probs[0]))[0]
    assert known.tolist() == [0, 4, 6]
    assert recorded.target_probs[0, known].tolist() == pytest.approx([0.8, 0.5, 0.25])


def test_chances_are_the_probabilities_where_nothing_was_calibrated():
    calibrated = [prob / 2 for prob in PROBS]
    recorded = RecordedTrees(step(request(), request(chances=calibrated)), TOPK)
    np.testing.assert_array_equal(recorded.probs[0], recorded.probs[1])
    np.testing.assert_array_equal(recorded.chances[0], recorded.probs[0])
    assert recorded.chances[1, :-1].tolist() == pytest.approx(calibrated)


@pytest.mark.parametrize(
    ("follows", "unknown"), [([], range(8)), ([0], [4, 5, 6, 7]), ([0, 4], [6, 7]), ([1], [2, 3])]
)
def test_below_the_end_of_a_text_nothing_is_known(follows, unknown):
    recorded = RecordedTrees(step(request(follows=follows, is_open=True)), TOPK)
    assert np.nonzero(np.isnan(recorded.accepted[0, :-1]))[0].tolist() == list(unknown)
    assert np.nonzero(recorded.accepted[0, :-1] == 1.0)[0].tolist() == follows


def test_children_by_depth_are_those_of_all_requests():
    halved = [prob / 2 for prob in PROBS]
    recorded = RecordedTrees(step(request(), request(probs=halved, chances=PROBS)), TOPK)
    # Parents, then their children's probabilities and chances.
    first, second, third = (recorded.children(depth) for depth in (1, 2, 3))
    assert first.shape == (2, 2, 2) and second.shape == (4, 2, 2) and third.shape == (2, 2, 2)
    np.testing.assert_allclose(second[:2, 0], [[0.5, 0.4], [0.7, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(third[1], [[0.45, 0.05], [0.9, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(recorded.children(9), third)


def test_a_step_without_drafts_holds_no_candidate():
    plain = step(TracedRequest(request=0, context=9, is_open=True), widths=(), num_layers=0)
    recorded = RecordedTrees(plain, TOPK)
    assert recorded.chances.shape == recorded.accepted.shape == (1, 1)
    assert np.isnan(recorded.accepted[0, -1]) and recorded.first_child[0, -1] == -1


def replayed(is_wanted=(True,)):
    recorded = RecordedTrees(step(*[request(follows=[0]) for _ in is_wanted]), TOPK)
    return ReplayedTree(recorded, np.array(is_wanted))


def test_reach_is_known_or_a_product_of_chances():
    grown = replayed()
    chances = np.array([[[0.6, 0.3]]])
    grown.add(np.array([[[0, 1]]]), chances, np.ones((1, 1)))
    assert grown.reach[0].tolist() == [[1.0, 0.0]] and grown.is_known[0].all()
    # Candidate 0 was expanded; below candidate 1 children were drawn, and it is not accepted.
    nodes = np.array([[[4, 5], [-1, -1]]])
    grown.add(nodes, np.full((1, 2, 2), 0.4), grown.reach_of(np.array([[0, 1]])))
    assert grown.reach[1].tolist() == [[0.0, 0.0, 0.0, 0.0]] and grown.is_known[1].all()


def test_drawn_children_are_accepted_by_at_most_one():
    grown = replayed()
    chances = np.array([[[0.9, 0.6]]])  # as older traces hold them: their sum exceeds 1
    grown.add(np.array([[[-1, -1]]]), chances, np.full((1, 1), 0.5))
    assert grown.reach[0][0].tolist() == pytest.approx([0.5 * 0.6, 0.5 * 0.4])
    assert not grown.is_known[0].any()


def test_a_request_that_wants_no_drafts_accepts_none():
    grown = replayed((True, False))
    nodes, chances = np.full((2, 1, 2), -1), np.full((2, 1, 2), 0.25)
    grown.add(nodes, chances, np.ones((2, 1)))
    assert grown.reach[0].tolist() == [[0.25, 0.25], [0.0, 0.0]]
    assert grown.is_known[0].tolist() == [[False, False], [True, True]]


def test_rewards_are_those_of_the_verified_nodes():
    # By the target: 0.8 for the first node, 0.8 * 0.5 and 0.8 * 0.5 * 0.25 below it.
    reward = recorded_reward(step(request()), TOPK)
    assert reward.expected == pytest.approx(0.8 + 0.4 + 0.1)
    assert recorded_reward(step(request(), request(target_probs=[])), TOPK) is None
    assert recorded_reward(step(request(), num_layers=0), TOPK) is None
    # The same tree grown anew, with one node that the server did not verify: its chance stands in.
    grown = replayed()
    grown.add(np.array([[[0, 1]]]), np.array([[[0.6, 0.3]]]), np.ones((1, 1)))
    grown.tree = DraftTree(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]), 3, reference)
    nodes = np.array([[0, 1]])
    assert grown.reward(nodes, np.array([[True, False]])).expected == pytest.approx(0.8)
    assert grown.reward(nodes, np.array([[True, True]])).expected == pytest.approx(0.8 + 0.3)
    assert grown.reward(nodes, np.array([[False, False]])) == (0.0, 0.0)
