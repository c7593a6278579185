"""What further layers promise: the definition written out, and what is learned and forgotten."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.policy.lookahead import Lookahead


def best_cut(nodes: list[list[float]], verify, price) -> float:
    """cut(nodes) of the scores of each request's candidates."""
    best = [np.cumsum(sorted([*scores, *[0.0] * 5], reverse=True)) for scores in nodes]
    return max(np.mean(best, axis=0)[: len(verify) - 1] - price * verify[1:])


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    topk=st.integers(1, 4),
    layers=st.integers(1, 3),
    price=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_lookahead_is_its_definition(batch, topk, layers, price, seed):
    rng = np.random.default_rng(seed)
    children, weights = -np.sort(-rng.random((2, 3))), rng.random((2, 1))
    lookahead = Lookahead(3, 5)
    lookahead.learn(1, torch.tensor(weights).float(), torch.tensor(children).float())
    mean = weights[:, 0] @ children / weights.sum()
    verify = (1 + rng.random(6).cumsum() ** rng.choice([0.5, 1, 2])).astype(np.float32)
    growth = rng.random(topk).astype(np.float32)
    lookahead.begin_tree(batch)
    tree: list[list[float]] = [[] for _ in range(batch)]
    for _ in range(layers):
        scores = -np.sort(-rng.random((batch, topk)), axis=1).astype(np.float32)
        width, gain = lookahead.best_width(1, scores, verify, growth, price, 1)
        tree = [known + row.tolist() for known, row in zip(tree, scores, strict=True)]
        grown, gains = [list(known) for known in tree], []
        for k in range(topk):
            for known, score in zip(grown, scores[:, k], strict=True):
                known.extend((score * mean).tolist())
            cuts = [best_cut(nodes, verify, price) for nodes in (grown, tree)]
            gains.append(cuts[0] - cuts[1] - price * growth[k])
        assert gain == pytest.approx(max(gains), abs=1e-4)
        assert gains[width - 1] == pytest.approx(gain, abs=1e-4)


def test_requests_are_cut_alike():
    """A request that drafts badly pays for the rows of one that drafts well."""
    lookahead, growth = Lookahead(3, 8), np.full(1, 0.05, np.float32)
    lookahead.learn(0, None, torch.tensor([[0.9]]))
    verify, gains = (1.0 + 0.2 * np.arange(9)).astype(np.float32), []
    for bad in (0.9, 0.1):
        lookahead.begin_tree(2)
        scores = np.array([[0.9], [bad]], np.float32)
        gains.append(lookahead.best_width(1, scores, verify, growth, 2.0, 1)[1])
    assert gains[0] == pytest.approx(0.81 - 2.0 * 0.25, abs=1e-3)
    assert gains[1] == pytest.approx((0.81 + 0.09) / 2 - 2.0 * 0.25, abs=1e-3)


def test_several_layers_may_pay_where_one_does_not():
    """The first row of a tile pays for all of it."""
    lookahead, growth = Lookahead(4, 8), np.full(1, 0.05, np.float32)
    lookahead.learn(0, None, torch.tensor([[0.9]]))
    verify = np.array([1.0, 1.0, 2.0, 2.0, 2.0], np.float32)
    gains = []
    for max_layers in (1, 2, 3):
        lookahead.begin_tree(1)
        scores = np.full((1, 1), 0.9, np.float32)
        gains.append(lookahead.best_width(1, scores, verify, growth, 1.2, max_layers)[1])
    assert gains[0] == pytest.approx(-0.06)  # the child is not worth the tile
    assert gains[1] == pytest.approx(0.81 + 0.73 - 1.32, abs=0.04)
    assert gains[2] == pytest.approx(0.81 + 0.73 + 0.66 - 1.38, abs=0.06)


def test_drafts_that_get_worse_with_depth_are_told_apart():
    lookahead, growth = Lookahead(4, 8), np.zeros(1, np.float32)
    roots, free = np.ones((1, 1), np.float32), np.ones(9, np.float32)
    for depth, prob in ((0, 0.9), (1, 0.3)):
        for _ in range(200):
            lookahead.learn(depth, None, torch.tensor([[prob]]))
    for depth, prob in ((0, 0.9), (1, 0.3), (2, 0.3)):  # what is not known is as above
        lookahead.begin_tree(1)
        gain = lookahead.best_width(depth, roots, free, growth, 1.0, 1)[1]
        assert gain == pytest.approx(prob, abs=0.02)


