"""Prices that set themselves: each decision against brute force, then in closed loop."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import (
    LAYERS,
    SIZES,
    TOKENS,
    TOPK,
    Text,
    best_fixed,
    best_in_hindsight,
    make_costs,
    run,
)

from cast_sglang.costs.model import step_units
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.auto import HALF_LIFE, LOST_STEPS, MAX_LOSS, AutoPolicy
from cast_sglang.policy.lookahead import Lookahead
from cast_sglang.policy.optimal import optimal_choice


def costs(verify=None, draft=None, extend=None, plain=math.nan) -> SimpleNamespace:
    return SimpleNamespace(
        verify=np.array(verify if verify else [1.0] * 8, np.float32),
        draft=np.array(draft if draft else [0.1] * 4, np.float32),
        draft_extend=np.array(extend if extend else [0.0], np.float32),
        plain=plain,
        overhead=0.0,
        plain_overhead=0.0,
        unit_us=1000.0,
    )


def sorted_scores(batch: int, nodes: int, seed: int) -> torch.Tensor:
    scores = torch.rand(batch, nodes, generator=torch.Generator().manual_seed(seed)) ** 2
    return scores.sort(dim=1, descending=True).values


def priced(policy: AutoPolicy, price: float, batch_size: int = 1) -> AutoPolicy:
    """Let the policy see steps of this rate until nothing else counts."""
    for _ in range(40 * HALF_LIFE):
        policy.observe(batch_size, price - 1.0, 1.0)
    return policy


def grow(policy: AutoPolicy, scores: torch.Tensor, step_costs) -> int:
    """Return the width for a tree's first layer, or 0 where it is not expanded."""
    width = policy.breadth(scores, step_costs)
    return width if policy.deepen() else 0


# --- The decisions, one by one ---


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
    if not allowed:
        with pytest.raises(ValueError, match="smallest verify size"):
            policy.rerank(scores, step_costs)
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


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), price=st.sampled_from([0.0, 1.0, 3.0]))
def test_optimal_choice_is_exhaustive(seed, price):
    rng = np.random.default_rng(seed)
    layers = [
        torch.from_numpy(rng.random((2, m)) ** depth) for depth, m in ((1, 2), (2, 3), (3, 2))
    ]
    draft, verify = rng.random(2).tolist(), rng.random(7).cumsum()
    sizes = (2, 3, 5, 7)
    found = {}
    for depth, size in itertools.product((1, 2, 3), sizes):
        scores = [sorted(sum((x[b].tolist() for x in layers[:depth]), []))[::-1] for b in range(2)]
        if size <= len(scores[0]) + 1:
            utility = sum(sum(row[: size - 1]) for row in scores) / 2
            found[depth, size] = utility - price * (
                sum(draft[: depth - 1]) + float(verify[size - 1])
            )
    choice = optimal_choice(layers, draft, verify, sizes, price)
    assert choice.value == pytest.approx(max(found.values()))
    assert found[choice[:2]] == pytest.approx(choice.value)
    with pytest.raises(ValueError, match="fits the tree"):
        optimal_choice(layers[:1], [], verify, (5, 7), price)


