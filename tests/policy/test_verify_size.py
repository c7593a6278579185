"""How many nodes are verified, and of which requests: against exhaustive search."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.policy.auto import AutoPolicy
from tests.support.policies import costs, priced


def sorted_scores(batch: int, nodes: int, seed: int) -> torch.Tensor:
    scores = torch.rand(batch, nodes, generator=torch.Generator().manual_seed(seed)) ** 2
    return scores.sort(dim=1, descending=True).values


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    nodes=st.integers(1, 30),
    sizes=st.sets(st.integers(2, 24), min_size=1),
    price=st.sampled_from([1.0, 1.7, 4.0]),
    seed=st.integers(0, 2**31),
    by_outcome=st.booleans(),
)
def test_rerank_is_an_exhaustive_search(batch, nodes, sizes, price, seed, by_outcome):
    scores, rng = sorted_scores(batch, nodes, seed), np.random.default_rng(seed)
    verify = (1 + rng.random(24).cumsum()).tolist()
    extend = (0.1 + rng.random(9).cumsum()).tolist()
    allowed = [size for size in sorted(sizes) if size <= nodes + 1]
    policy = priced(AutoPolicy(tuple(sorted(sizes)), 8, by_outcome), price, batch)
    step_costs = costs(verify=verify, extend=extend)
    if not allowed:  # a tree below the smallest size is verified as it is
        assert policy.rerank(scores, step_costs) == scores.shape[1] + 1
        return

    def value(size):
        per_request = scores.double()[:, : size - 1].sum(dim=1)
        # A tree of one layer accepts one draft at most; by outcome, as many as are expected.
        longest = float(per_request.mean()) if by_outcome else 1.0
        time = verify[size - 1] + np.interp(longest, range(9), extend)
        return float(per_request.mean()) - price * time

    policy.breadth(scores[:, :4], step_costs)
    chosen = policy.rerank(scores, step_costs)
    assert chosen in allowed
    assert value(chosen) >= max(value(size) for size in allowed) - 1e-4


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    nodes=st.integers(1, 8),
    price=st.sampled_from([1.0, 1.7, 4.0]),
    seed=st.integers(0, 2**31),
    weighed=st.booleans(),
)
def test_sharing_out_is_an_exhaustive_search(batch, nodes, price, seed, weighed):
    """No other number of nodes, and no other way to place them, is worth more."""
    scores, rng = sorted_scores(batch, nodes, seed), np.random.default_rng(seed)
    verify = 1 + rng.random(9).cumsum() / 4
    extend = (0.1 + rng.random(9).cumsum() / 9).tolist()
    policy = priced(AutoPolicy(tuple(range(2, 10)), 8, True), price, batch)
    weights = rng.random(batch) if weighed else np.ones(batch)
    policy.weigh(weights if weighed else None)
    rows = policy.share_out(scores, costs(verify=verify.tolist(), extend=extend))
    assert rows.shape == (batch,) and rows.min() >= 1 and rows.sum() > batch
    ranked = scores.numpy() * weights[:, None]

    def value(rows):
        tokens = sum(ranked[b, : rows[b] - 1].sum() for b in range(batch)) / batch
        time = np.interp(np.mean(rows), range(1, 10), verify) + np.interp(tokens, range(9), extend)
        return tokens - price * time

    choices = itertools.product(range(1, nodes + 2), repeat=batch)
    best = max(value(np.array(choice)) for choice in choices if sum(choice) > batch)
    assert value(rows) >= best - 1e-4


def test_the_budget_goes_where_drafts_are_good():
    hopeless, easy = [0.2, 0.02, 0.01, 0.01], [0.95, 0.9, 0.85, 0.8]
    policy = priced(AutoPolicy(tuple(range(2, 6)), 8, True), 2.0, 2)
    step_costs = costs(verify=[1.0, 1.3, 1.6, 1.9, 2.2])
    assert policy.share_out(torch.tensor([hopeless, easy]), step_costs).tolist() == [1, 5]
    # A request whose tokens count more gets more of the rows, one that wants none gets none.
    alike = torch.tensor([[0.7, 0.5, 0.35, 0.2]] * 3)
    policy.weigh(np.array([1.8, 0.2, 0.0]))
    rows = policy.share_out(alike, step_costs)
    assert rows[0] > rows[1] >= rows[2] == 1


def test_a_paid_size_is_filled_and_ties_go_to_the_smaller():
    scores = torch.tensor([[0.9, 0.6, 0.3, 0.1, 0.05, 0.0, 0.0]])
    stairs = [1.0, 1.0, 1.0, 1.2, 1.2, 1.2, 2.0, 2.0]
    policy = priced(AutoPolicy(tuple(range(2, 9)), 8), 2.0)
    # The next tile costs 0.4 tokens and brings 0.45 with its last node, only 0.4 without.
    assert policy.rerank(scores, costs(verify=stairs)) == 6
    # A node that will never be accepted is worth no row, not even a free one.
    assert policy.rerank(scores, costs(verify=[1.0] * 8)) == 6
