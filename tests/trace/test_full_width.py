"""Full width: the depth and the size that a search by hand finds."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.ops import reference
from cast_sglang.trace.full_width import FullWidthPolicy, best_choice
from cast_sglang.tree import DraftTree
from tests.support.simulator import LAYERS, SIZES, TOPK, Text, make_costs


def grown(policy, text, step_costs, batch_size):
    """Grow a tree as a worker does; return it and each layer's scores."""
    tree = DraftTree(
        torch.zeros(batch_size, TOPK, dtype=torch.int64),
        torch.from_numpy(text.children(1).reshape(-1, TOPK)).float(),
        LAYERS,
        reference,
    )
    layers = [tree.frontier().scores]
    while True:
        frontier = tree.frontier()
        width = policy.breadth(frontier.scores, step_costs)
        if not policy.deepen():
            return tree, layers
        probs = torch.from_numpy(text.children(width).reshape(-1, TOPK)).float()
        policy.expanded(frontier.scores, probs)
        tree.grow(frontier, width, torch.zeros(probs.shape, dtype=torch.int64), probs)
        layers.append(frontier.scores[:, :width, None] * probs.view(batch_size, width, -1))


def value_of(depth, size, layers, price, step_costs, by_outcome):
    """What a depth and a size are worth, by definition."""
    batch_size = len(layers[0])
    flat = torch.cat([layer.reshape(batch_size, -1) for layer in layers[:depth]], dim=1)
    if size > flat.shape[1] + 1:
        return -np.inf
    best = flat.sort(dim=1, descending=True).values[:, : size - 1]
    tokens = float(best.double().sum(dim=1).mean())
    extend_row = float(step_costs.draft_extend[-1] - step_costs.draft_extend[0]) / LAYERS
    rows = tokens if by_outcome else depth - 1
    time = (depth - 1) * float(step_costs.draft[TOPK - 1]) + rows * extend_row
    return tokens - price * (time + float(step_costs.verify[size - 1]))


@pytest.mark.parametrize("by_outcome", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_depth_and_size_are_the_best_of_all(batch_size, by_outcome):
    policy, text = FullWidthPolicy(SIZES, LAYERS, by_outcome), Text(batch_size, 2)
    step_costs = make_costs("compute", batch_size)
    for _ in range(20):
        facts = (policy.price(batch_size), step_costs, by_outcome)
        tree, layers = grown(policy, text, step_costs, batch_size)
        assert tree.num_layers == LAYERS
        depth = policy.depth(tree.num_layers, step_costs)
        ranked = tree.ranked(SIZES[-1] - 1, depth)
        size = policy.rerank(ranked.scores, step_costs)
        best = max(
            value_of(*choice, layers, *facts)
            for choice in itertools.product(range(1, LAYERS + 1), SIZES)
        )
        assert value_of(depth, size, layers, *facts) == pytest.approx(best, abs=1e-5)
        policy.observe(batch_size, float(ranked.scores[:, : size - 1].sum(dim=1).mean()), 1.4)


def test_all_requests_get_the_same_number_of_rows():
    assert (
        FullWidthPolicy(SIZES, LAYERS).share_out(torch.rand(2, 5), make_costs("memory", 2)) is None
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), price=st.sampled_from([0.0, 1.0, 3.0]))
def test_the_choice_is_exhaustive(seed, price):
    rng = np.random.default_rng(seed)
    layers = [
        torch.from_numpy(rng.random((2, m), np.float32) ** depth)
        for depth, m in ((1, 2), (2, 3), (3, 2))
    ]
    draft, verify = rng.random(2).tolist(), rng.random(7, np.float32).cumsum()
    sizes = (2, 3, 5, 7)
    found = {}
    for depth, size in itertools.product((1, 2, 3), sizes):
        scores = [sorted(sum((x[b].tolist() for x in layers[:depth]), []))[::-1] for b in range(2)]
        if size <= len(scores[0]) + 1:
            utility = sum(sum(row[: size - 1]) for row in scores) / 2
            found[depth, size] = utility - price * (
                sum(draft[: depth - 1]) + float(verify[size - 1])
            )
    choice = best_choice(layers, draft, verify, sizes, price)
    assert choice.value == pytest.approx(max(found.values()), abs=1e-5)
    assert found[choice[:2]] == pytest.approx(choice.value, abs=1e-5)
    with pytest.raises(ValueError, match="fits the tree"):
        best_choice(layers[:1], [], verify, (5, 7), price)