def best_cut(nodes: dict[float, float], token, verify, price) -> float:
    """cut(nodes) of some scores and how many nodes per request have them."""
    most, count, utility = -price * verify[0], 0.0, 0.0
    for score in sorted(nodes, reverse=True):
        part = min(nodes[score], len(verify) - 1 - count)
        count, utility = count + part, utility + part * score
        time = np.interp(count, range(len(verify)), verify)
        most = max(most, token * utility - price * time)
    return most


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    topk=st.integers(1, 4),
    layers=st.integers(1, 3),
    price=st.sampled_from([0.2, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_lookahead_is_its_definition(batch, topk, layers, price, seed):
    """On scores that lie on the grid, so that nothing is rounded."""
    rng = np.random.default_rng(seed)

    def on_grid(*shape):
        return np.exp2(-rng.integers(0, 24, shape) / 8).astype(np.float32)

    vectors, weights = on_grid(2, 3), on_grid(2, 1)
    lookahead = Lookahead(3)
    assert not lookahead.has_learned
    lookahead.add(1, torch.from_numpy(weights), torch.from_numpy(vectors))
    lookahead.learn()
    verify = (1 + rng.random(6).cumsum() ** rng.choice([0.5, 1, 2])).astype(np.float32)
    growth, token = rng.random(topk).astype(np.float32), 0.9
    lookahead.begin_tree()
    tree: Counter[float] = Counter()
    for _ in range(layers):
        scores = -np.sort(-on_grid(batch, topk), axis=1)
        width, gain = lookahead.best_width(1, scores, token, verify, growth, price, 1)
        for score in scores.ravel():
            tree[round(float(score), 6)] += 1 / batch
        grown, gains = tree.copy(), []
        for k in range(topk):
            for score in scores[:, k]:
                for vector, weight in zip(vectors, weights[:, 0] / weights.sum(), strict=True):
                    for prob in vector:
                        grown[round(float(score * prob), 6)] += weight / batch
            cuts = [best_cut(nodes, token, verify, price) for nodes in (grown, tree)]
            gains.append(cuts[0] - cuts[1] - price * growth[k])
        assert gain == pytest.approx(max(gains), abs=1e-4)
        assert gains[width - 1] == pytest.approx(gain, abs=1e-4)


def test_several_layers_may_pay_where_one_does_not():
    """The first row of a tile pays for all of it."""
    lookahead, growth = Lookahead(4), np.full(1, 0.05, np.float32)
    lookahead.add(0, None, torch.tensor([[0.9]]))
    lookahead.learn()
    verify = np.array([1.0, 1.0, 2.0, 2.0, 2.0], np.float32)
    gains = []
    for max_layers in (1, 2, 3):
        lookahead.begin_tree()
        scores = np.full((1, 1), 0.9, np.float32)
        gains.append(lookahead.best_width(1, scores, 1.0, verify, growth, 1.2, max_layers)[1])
    assert gains[0] == pytest.approx(-0.06)  # the child is not worth the tile
    assert gains[1] == pytest.approx(0.81 + 0.73 - 1.32, abs=0.04)
    assert gains[2] == pytest.approx(0.81 + 0.73 + 0.66 - 1.38, abs=0.06)


def test_drafts_that_get_worse_with_depth_are_told_apart():
    lookahead, growth = Lookahead(4), np.zeros(1, np.float32)
    roots, free = np.ones((1, 1), np.float32), np.ones(9, np.float32)
    for depth, prob in ((0, 0.9), (1, 0.3)):
        for _ in range(200):
            lookahead.add(depth, None, torch.tensor([[prob]]))
            lookahead.learn()
    for depth, prob in ((0, 0.9), (1, 0.3), (2, 0.3)):  # what is not known is as above
        lookahead.begin_tree()
        gain = lookahead.best_width(depth, roots, 1.0, free, growth, 1.0, 1)[1]
        assert gain == pytest.approx(prob, abs=0.02)


def test_lookahead_forgets():
    lookahead, growth = Lookahead(3), np.zeros(1, np.float32)
    for prob, steps in ((0.9, 200), (0.1, 200)):
        for _ in range(steps):
            lookahead.add(0, None, torch.tensor([[prob]]))
            lookahead.learn()
    roots, free = np.ones((1, 1), np.float32), np.ones(9, np.float32)
    gain = lookahead.best_width(0, roots, 1.0, free, growth, 1.0, 1)[1]
    assert gain == pytest.approx(0.1, abs=0.02)


def test_growth_pays_by_what_the_children_promise():
    scores = torch.tensor([[0.9, 0.05, 0.02, 0.01]])
    cheap, dear = costs(draft=[0.05] * 4), costs(draft=[0.6] * 4)
    for children, expected in (([0.9, 0.05], True), ([0.2, 0.1], False)):
        policy = priced(AutoPolicy((2, 8), 8), 2.0)
        policy.expanded(torch.tensor([[0.9]]), torch.tensor([children]))
        policy.rerank(scores, cheap)
        assert bool(grow(policy, scores, dear)) is False
        policy.rerank(scores, dear)
        assert bool(grow(policy, scores, cheap)) is expected or children == [0.2, 0.1]


def test_width_weighs_the_further_node_against_its_time():
    scores = torch.tensor([[0.5, 0.4, 0.05]])
    for node, width in ((0.001, 2), (0.2, 1)):
        policy = priced(AutoPolicy((5,), 8), 2.0)
        policy.expanded(torch.tensor([[0.5]]), torch.tensor([[0.9, 0.1]]))
        policy.rerank(torch.tensor([[0.5, 0.4, 0.12, 0.1]]), costs())
        assert grow(policy, scores, costs(draft=[0.05, 0.05 + node, 0.05 + 2 * node])) == width


def test_without_the_hook_the_roots_children_stand_for_all():
    cheap = costs(draft=[0.05] * 2)
    for scores, grows in (([[0.9, 0.05]], True), ([[0.06, 0.02]], False)):
        policy = priced(AutoPolicy((2, 3), 8), 2.0)
        for _ in range(3):
            assert bool(grow(policy, torch.tensor(scores), cheap)) is grows
            policy.rerank(torch.tensor(scores), cheap)


# --- The price ---


def test_price_is_tokens_over_time_lately():
    policy = AutoPolicy(SIZES, LAYERS)
    assert policy.price(1) == 1.0  # neutral before the first step
    priced(policy, 3.0)
    assert policy.price(1) == pytest.approx(3.0, rel=1e-6)
    for _ in range(HALF_LIFE):
        policy.observe(1, 0.0, 1.0)
    assert policy.price(1) == pytest.approx(2.0, rel=0.01)  # half the way from 3 to 1
    for _ in range(110 - HALF_LIFE):
        policy.observe(1, 0.0, 1.0)
    assert policy.price(1) == pytest.approx(1.2, rel=0.02)  # nine tenths


def test_new_batch_sizes_start_from_the_nearest_known():
    policy = AutoPolicy(SIZES, LAYERS)
    priced(policy, 3.0, batch_size=1)
    priced(policy, 1.5, batch_size=32)
    assert policy.price(2) == pytest.approx(3.0)
    assert policy.price(17) == pytest.approx(1.5)  # 17-32 are one octave
    assert policy.price(64) == pytest.approx(1.5)
    # What it was started from is soon outvoted.
    for _ in range(8):
        policy.observe(64, 0.0, 1.0)
    assert policy.price(64) < 1.25


def test_step_units_are_the_sum_of_the_passes():
    step_costs = make_costs("memory", 1)
    units = step_units(step_costs, (2, 1), 8, 4)
    parts = (step_costs.verify[7], step_costs.draft[1], step_costs.draft[0])
    expected = sum(map(float, parts)) + float(step_costs.draft_extend[3]) + step_costs.overhead
    assert units == pytest.approx(expected)
    assert step_units(step_costs, (), 8, 0) == pytest.approx(float(step_costs.verify[7]) + 0.05)


def test_equal_histories_give_equal_decisions():
    results = [
        run(AutoPolicy(SIZES, LAYERS), Text(4, 1), make_costs("stairs", 4), 4, 60, Acceptance())
        for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


@settings(max_examples=50, deadline=None)
@given(answer=st.sampled_from([20.0, 100.0]), seed=st.integers(0, 2**31))
def test_the_price_leads_to_the_most_answers_per_time(answer, seed):
    """Each of some trees is the best at a price; the steady one gives the most answers.

    The worth of tokens is taken as straight around the mean step. So where the best tree lies
    between two that differ much, those may take turns.
    """
    rng = np.random.default_rng(seed)
    tokens, times = 1 + 5 * rng.random(20), 1 + rng.random(20).cumsum() / 4
    policy = AutoPolicy(SIZES, LAYERS)
    policy.expect(answer)
    for _ in range(40 * HALF_LIFE):
        best = int((tokens - policy.price(1) * times).argmax())
        policy.observe(1, tokens[best] - 1.0, times[best])
    answers = 1 / (times * (answer / tokens + LOST_STEPS))
    assert answers[best] >= answers.max() * (1 - (0.01 if answer == 100.0 else 0.05))


def test_plain_decoding_is_compared_by_answers():
    """A step with a tree is worth a little less than its tokens, where answers are short."""
    for answer, stays in ((1000.0, True), (16.0, False)):
        policy, step_costs = AutoPolicy(SIZES, LAYERS), costs(plain=1.0)
        policy.expect(answer)
        drafts = []
        for _ in range(400):
            drafts.append(policy.speculate(8, step_costs))
            if drafts[-1]:
                policy.observe(8, 3.0, 3.6)
        assert all(drafts) is stays
        assert stays or sum(drafts[-100:]) < 20


# --- In closed loop ---

WARM_UP = 100


@pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
@pytest.mark.parametrize("regime", ["memory", "compute", "stairs", "knee"])
def test_auto_is_near_the_best_fixed_tree_of_hindsight(regime, batch_size):
    """No constant is set by hand, and the grid of fixed trees is searched afterwards."""
    step_costs, text = make_costs(regime, batch_size), Text(batch_size, 3)
    steps = 1200 if batch_size <= 2 else 400
    result = run(AutoPolicy(SIZES, LAYERS), text, step_costs, batch_size, steps, Acceptance())
    fixed, shape = best_fixed(step_costs, text)
    rate = result.rate(WARM_UP)
    assert rate >= 0.95 * fixed, f"{rate:.3f} against {fixed:.3f} of {shape}"
    assert result.rate() >= 0.98 / step_costs.plain


@pytest.mark.parametrize(
    ("regime", "batch_size", "draft"),
    [("memory", 1, 0.15), ("compute", 4, 0.06), ("stairs", 8, 0.03)],
)
def test_regret_against_the_best_depth_and_size_of_every_step(regime, batch_size, draft):
    step_costs, text = make_costs(regime, batch_size, draft=draft), Text(batch_size, 4)
    steps = 1200 if batch_size == 1 else 500
    result = run(AutoPolicy(SIZES, LAYERS), text, step_costs, batch_size, steps, Acceptance())
    best = best_in_hindsight(step_costs, text, batch_size)
    assert 1.0 - result.rate(WARM_UP) / best < 0.05


@pytest.mark.parametrize("batch_size", [8, 32])
def test_one_budget_gains_where_requests_differ(batch_size):
    """Half of the requests can hardly be drafted, and rows cost time."""
    step_costs, rates = make_costs("compute", batch_size), []
    ease = np.repeat([-3.0, 2.5], batch_size // 2)[:, None]
    for joint in (False, True):
        policy, text = AutoPolicy(SIZES, LAYERS, True), Text(batch_size, 9, ease)
        result = run(policy, text, step_costs, batch_size, 300, Acceptance(), joint=joint)
        rates.append(result.rate(WARM_UP))
    assert rates[1] > 1.05 * rates[0]


class Deaf(AutoPolicy):
    """As under a worker that does not report children."""

    def expanded(self, parent_scores, child_probs):
        pass


def test_deaf_and_uncalibrated_it_still_works():
    step_costs, text = make_costs("stairs", 4), Text(4, 5)
    result = run(Deaf(SIZES, LAYERS), text, step_costs, 4, 400)
    assert result.rate(WARM_UP) >= 0.93 * best_fixed(step_costs, text)[0]


@pytest.mark.parametrize(("batch_size", "bound"), [(1, 0.12), (8, 0.05)])
def test_the_price_is_steady(batch_size, bound):
    step_costs = make_costs("compute", batch_size)
    prices = run(
        AutoPolicy(SIZES, LAYERS), Text(batch_size, 6), step_costs, batch_size, 800, Acceptance()
    ).prices[WARM_UP:]
    assert prices.std() / prices.mean() < bound


def test_a_change_of_text_is_followed():
    """Within some hundred steps most of the way is gone; calibration, which remembers longer than
    the price does, takes the rest.
    """
    text, step_costs = Text(16, 7, ease=2.5), make_costs("compute", 16)

    def change(step):
        text.ease = 2.5 if step < 300 else 0.0

    prices = run(AutoPolicy(SIZES, LAYERS), text, step_costs, 16, 800, Acceptance(), change).prices
    before, after = prices[200:300].mean(), prices[600:].mean()
    assert before > 1.15 * after
    assert abs(prices[400:450].mean() - after) < 0.25 * (before - after)


# --- Plain decoding as a candidate ---


@pytest.mark.parametrize(
    ("batch_size", "draft", "ease"), [(1, 0.6, -1.5), (8, 0.3, -1.0), (32, 0.06, -2.0)]
)
def test_where_drafting_does_not_pay_plain_decoding_takes_over(batch_size, draft, ease):
    step_costs, text = make_costs("compute", batch_size, draft=draft), Text(batch_size, 8, ease)
    result = run(AutoPolicy(SIZES, LAYERS), text, step_costs, batch_size, 4000, Acceptance())
    plain_time = result.tokens.sum() * step_costs.plain
    assert best_fixed(step_costs, text)[0] < 1.0 / step_costs.plain
    assert result.is_plain[-1000:].mean() > 0.7
    # The guarantee: so many target passes once, a hundredth of the time, and a last step's luck.
    most = MAX_LOSS / math.sqrt(batch_size) + 0.01 * plain_time + 4.0
    assert result.times.sum() - plain_time < most + luck(result, step_costs)
    assert result.rate(1000) >= 0.98 / step_costs.plain


def luck(result, step_costs) -> float:
    """The account holds what was accepted, the result what was to be expected: three deviations."""
    tried = (~result.is_plain).sum()
    return 3.0 * step_costs.plain * math.sqrt(tried)


@pytest.mark.parametrize(("batch_size", "draft"), [(1, 0.3), (4, 0.1), (32, 0.06)])
def test_speculation_comes_back_when_it_pays_again(batch_size, draft):
    step_costs = make_costs("compute", batch_size, draft=draft)
    waits = []
    for seed in range(3):
        text = Text(batch_size, seed, ease=-4.0)

        def change(step, text=text):
            text.ease = -4.0 if step < 1200 else 3.0

        result = run(
            AutoPolicy(SIZES, LAYERS), text, step_costs, batch_size, 1800, Acceptance(), change
        )
        assert result.is_plain[1000:1200].mean() > 0.5
        assert result.is_plain[-100:].mean() < 0.05
        back = 1200 + int(np.flatnonzero(result.is_plain[1200:])[-1:].sum())
        waits.append(result.times[1200:back].sum())
    # Target passes; a hundred are a second where one takes 10 ms.
    assert np.median(waits) < 150


def test_a_passing_dip_does_not_stop_speculation():
    policy, step_costs = AutoPolicy(SIZES, LAYERS), make_costs("memory", 1)
    for dip in range(50):
        for _ in range(20):
            assert policy.speculate(1, step_costs)
            policy.observe(1, 2.0, 1.5)
        for _ in range(10):
            assert policy.speculate(1, step_costs), dip
            policy.observe(1, 0.0, 1.5)


def test_plain_time_includes_what_else_is_paid():
    """Plain steps are slower by what keeps the draft warm, and verify[0] stands in for unknowns."""
    unknown = make_costs("memory", 8)._replace(plain=math.nan)
    for extra, stays in ((0.0, False), (0.6, True)):
        policy = AutoPolicy(SIZES, LAYERS)
        decisions = []
        for _ in range(200):
            decisions.append(policy.speculate(8, unknown, extra))
            if decisions[-1]:
                policy.observe(8, 0.5, 2.0)  # 1.5 tokens in 2 passes: 0.75 against 1 / (1 + extra)
        assert decisions[-1] is stays
        assert all(decisions) is stays


def test_a_try_is_saved_for_with_what_the_draft_has_to_catch_up_on():
    step_costs, waits = make_costs("compute", 4), []
    for catch_up in (0.0, 1.0):
        policy, behind, lost, tries = AutoPolicy(SIZES, LAYERS), 0.0, 0.0, []
        for step in range(4000):
            if policy.speculate(4, step_costs, catch_up=behind):
                policy.observe(4, 0.0, 1.5)
                if step >= 2000:
                    lost += 1.5 + behind - step_costs.plain
                    tries.append(step)
                behind = 0.0
            else:
                behind = catch_up
        waits.append(np.diff(tries).mean())
        assert lost <= 1.2 * 0.01 * 2000 * step_costs.plain
    assert waits[1] > 1.5 * waits[0]


def test_each_batch_size_decides_for_itself():
    policy = AutoPolicy(SIZES, LAYERS)
    small, large = make_costs("compute", 1), make_costs("compute", 32)
    for _ in range(200):
        if policy.speculate(32, large):
            policy.observe(32, 0.1, 2.0)
        assert policy.speculate(1, small)
        policy.observe(1, 2.0, 1.5)
    assert policy.price(1) == pytest.approx(2.0, rel=0.05)
    state = json.loads(json.dumps(policy.state()))
    assert [row["batch_sizes"] for row in state] == [[1, 1], [17, 32]]
    assert [row["is_plain"] for row in state] == [False, True]
    assert state[0]["price"] == policy.price(1)


def test_sizes_are_those_of_the_simulator():
    assert SIZES == tuple(range(2, TOKENS + 1)) and TOPK == 8