def test_lookahead_forgets():
    lookahead, growth = Lookahead(3, 8), np.zeros(1, np.float32)
    for prob, steps in ((0.9, 200), (0.1, 200)):
        for _ in range(steps):
            lookahead.learn(0, None, torch.tensor([[prob]]))
    roots, free = np.ones((1, 1), np.float32), np.ones(9, np.float32)
    lookahead.begin_tree(1)
    gain = lookahead.best_width(0, roots, free, growth, 1.0, 1)[1]
    assert gain == pytest.approx(0.1, abs=0.02)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 3), seed=st.integers(0, 2**31), price=st.sampled_from([0.2, 1.0, 3.0]))
def test_a_tree_with_copies_is_what_stands(batch, seed, price):
    """Whatever its nodes came from; and what copies leave of a node is all that grows below it."""
    rng = np.random.default_rng(seed)
    verify = (1 + rng.random(7).cumsum()).astype(np.float32)
    growth = rng.random(3).astype(np.float32)
    mean = -np.sort(-rng.random(3)).astype(np.float32)

    def lookahead():
        new = Lookahead(3, 6)
        new.learn(1, torch.ones(1, 1), torch.from_numpy(mean[None]))
        new.begin_tree(batch)
        return new

    scores = -np.sort(-rng.random((batch, 3)), axis=1).astype(np.float32)
    copied = rng.random((batch, 3)).astype(np.float32)
    best = -np.sort(-np.concatenate([scores, copied], axis=1), axis=1)
    left = scores * rng.random((batch, 3)).astype(np.float32)
    width, gain = lookahead().best_width(1, left, verify, growth, price, 1, standing=best)
    tree = [row.tolist() for row in best]
    grown, gains = [list(known) for known in tree], []
    for k in range(3):
        for known, node in zip(grown, left[:, k], strict=True):
            known.extend((node * mean).tolist())
        cuts = [best_cut(nodes, verify, price) for nodes in (grown, tree)]
        gains.append(cuts[0] - cuts[1] - price * growth[k])
    assert gain == pytest.approx(max(gains), abs=1e-4)
    assert gains[width - 1] == pytest.approx(gain, abs=1e-4)
    # Without copies it is the decision of the layers alone.
    alone = lookahead().best_width(1, scores, verify, growth, price, 1)
    none = np.pad(scores, ((0, 0), (0, 3)))
    assert lookahead().best_width(1, scores, verify, growth, price, 1, standing=none) == alone


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    most=st.integers(1, 6),
    price=st.sampled_from([0.2, 1.0, 3.0]),
    shares_out=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_length_of_a_chain_is_its_definition(batch, most, price, shares_out, seed):
    rng = np.random.default_rng(seed)
    lookahead, means = Lookahead(6, 5), rng.random(5)
    for depth, mean in enumerate(means, start=1):
        lookahead.learn(depth, torch.ones(1, 1), torch.tensor([[mean]]).float())
    lookahead.begin_tree(batch)
    # What is known of a depth is moved towards the depth above, as if one node had had that.
    known = [means[0]]
    for mean in means[1:]:
        known.append((mean + known[-1]) / 2)
    scores = rng.random((batch, 1)).astype(np.float32)
    verify = (1 + rng.random(6).cumsum()).astype(np.float32)
    growth = float(rng.random())
    gains = []
    for layers in range(1, min(most, 5) + 1):
        chains = [
            [float(score) * np.prod(known[:n]) for n in range(layers)] for score in scores[:, 0]
        ]
        if shares_out:
            pool = sorted((node / batch for chain in chains for node in chain), reverse=True)
            rows = np.minimum(np.arange(1, len(pool) + 1) / batch, 5)
            cut = max(np.cumsum(pool) - price * np.interp(rows, np.arange(6), verify))
        else:
            cut = best_cut(chains, verify, price)
        gains.append(cut - price * growth * (layers - 1))
    length = lookahead.best_length(scores, verify, growth, price, most, shares_out)
    assert gains[length - 1] == pytest.approx(max(gains), abs=1e-4)
