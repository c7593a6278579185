"""Calibration: what it learns, what it must not learn from, and what it keeps."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.policy.acceptance import GREEDY, SAMPLED, Acceptance, _add_nodes, _isotonic
from cast_sglang.policy.outcomes import VerifiedNodes
from tests.support.copies import DEVICE, watched_copies

PROBS = torch.linspace(0.0, 1.0, 1001)
DEPTHS = (1, 2, 3, 4, 5, 8, 9, 40)


def teach(acceptance, *columns, kind=GREEDY):
    """Feed the nodes of one request; columns are those of `VerifiedNodes`, [n] each."""
    nodes = VerifiedNodes(*(np.asarray(column)[None] for column in columns))
    acceptance.update(nodes, np.array([kind]))


def observe(
    acceptance: Acceptance, rng, truth, depth: int, updates: int, nodes: int = 64, kind=GREEDY
) -> None:
    """Feed nodes whose parents were accepted and which are accepted with truth(p)."""
    for _ in range(updates):
        p = rng.random(nodes)
        accepted = rng.random(nodes) < truth(p)
        tried = np.ones(nodes, dtype=bool)
        teach(acceptance, p, np.full(nodes, depth), tried, accepted, kind=kind)


def calibrated(acceptance, shares, depth, kind=GREEDY):
    kinds = torch.full(shares.shape, kind)
    return acceptance.curve_at(depth, kinds).at(shares, kinds)


@pytest.mark.parametrize("depth", DEPTHS)
def test_without_data_the_draft_is_believed(depth):
    assert torch.equal(calibrated(Acceptance(), PROBS, depth), PROBS)


def test_a_known_distortion_is_recovered_at_each_depth():
    acceptance, rng = Acceptance(), np.random.default_rng(0)
    truths = {1: lambda p: p**1.3, 2: lambda p: 0.8 * p, 3: lambda p: 0.5 * p + 0.2 * p**2}
    for depth, truth in truths.items():
        observe(acceptance, rng, truth, depth, updates=200)
    for depth, truth in truths.items():
        error = calibrated(acceptance, PROBS, depth).numpy() - truth(PROBS.numpy())
        assert np.abs(error).max() < 0.09
        assert np.abs(error).mean() < 0.02
    # Depths 3 and 4 share a curve; depth 9 has seen nothing and goes by the depths above.
    for depth in (4, 9):
        assert torch.equal(calibrated(acceptance, PROBS, 3), calibrated(acceptance, PROBS, depth))


def test_what_curves_expect_is_their_sum_over_the_tried_nodes():
    acceptance, rng = Acceptance(), np.random.default_rng(3)
    observe(acceptance, rng, lambda p: p**2, 1, updates=50)
    observe(acceptance, rng, lambda p: 0.3 * p, 5, updates=50, kind=SAMPLED)
    shape = (3, 40)
    depths = rng.integers(1, 12, shape)
    shares, tried, accepted = rng.random(shape), rng.random(shape) < 0.7, rng.random(shape) < 0.3
    shares[0, :3] = np.nan, 0.0, 1.0
    nodes, kinds = VerifiedNodes(shares, depths, tried, accepted), np.array([GREEDY, SAMPLED, 2])
    counted = tried & np.isfinite(shares)
    total = 0.0
    for b, n in zip(*counted.nonzero(), strict=True):
        share = torch.tensor([shares[b, n]], dtype=torch.float32)
        total += float(calibrated(acceptance, share, int(depths[b, n]), kind=int(kinds[b])))
    before, sums = acceptance.curves(), acceptance._sums.copy()
    found = acceptance.update(nodes, kinds)
    assert found == (pytest.approx(total, rel=1e-5), int((accepted & counted).sum()))
    found_plainly = _add_nodes.py_func(sums, acceptance._keep, before, *nodes, kinds)
    assert found == pytest.approx(found_plainly)
    np.testing.assert_allclose(sums, acceptance._sums)
    # The curves of before are those that were given, whatever was learned since.
    observe(acceptance, rng, lambda p: 0.0 * p, 1, updates=50)
    assert acceptance.update(nodes, kinds, before) == found


def test_depths_above_are_not_judged_by_those_below():
    acceptance, rng = Acceptance(), np.random.default_rng(0)
    observe(acceptance, rng, lambda p: 0.5 * p, 3, updates=50)
    for depth in (1, 2):
        assert torch.equal(calibrated(acceptance, PROBS, depth), PROBS)
    assert float((calibrated(acceptance, PROBS, 9) - 0.5 * PROBS).abs().mean()) < 0.05


def test_a_depth_that_differs_from_those_above_is_learned():
    acceptance, rng = Acceptance(), np.random.default_rng(1)
    observe(acceptance, rng, lambda p: p**0.5, 1, updates=50)
    observe(acceptance, rng, lambda p: 0.3 * p, 2, updates=50)
    error = calibrated(acceptance, PROBS, 2).numpy() - 0.3 * PROBS.numpy()
    assert np.abs(error).mean() < 0.04


def test_greedy_and_sampled_requests_are_told_apart():
    """In one batch or in turn: neither teaches the other, and neither forgets by the other's."""
    acceptance, rng = Acceptance(half_life=20), np.random.default_rng(9)
    truths = {GREEDY: lambda p: p**0.5, SAMPLED: lambda p: 0.7 * p}
    for kind, truth in truths.items():
        observe(acceptance, rng, truth, 1, updates=100, kind=kind)
    tried, depths = np.ones((2, 64), bool), np.ones((2, 64), int)
    alone = calibrated(acceptance, PROBS, 1, SAMPLED)
    observe(acceptance, rng, truths[GREEDY], 1, updates=400)
    assert torch.equal(calibrated(acceptance, PROBS, 1, SAMPLED), alone)
    for _ in range(100):
        p = rng.random((2, 64))
        chance = np.stack([truths[SAMPLED](p[0]), truths[GREEDY](p[1])])
        nodes = VerifiedNodes(p, depths, tried, rng.random((2, 64)) < chance)
        acceptance.update(nodes, np.array([SAMPLED, GREEDY]))
    kinds = torch.arange(len(PROBS)) % 2
    mixed = acceptance.curve_at(1, kinds).at(PROBS, kinds)
    for kind, truth in truths.items():
        error = mixed[kinds == kind] - truth(PROBS)[kinds == kind]
        assert float(error.abs().mean()) < 0.03
    assert {row.kind for row in acceptance.reliability()} == {"greedy", "sampled"}


