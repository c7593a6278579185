"""The three decisions: against brute force, against the paper's wording, and Theorem 4.1."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.policy.fixed import EaglePolicy, FixedPolicy


def costs(draft: list[float] | None = None, verify: list[float] | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        draft=np.array(draft if draft else [0.0], np.float32),
        verify=np.array(verify if verify else [0.0], np.float32),
    )


@settings(max_examples=200)
@given(
    batch=st.integers(1, 5),
    topk=st.integers(1, 10),
    slope=st.integers(1, 64).map(lambda n: n / 64),
    offset=st.integers(0, 64).map(lambda n: n / 64),
    seed=st.integers(0, 2**31),
)
def test_theorem_4_1_eagle_is_cast_with_an_affine_cost(batch, topk, slope, offset, seed):
    """With c_j = slope * j + offset and C1 at the K-th marginal, breadth keeps EAGLE's top-K.

    At equality the theorem's test is >=, and ties here go to the smaller count, so C1 stands just
    under the theorem's value.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, topk, generator=generator) * 0.95 + 0.05
    scores = scores.sort(dim=1, descending=True).values
    cost = [slope * j + offset for j in range(1, topk + 1)]
    c1 = float(scores[:, -1].double().sum()) / (batch * slope)
    policy = FixedPolicy(c1 * (1 - 1e-4), 0.0, 0.0, 4, (2,))
    assert policy.breadth(scores, costs(draft=cost)) == topk
    assert policy.deepen()
    assert EaglePolicy(8).breadth(scores) == topk


@given(
    batch=st.integers(1, 5),
    topk=st.integers(1, 10),
    cost=st.lists(st.floats(0.0, 50.0), min_size=10, max_size=10),
    seed=st.integers(0, 2**31),
)
def test_a_price_of_zero_switches_its_rule_off(batch, topk, cost, seed):
    generator = torch.Generator().manual_seed(seed)
    # Away from 0, which no price keeps.
    scores = torch.rand(batch, topk, generator=generator) * 0.99 + 0.01
    scores = scores.sort(dim=1, descending=True).values
    given = costs(draft=cost, verify=[*cost, 1.0])
    fixed = FixedPolicy(0.0, 0.0, 0.0, 4, tuple(range(2, topk + 2)))
    eagle = EaglePolicy(topk + 1)
    for _ in range(3):
        assert fixed.breadth(scores, given) == eagle.breadth(scores) == topk
        assert fixed.deepen() and eagle.deepen()
        scores = scores / 2
    assert fixed.rerank(scores, given) == eagle.rerank(scores) == topk + 1


def test_a_price_of_zero_leaves_out_only_what_adds_nothing():
    scores = torch.tensor([[0.5, 1e-9, 0.0]])
    cost = costs(draft=[1.0, 1.0, 1.0])
    assert FixedPolicy(0, 0, 0, 4, (2,)).breadth(scores, cost) == 2


def test_breadth_uses_the_mean_over_the_batch():
    scores = torch.tensor([[0.9, 0.8, 0.01], [0.9, 0.02, 0.01]])
    cost = [0.1, 0.2, 0.3]  # each further node costs 0.1, so it must bring more than 0.1 * C1
    assert FixedPolicy(4.0, 0, 0, 4, (2,)).breadth(scores, costs(draft=cost)) == 2
    assert FixedPolicy(4.2, 0, 0, 4, (2,)).breadth(scores, costs(draft=cost)) == 1


def test_depth_rule_is_the_papers_product():
    cost = costs(draft=[0.125, 0.25])
    scores = torch.tensor([[0.5, 0.25]])
    # C1 = 0 keeps both: u = 0.75, c = 0.25, alpha = 1, so the bound on C2 is 3.
    for c2, grows in ((3.0, True), (3.01, False)):
        policy = FixedPolicy(0.0, c2, 0.0, 4, (2,))
        policy.breadth(scores, cost)
        assert policy.deepen() is grows


@given(layers=st.lists(st.integers(1, 64), min_size=2, max_size=12), r=st.integers(1, 6))
def test_fifo_holds_the_last_r_gain_ratios_and_starts_with_one(layers, r):
    cost = costs(draft=[0.25])
    policy = FixedPolicy(0.0, 0.0, 0.0, r, (2,))
    ratios, above = [1.0], None
    for numerator in layers:
        utility = numerator / 64
        policy.breadth(torch.tensor([[utility]]), cost)
        if above is not None:
            ratios.append(utility / above)
        above = utility
    expected = sum(ratios[-r:]) / len(ratios[-r:])
    # deepen() is true exactly up to C2 = alpha * u / c.
    bound = expected * above / 0.25
    policy.c2 = bound * (1 - 1e-5)
    assert policy.deepen()
    policy.c2 = bound * (1 + 1e-5)
    assert not policy.deepen()


def test_gain_ratios_live_across_steps_but_do_not_join_them():
    cost = costs(draft=[0.5], verify=[1.0, 1.0])
    policy = FixedPolicy(0.0, 1.0, 0.0, 8, (2,))
    for first, second in ((0.8, 0.4), (0.1, 0.05)):
        policy.breadth(torch.tensor([[first]]), cost)
        policy.breadth(torch.tensor([[second]]), cost)
        policy.rerank(torch.tensor([[first]]), cost)
    assert list(policy._gain_ratios) == pytest.approx([1.0, 0.5, 0.5])


@given(
    batch=st.integers(1, 4),
    nodes=st.integers(1, 30),
    sizes=st.sets(st.integers(2, 24), min_size=1),
    price=st.sampled_from([0.0, 0.5, 2.5, 8.0]),
    seed=st.integers(0, 2**31),
)
def test_rerank_is_brute_force_over_the_allowed_sizes(batch, nodes, sizes, price, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, nodes, generator=generator).sort(dim=1, descending=True).values
    verify = torch.rand(24, generator=generator).cumsum(0)
    allowed = [size for size in sorted(sizes) if size <= nodes + 1]
    policy = FixedPolicy(0, 0, price, 4, tuple(sorted(sizes)))
    chosen = policy.rerank(scores, costs(verify=verify.tolist()))
    if not allowed:  # a tree below the smallest size is verified as it is
        assert chosen == scores.shape[1] + 1
        return
    assert chosen in allowed

    def value(size):
        expected = float(scores.double()[:, : size - 1].sum()) / batch
        return expected - price * float(verify[size - 1])

    assert value(chosen) >= max(value(size) for size in allowed) - 1e-5


def test_rerank_counts_rows_with_the_root():
    """N nodes are N - 1 drafts and N rows: at N = 2 the cost read is that of two rows."""
    verify = [1.0, 1.1, 9.0]
    assert (
        FixedPolicy(0, 0, 1.0, 4, (2, 3)).rerank(torch.tensor([[0.9, 0.9]]), costs(verify=verify))
        == 2
    )


def test_eagle_policy_never_asks_for_costs():
    policy = EaglePolicy(8)
    assert policy.breadth(torch.rand(2, 4), None) == 4
    assert policy.deepen()
    assert policy.rerank(torch.rand(2, 30), None) == 8
    assert policy.rerank(torch.rand(2, 4), None) == 5
    assert math.isfinite(policy.num_draft_tokens)
