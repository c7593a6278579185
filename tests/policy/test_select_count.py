"""Algorithm 1: against the paper's wording and exhaustive search, alone and in policy `auto`."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.select_count import pooled, select_count, select_size, size_costs
from tests.support.policies import costs, priced


def paper_select_count(utility: list[float], cost: list[float], price: float) -> int:
    """Algorithm 1 as the paper words it: extend while the marginal ratio exceeds the price."""
    kept = 0
    for k in range(1, len(utility)):
        if (utility[k] - utility[kept]) / (cost[k] - cost[kept]) > price:
            kept = k
    return kept + 1


def count_of(utility: list[float], cost: list[float], price: float) -> int:
    """Return the choice among nodes that bring this utility together."""
    scores = np.diff(utility, prepend=0.0).astype(np.float32)
    count, value = select_count(scores[None], np.array(cost, np.float32), price)
    assert value == utility[count - 1] - price * cost[count - 1]
    return count


# Multiples of 1/64 are exact in float32, so ties are real ties and no tolerance is needed.
sixty_fourths = st.integers(0, 512).map(lambda n: n / 64)
increments = st.lists(st.integers(1, 64).map(lambda n: n / 64), min_size=1, max_size=24)


@given(
    pairs=st.lists(st.tuples(sixty_fourths, sixty_fourths), min_size=1, max_size=40),
    price=st.sampled_from([0.0, 0.5, 1.0, 2.5, 4.0]),
)
def test_select_count_is_the_first_best_for_any_cost_curve(pairs, price):
    utility, cost = [list(column) for column in zip(*pairs, strict=True)]
    values = [u - price * c for u, c in pairs]
    assert count_of(utility, cost, price) == values.index(max(values)) + 1


@given(gains=increments, steps=st.data(), price=st.integers(0, 40).map(lambda n: n / 8))
def test_select_count_is_algorithm_1_for_increasing_costs(gains, steps, price):
    drawn = steps.draw(st.lists(st.integers(1, 64), min_size=len(gains), max_size=len(gains)))
    utility = [sum(gains[: k + 1]) for k in range(len(gains))]
    cost = [sum(drawn[: k + 1]) / 64 for k in range(len(drawn))]
    assert count_of(utility, cost, price) == paper_select_count(utility, cost, price)


def test_a_staircase_is_used_up_to_its_edge():
    """All nodes of a step cost the same, so the last of them is as cheap as the first."""
    cost = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    scores = np.array([[0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01]], np.float32)
    assert select_count(scores, np.array(cost, np.float32), 2.5)[0] == 4
    # With more to gain on the next step, all of that step is taken.
    assert count_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], cost, 2.5) == 8


def test_a_cost_that_falls_is_crossed():
    """40 rows may be dearer than 48: a rule that stops at the first bad ratio stays behind."""
    cost = [1.0, 1.25, 2.0, 1.375]
    assert count_of([0.875, 1.25, 1.5, 1.75], cost, 2.0) == 4


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 5), nodes=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_pooled_nodes_are_those_of_all_requests(batch, nodes, seed):
    rng = np.random.default_rng(seed)
    scores, verify = rng.random((batch, nodes), np.float32), rng.random(7, np.float32)
    ranked, cost = pooled(scores, verify)
    assert ranked.shape == (1, batch * nodes) and (np.diff(ranked) <= 0).all()
    np.testing.assert_allclose(np.sort(ranked[0]), np.sort(scores.ravel()) / batch, rtol=1e-6)
    rows = 1.0 + np.arange(1, batch * nodes + 1) / batch
    np.testing.assert_allclose(cost, np.interp(rows, np.arange(1, 8), verify), rtol=1e-5)


def test_a_size_costs_what_holds_its_rows():
    verify = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], np.float32)
    assert size_costs(verify, (2, 5)).tolist() == [2.0, 2.0, 5.0, 5.0, 5.0]
    nodes = np.array([[0.5, 0.25]], np.float32)
    assert select_size(nodes, size_costs(verify, (4,)), (4,), 0.1) == (3, -np.inf)
    size = select_size(nodes, size_costs(verify, (2, 5)), (2, 5), 0.0)
    assert size == (2, 0.5)  # of five rows two would be empty


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
    extend = (0.1 + rng.random() * np.arange(9) / 9).tolist()
    allowed = [size for size in sorted(sizes) if size <= nodes + 1]
    policy = priced(AutoPolicy(tuple(sorted(sizes)), 8, by_outcome), price, batch)
    step_costs = costs(verify=verify, extend=extend)
    if not allowed:  # a tree below the smallest size is verified as it is
        assert policy.rerank(scores, step_costs) == scores.shape[1] + 1
        return

    def value(size):
        accepted = float(scores.double()[:, : size - 1].sum(dim=1).mean())
        # Draft extend runs what is accepted, or as many rows as the tree is deep.
        rows = accepted if by_outcome else 0.0
        time = verify[size - 1] + rows * (extend[1] - extend[0])
        return accepted - price * time

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
    extend = (0.1 + rng.random() * np.arange(9) / 9).tolist()
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