def test_one_node_moves_the_curve_by_its_share_of_the_prior():
    acceptance = Acceptance(prior_weight=9.0)
    teach(acceptance, [0.5], [1], [True], [True])
    # 0.5 is a knot: nine imagined nodes accepted at 0.5 and a real one at 1.
    assert float(calibrated(acceptance, torch.tensor([0.5]), 1)) == pytest.approx(5.5 / 10)


def test_nodes_below_a_rejected_one_say_nothing():
    """Depth-2 nodes are accepted at 0.9 where their parent was, and never where it was not."""
    acceptance, rng = Acceptance(), np.random.default_rng(1)
    wrong = Acceptance()
    for _ in range(300):
        parent = rng.random(32) < 0.5
        accepted = parent & (rng.random(32) < 0.9)
        nodes = np.full(32, 0.9), np.full(32, 2)
        teach(acceptance, *nodes, parent, accepted)
        teach(wrong, *nodes, np.ones(32, dtype=bool), accepted)
    p = torch.tensor([0.9])
    assert float(calibrated(acceptance, p, 2)) == pytest.approx(0.9, abs=0.03)
    assert float(calibrated(wrong, p, 2)) == pytest.approx(0.45, abs=0.06)
    assert sum(row.num_nodes for row in wrong.reliability()) == pytest.approx(
        2 * sum(row.num_nodes for row in acceptance.reliability()), rel=0.1
    )


def test_censored_nodes_leave_no_trace():
    acceptance = Acceptance()
    teach(acceptance, [0.7, 0.6], [2, 3], [False, False], [False, False])
    assert acceptance.reliability() == []
    assert torch.equal(calibrated(acceptance, PROBS, 2), PROBS)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), updates=st.integers(1, 20), weight=st.sampled_from([0.1, 8.0]))
def test_curves_never_fall_and_stay_probabilities(seed, updates, weight):
    rng = np.random.default_rng(seed)
    acceptance = Acceptance(prior_weight=weight)
    observe(acceptance, rng, lambda p: rng.random(p.shape), 1, updates, nodes=8)
    values = calibrated(acceptance, PROBS, 1)
    assert float(values.min()) >= 0.0 and float(values.max()) <= 1.0
    assert float(values.diff().min()) >= -1e-6


def pool_adjacent_violators(values, weights):
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight, length = blocks.pop()
            last = blocks[-1]
            total = last[1] + weight
            last[:] = [(last[0] * last[1] + mean * weight) / total, total, last[2] + length]
    return [mean for mean, _, length in blocks for _ in range(length)]


@given(seed=st.integers(0, 2**31), n=st.integers(2, 20))
def test_isotonic_is_pool_adjacent_violators(seed, n):
    rng = np.random.default_rng(seed)
    values, weights = rng.random(n), rng.random(n) + 0.01
    expected = pool_adjacent_violators(values, weights)
    np.testing.assert_allclose(_isotonic(values, weights), expected, atol=1e-9)


