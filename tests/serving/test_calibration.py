"""Feedback from verify into the scores: the right nodes count, with the right probabilities."""

import numpy as np
import pytest
import torch

from cast_sglang.ops import reference
from cast_sglang.serving import calibration as module
from cast_sglang.serving import drift
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.stats import StepStats
from cast_sglang.serving.step import Drafted, Verified
from cast_sglang.tree import DraftTree

TOPK = 2


@pytest.fixture(autouse=True)
def learns_at_once(monkeypatch):
    monkeypatch.setattr(module, "LEARN_AT_ONCE", 1)


# Two requests. The root's children 0 and 1; node 0 of each request is expanded into 2 and 3.
ROOT_PROBS = torch.tensor([[0.8, 0.1], [0.6, 0.3]])
CHILD_PROBS = torch.tensor([[0.9, 0.05], [0.7, 0.2]])


def grown_tree(calibration, top_ks=(1, 1)):
    calibration.begin_step(torch.tensor(top_ks))
    tokens = torch.zeros((2, TOPK), dtype=torch.int64)
    tree = DraftTree(tokens, ROOT_PROBS, 2, reference, calibration.curve_at(ROOT_PROBS, depth=1))
    frontier = tree.frontier()
    tree.grow(frontier, 1, tokens, CHILD_PROBS, calibration.curve_at(CHILD_PROBS, depth=2))
    return tree


def step(calibration, accept_index, num_rows=None, wants_drafts=None, top_ks=(1, 1)):
    tree = grown_tree(calibration, top_ks)
    selection = tree.select(tree.ranked(3), 4, num_rows)
    calibration.on_drafted(Drafted(tree, (1,), selection, wants_drafts))
    calibration.on_verified(verified(accept_index))


def ints(*values):
    return torch.tensor(values)


def verified(accept_index):
    """As much of an outcome as is learned from."""
    return Verified(4, torch.tensor(accept_index), None, None, None, None)


def observed(calibration):
    """Return observed nodes and accepted ones by the first depth of their bucket."""
    sums = {}
    for row in calibration.acceptance.reliability():
        nodes, accepted, drafted = sums.get(row.first_depth, (0.0, 0.0, 0.0))
        sums[row.first_depth] = (
            nodes + row.num_nodes,
            accepted + row.accepted,
            drafted + row.drafted,
        )
    return sums


def test_before_any_outcome_scores_are_the_drafts_own():
    calibration = Calibration()
    tree = grown_tree(calibration)
    expected = torch.tensor([0.8, 0.1, 0.8 * 0.9, 0.8 * 0.05])
    ranked = tree.ranked(4)
    torch.testing.assert_close(ranked.scores[0], expected.sort(descending=True).values)


@pytest.mark.parametrize("change", ["", "the weights of the target were updated from x"])
def test_a_collapse_is_logged_once_and_exported(caplog, monkeypatch, change):
    monkeypatch.setattr(drift, "WINDOW", 2.0)
    monkeypatch.setattr(drift, "LEAST_PASSES", 2)
    stats = StepStats()
    calibration = Calibration(stats=stats)
    calibration.last_change = change
    assert stats.snapshot()["acceptance_ratio"] is None
    for _ in range(9):
        step(calibration, [[0, 1, -1], [4, 5, -1]])
    assert stats.snapshot()["acceptance_ratio"] > 0.6 and not caplog.messages
    for _ in range(20):
        step(calibration, [[0, -1, -1], [4, -1, -1]])
    assert stats.snapshot()["acceptance_ratio"] == 0.0
    [line] = caplog.messages
    assert ("Since then: " + change if change else module.LIKELY_CAUSES) in line
    assert "cast-sglang doctor --probe" in line
    for _ in range(20):
        step(calibration, [[0, 1, -1], [4, 5, -1]])
    assert len(caplog.messages) == 2 and "as before again" in caplog.messages[1]


