"""Policy `auto` where nothing is drafted: copies are verified where that beats a plain step."""

import numpy as np
import pytest
import torch

from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.octaves import PLAIN_STEPS
from cast_sglang.policy.turns import FIRST
from tests.support.policies import costs, priced

SIZES = (2, 3, 5, 8)


def chains(rng, batch, nodes=7):
    """Scores of chains of unequal lengths; 0 where a chain has ended."""
    scores = np.cumprod(rng.uniform(0.3, 1.0, (batch, nodes)), axis=1)
    scores[np.arange(nodes) >= rng.integers(0, nodes + 1, (batch, 1))] = 0.0
    return torch.from_numpy(scores.astype(np.float32))


def best_rows(scores, verify, price, sizes):
    """The best that equal rows, or rows shared out, bring beyond those of a plain step."""
    batch, _ = scores.shape
    plain = -price * verify[0]
    if sizes is not None:
        values = [float(scores[:, : n - 1].sum()) / batch - price * verify[n - 1] for n in sizes]
        return max(values) - plain
    nodes = np.sort(scores.numpy().ravel())[::-1]
    rows = 1 + np.arange(1, len(nodes) + 1) / batch
    times = np.interp(rows, np.arange(1, len(verify) + 1), verify)
    return float((np.cumsum(nodes) / batch - price * times).max()) - plain


@pytest.mark.parametrize("shares_out", [False, True])
@pytest.mark.parametrize("row", [0.02, 0.2, 0.5])
def test_copies_are_verified_where_they_bring_more_than_their_time(shares_out, row):
    rng, answers = np.random.default_rng(3), []
    step_costs = costs(verify=[1.0 + row * n for n in range(8)])
    for _ in range(60):
        batch, price = int(rng.integers(1, 5)), float(rng.uniform(1.0, 3.0))
        scores = chains(rng, batch)
        policy = priced(AutoPolicy(SIZES, 7), price, batch)
        expected = best_rows(scores, step_costs.verify, price, None if shares_out else SIZES)
        answer = policy.beats_plain(scores, step_costs, shares_out)
        assert answer == (expected > 0.0) or abs(expected) < 1e-4
        answers.append(answer)
    assert 0 < sum(answers)
    assert row < 0.1 or sum(answers) < len(answers)


def test_a_turn_of_another_tree_verifies_what_there_is():
    """So that the time of its rows is known, where the table says that none pays."""
    dear = costs(verify=[1.0 + 5.0 * n for n in range(8)])
    policy = AutoPolicy(SIZES, 7)
    # Plain decoding is tried first.
    drafts = [policy.speculate(1, dear) for _ in range(FIRST + PLAIN_STEPS)]
    assert drafts == [True] * (FIRST - 1) + [False] * PLAIN_STEPS + [True]
    some, none = torch.tensor([[0.9, 0.5, 0.0]]), torch.zeros(1, 3)
    assert policy.beats_plain(some, dear) and not policy.beats_plain(none, dear)
    assert policy.rerank(some, dear) == 3  # the smallest size that holds what is there
    policy.speculate(1, dear)
    assert not policy.beats_plain(some, dear)


def test_looking_in_vain_is_soon_given_up():
    """A step that looks and verifies the root alone loses what looking takes, no more."""
    step_costs = costs()
    step_costs.overhead, step_costs.plain_overhead = 0.3, 0.1
    policy, lost, looked = AutoPolicy(SIZES, 7), 0.0, 0
    for _ in range(2000):
        if policy.speculate(1, step_costs):
            policy.observe(1, 0.0, 1.0 + step_costs.overhead)
            looked, lost = looked + 1, lost + 0.2
    assert lost < 32.0 + 0.02 * 2000 and looked < 400
    # When copies come, they are found within some tries, and then it looks in each step.
    found = 0
    for _ in range(400):
        if policy.speculate(1, step_costs):
            policy.observe(1, 4.0, 1.5)
            found += 1
    assert found > 250