def test_path_scores_stay_below_the_parents():
    acceptance, rng = Acceptance(), np.random.default_rng(2)
    observe(acceptance, rng, lambda p: np.minimum(1.0, 2 * p), 2, updates=50)
    parents = torch.rand(4, 3, 1)
    scores = parents * calibrated(acceptance, torch.rand(4, 3, 8), 2)
    assert (scores <= parents).all()


def test_old_evidence_is_forgotten():
    acceptance, rng = Acceptance(half_life=20), np.random.default_rng(3)
    observe(acceptance, rng, lambda p: 0.2 * p, 1, updates=100)
    observe(acceptance, rng, lambda p: p, 1, updates=100)
    assert float((calibrated(acceptance, PROBS, 1) - PROBS).abs().mean()) < 0.05
    # A depth that is no longer reached goes back to those above it, so that it is tried again.
    observe(acceptance, rng, lambda p: 0.0 * p, 2, updates=100)
    observe(acceptance, rng, lambda p: p, 1, updates=400)
    above = calibrated(acceptance, PROBS, 1)
    assert float((calibrated(acceptance, PROBS, 2) - above).abs().max()) < 0.01


def test_nonsense_probabilities_are_left_out():
    acceptance = Acceptance()
    teach(acceptance, [np.nan, np.inf, 1.0000001], [1] * 3, [True] * 3, [True] * 3)
    assert sum(row.num_nodes for row in acceptance.reliability()) == pytest.approx(1.0)
    assert torch.isfinite(calibrated(acceptance, PROBS, 1)).all()


def test_reliability_counts_what_was_predicted_and_what_happened():
    acceptance, rng = Acceptance(half_life=1e9), np.random.default_rng(4)
    observe(acceptance, rng, lambda p: 0.5 * p, 1, updates=50, nodes=40)
    observe(acceptance, rng, lambda p: p, 6, updates=10, nodes=40)
    rows = acceptance.reliability()
    assert {row.first_depth for row in rows} == {1, 5}
    first = [row for row in rows if row.first_depth == 1]
    assert sum(row.num_nodes for row in first) == pytest.approx(2000)
    drafted, calibrated, accepted = (sum(column) for column in list(zip(*first, strict=True))[3:])
    assert accepted == pytest.approx(0.5 * drafted, rel=0.1)
    assert calibrated == pytest.approx(accepted, rel=0.1)


def test_state_survives_json():
    acceptance, rng = Acceptance(), np.random.default_rng(5)
    observe(acceptance, rng, lambda p: 0.7 * p, 3, updates=30)
    other = Acceptance()
    other.load_state(json.loads(json.dumps(acceptance.state())))
    for depth in DEPTHS:
        assert torch.equal(calibrated(other, PROBS, depth), calibrated(acceptance, PROBS, depth))
    assert other.reliability() == acceptance.reliability()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(format=2),
        lambda state: state.pop("drafted"),
        lambda state: state.update(nodes=[[1.0]]),
        lambda state: state.update(nodes="many"),
        lambda state: state["accepted"][0][0].__setitem__(0, 1.0),  # accepted beyond nodes
        lambda state: state["nodes"][1][1].__setitem__(2, float("nan")),
        lambda state: state["drafted"][0][1].__setitem__(2, -1.0),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change):
    acceptance = Acceptance()
    observe(acceptance, np.random.default_rng(6), lambda p: 0.7 * p, 1, updates=5)
    before = acceptance.state()
    state = json.loads(json.dumps(Acceptance().state()))
    change(state)
    with pytest.raises(ValueError, match="acceptance state"):
        acceptance.load_state(state)
    assert acceptance.state() == before
    with pytest.raises(ValueError, match="acceptance state"):
        acceptance.load_state([])  # type: ignore[arg-type]


def test_equal_histories_give_equal_maps():
    maps = [Acceptance(), Acceptance()]
    for acceptance in maps:
        observe(acceptance, np.random.default_rng(7), lambda p: 0.6 * p, 2, updates=20)
    assert maps[0].state() == maps[1].state()


def test_a_large_update_takes_no_loop_over_nodes():
    acceptance, rng = Acceptance(), np.random.default_rng(8)
    nodes = 200_000
    p, accepted = rng.random(nodes), rng.random(nodes) < 0.5
    began = time.perf_counter()
    teach(acceptance, p, np.ones(nodes, dtype=int), np.ones(nodes, dtype=bool), accepted)
    assert time.perf_counter() - began < 1.0  # some 20 ms; a Python loop takes several seconds


def test_new_curves_reach_a_device_without_waiting(monkeypatch):
    acceptance, kinds = Acceptance(), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with watched_copies(monkeypatch) as spy:
        curve = acceptance.curve_at(1, kinds)
    assert spy.num_copies == 1 and spy.waits == [] and curve.starts.device.type == DEVICE
