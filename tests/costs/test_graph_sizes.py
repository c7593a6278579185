"""Which sizes get a graph, against brute force: nothing worth running is dropped."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cast_sglang.costs.graph_sizes import GraphSizes, kept_sizes, most_that_pays

COSTS = st.lists(st.floats(0.5, 4.0), min_size=2, max_size=9)
STAIRS = [1.0, 1.0, 1.0, 1.01, 1.5, 1.5, 1.4, 2.0, 2.0]


def test_a_staircase_keeps_the_last_size_of_each_step():
    assert kept_sizes(STAIRS, range(2, 10), slack=0.0) == (3, 4, 7, 9)
    assert kept_sizes(STAIRS, range(2, 10)) == (4, 7, 9)
    assert kept_sizes([1.0] * 32, range(2, 33)) == (32,)
    assert kept_sizes([1.0, 2.0, 3.0], (2,)) == (2,)


@settings(max_examples=200, deadline=None)
@given(costs=COSTS, slack=st.sampled_from([0.0, 0.02, 0.3]))
def test_no_fewer_sizes_would_do(costs, slack):
    sizes = range(1, len(costs) + 1)

    def covers(kept):
        return all(
            any(m >= n and costs[m - 1] <= (1 + slack) * costs[n - 1] for m in kept) for n in sizes
        )

    kept = kept_sizes(costs, sizes, slack)
    assert covers(kept)
    for count in range(len(kept)):
        assert not any(covers(other) for other in itertools.combinations(sizes, count))


@settings(max_examples=200, deadline=None)
@given(
    costs=COSTS,
    seed=st.integers(0, 2**31),
    price=st.floats(0.0, 10.0),
    slack=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_the_best_kept_size_is_as_good_as_the_best_of_all(costs, seed, price, slack):
    """For any nodes, best first, and any price of time."""
    probs = np.sort(np.random.default_rng(seed).random(len(costs)) ** 3)[::-1]
    value = probs.cumsum() - price * np.array(costs)
    kept = [size - 1 for size in kept_sizes(costs, range(1, len(costs) + 1), slack)]
    best = int(value.argmax())
    assert value[kept].max() >= value[best] - price * slack * costs[best] - 1e-9


@settings(max_examples=100, deadline=None)
@given(costs=COSTS)
@example(costs=[0.5, 0.5000000000000001])
def test_without_slack_every_kept_size_is_best_for_some_nodes_and_price(costs):
    for size in kept_sizes(costs, range(1, len(costs) + 1), slack=0.0):
        # As many nodes as the size holds are worth a lot, and those behind them nothing.
        # Exactly, as costs may differ by their last bit.
        value = [100 * min(n, size) - Fraction(cost) for n, cost in enumerate(costs, start=1)]
        assert value.index(max(value)) + 1 == size and value.count(max(value)) == 1


def test_tiers_follow_the_batch_size():
    flat, steep = [1.0] * 8, list(range(1, 9))
    sizes = GraphSizes.by_cost([1, 4], range(2, 9), lambda batch: flat if batch == 1 else steep)
    assert sizes.sizes == (2, 3, 4, 5, 6, 7, 8) and sizes.num_graphs == 8
    assert sizes.batch_sizes(8) == [1, 4] and sizes.batch_sizes(3) == [4]
    assert str(sizes) == "batch 1: 8; batch 4: 2,3,4,5,6,7,8"
    assert sizes.fit(1, 3, limit=9) == 8
    assert sizes.fit(2, 3, limit=9) == sizes.fit(4, 3, limit=9) == 3
    assert sizes.fit(5, 3, limit=9) is None
    assert [sizes.bucket(batch) for batch in (1, 2, 4, 5)] == [1, 4, 4, None]


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(5, 32, 8), (8, 32, 8), (9, 10, 8), (3, 3, None), (40, 32, 32)]
)
def test_a_size_without_a_graph_runs_as_the_next_that_has_one(size, limit, expected):
    sizes = GraphSizes({1: (4, 8, 32)})
    assert sizes.fit(1, size, limit) == expected


def test_sizes_asked_for_are_kept_whatever_they_cost():
    sizes = GraphSizes.by_cost([1], range(2, 9), lambda _: [1.0] * 8, always=(5, 9))
    assert sizes.sizes == (5, 8)


def test_a_pass_is_replayed_at_the_next_size_or_runs_as_it_is():
    sizes = GraphSizes({2: (2, 4), 8: (2, 4, 8)})
    assert [sizes.replayed(1, size) for size in (1, 2, 3, 5)] == [2, 2, 4, 5]
    assert [sizes.replayed(5, size) for size in (3, 5, 9)] == [4, 8, 9]
    assert sizes.replayed(9, 3) == 3


@settings(max_examples=200, deadline=None)
@given(
    costs=COSTS,
    depth=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    price=st.floats(1.0, 5.0),
    overhead=st.floats(0.0, 1.0),
)
def test_no_tree_is_worth_more_rows_at_any_price_above_plain_decodings(
    costs, depth, seed, price, overhead
):
    """Of each layer one node at most is accepted; that is all that is known of the nodes."""
    rng = np.random.default_rng(seed)
    plain = costs[0] + overhead
    layers = rng.dirichlet(np.full(4, 0.2), size=depth) * rng.random((depth, 1)) ** 0.2
    nodes = np.sort(layers.flatten())[::-1][: len(costs) - 1]
    costs = costs[: len(nodes) + 1]
    value = np.concatenate(([0.0], nodes.cumsum())) - price / plain * np.array(costs)
    most = most_that_pays(np.array(costs), plain, depth)
    assert value[:most].max() >= value.max() - 1e-9


def test_the_most_rows_that_can_pay():
    steep = np.arange(1.0, 17.0)  # each row as long as a plain step
    assert most_that_pays(steep, 1.0, 4) == 1
    # A chain of four is accepted as a whole at best; behind it there is less than a row costs.
    assert most_that_pays(1 + 0.9 * (steep - 1), 1.0, 4) == 5
    assert most_that_pays(np.ones(16), 1.0, 4) == 16
    assert most_that_pays(1 + 0.41 * (steep - 1), 1.0, 4) == 10  # 4 / 9 is more than 0.41


def test_sizes_that_cannot_pay_have_no_graph_but_the_largest_where_buffers_are_made():
    sizes = GraphSizes.by_cost(
        [1, 4, 8],
        range(2, 10),
        lambda batch: [1.0 + 0.1 * n for n in range(9)],
        always=(4, 7),
        most_of=lambda batch: {1: 9, 4: 4, 8: 1}[batch],
    )
    assert sizes.at(1) == tuple(range(2, 10))
    assert sizes.at(4) == (2, 3, 4)
    assert sizes.at(8) == (2, 9)