def test_children_of_rejected_nodes_do_not_count():
    calibration = Calibration()
    # Verified rows of a request: root, 0, 1, 2. Request 0 takes 0 and then 2; request 1 takes 1.
    step(calibration, [[0, 1, 3], [4, 6, -1]])
    assert observed(calibration) == {}  # learned when the next tree has been drafted
    step(calibration, [[0, -1, -1], [4, -1, -1]])
    first, second = observed(calibration)[1], observed(calibration)[2]
    # Request 0 took its first child, so the second was not tried; of request 1 both were.
    np.testing.assert_allclose(first, (3, 2, 0.8 + 0.6 + 0.3 / 0.4), rtol=1e-5)
    # Of request 1's node 2 the parent was rejected.
    np.testing.assert_allclose(second, (1, 1, 0.9), rtol=1e-5)


def test_probabilities_that_are_too_sure_are_lowered():
    calibration = Calibration()
    for _ in range(200):
        step(calibration, [[0, -1, -1], [4, -1, -1]])
    chances = calibration.acceptance.curve_at(1, ints(0, 0)).chances(ROOT_PROBS)
    assert (chances.sum(dim=1) < 0.3 * ROOT_PROBS.sum(dim=1)).all()
    assert chances[0, 0] >= chances[0, 1]


def test_each_request_teaches_and_goes_by_its_kind():
    """The target takes the likeliest token of request 1 and samples those of request 0."""
    calibration = Calibration()
    for _ in range(20):
        step(calibration, [[0, -1, -1], [4, 5, 7]], top_ks=(50, 1))
    assert {row.kind: row.accepted > 0.0 for row in calibration.acceptance.reliability()} == {
        "greedy": True,
        "sampled": False,
    }
    # The same draft in other batches: what was learned of a kind goes with the request.
    scores = [grown_tree(calibration, top_ks).scores for top_ks in ((50, 1), (1, 50), (1, 1))]
    assert scores[0][0, 0] < 0.4 < 0.9 < scores[1][0, 0] == scores[2][0, 0]
    assert scores[1][1, 0] < 0.4 < 0.9 < scores[0][1, 0] == scores[2][1, 0]


def test_rows_that_hold_no_node_teach_nothing():
    calibration = Calibration()
    for _ in range(2):  # learned when the next tree has been drafted
        # Request 0 has the root and one node, request 1 all four rows.
        step(calibration, [[0, 1, -1], [4, 5, 7]], num_rows=torch.tensor([2, 4]))
    np.testing.assert_allclose(observed(calibration)[1], (2, 2, 0.8 + 0.6), rtol=1e-5)
    np.testing.assert_allclose(observed(calibration)[2], (1, 1, 0.7), rtol=1e-5)


def test_requests_that_want_no_drafts_teach_nothing():
    calibration = Calibration()
    for _ in range(2):  # learned when the next tree has been drafted
        wants_drafts = torch.tensor([False, True])
        step(calibration, [[0, -1, -1], [4, 5, 7]], wants_drafts=wants_drafts)
    np.testing.assert_allclose(observed(calibration)[1], (1, 1, 0.6), rtol=1e-5)
    np.testing.assert_allclose(observed(calibration)[2], (1, 1, 0.7), rtol=1e-5)


def test_several_outcomes_are_learned_together(monkeypatch):
    monkeypatch.undo()
    calibration, nodes = Calibration(), []
    for _ in range(2 * module.LEARN_AT_ONCE + 1):
        step(calibration, [[0, -1, -1], [4, -1, -1]])
        nodes.append(observed(calibration).get(1, (0, 0))[0])
    at_once = module.LEARN_AT_ONCE
    assert nodes[:at_once] == [0] * at_once  # learned when the next tree has been drafted
    assert len(set(nodes[at_once:-1])) == 1
    assert nodes[-1] == pytest.approx(2 * nodes[at_once], rel=0.05)  # older ones count less
    assert nodes[at_once] == pytest.approx(4 * at_once, rel=0.05)


def test_an_outcome_without_a_tree_is_ignored():
    calibration = Calibration()
    calibration.on_verified(verified([[0], [1]]))
    step(calibration, [[0, 1, 3], [4, 6, -1]])
    assert observed(calibration) == {}
