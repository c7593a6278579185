"""Prices that set themselves: each decision against brute force, then in closed loop."""

import json

import numpy as np
import pytest
import torch

from cast_sglang.costs.model import plain_units
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.auto import LEAST_CUT, AutoPolicy
from cast_sglang.policy.base import Prefill
from cast_sglang.policy.lookahead import HALF_LIFE
from cast_sglang.policy.octaves import PLAIN_AFTER, PLAIN_STEPS
from cast_sglang.policy.turns import DEFAULT_SHAPES, FIRST
from tests.support.policies import costs, priced
from tests.support.simulator import (
    LAYERS,
    SIZES,
    TOKENS,
    TOPK,
    Text,
    make_costs,
    run,
)


def grow(policy: AutoPolicy, scores: torch.Tensor, step_costs) -> int:
    """Return the width for a tree's first layer, or 0 where it is not expanded."""
    width = policy.breadth(scores, step_costs)
    return width if policy.deepen() else 0


# --- The decisions, one by one ---


def test_growth_pays_by_what_the_children_promise():
    scores = torch.tensor([[0.9, 0.05, 0.02, 0.01]])
    cheap, dear = costs(draft=[0.05] * 4), costs(draft=[0.6] * 4)
    for children, expected in (([0.9, 0.05], True), ([0.2, 0.1], False)):
        policy = priced(AutoPolicy((2, 8), 8), 2.0)
        policy.expanded(torch.tensor([[0.9]]), torch.tensor([[*children, 0.0, 0.0]]))
        policy.rerank(scores, cheap)
        assert bool(grow(policy, scores, dear)) is False
        policy.rerank(scores, dear)
        assert bool(grow(policy, scores, cheap)) is expected or children == [0.2, 0.1]


def test_width_weighs_the_further_node_against_its_time():
    scores = torch.tensor([[0.5, 0.4, 0.05]])
    for node, width in ((0.001, 2), (0.2, 1)):
        policy = priced(AutoPolicy((5,), 8), 2.0)
        policy.expanded(torch.tensor([[0.5]]), torch.tensor([[0.9, 0.1, 0.0]]))
        policy.rerank(torch.tensor([[0.5, 0.4, 0.12, 0.1]]), costs())
        assert grow(policy, scores, costs(draft=[0.05, 0.05 + node, 0.05 + 2 * node])) == width


def test_without_the_hook_the_roots_children_stand_for_all():
    cheap = costs(draft=[0.05] * 2)
    for scores, grows in (([[0.9, 0.05]], True), ([[0.06, 0.02]], False)):
        policy = priced(AutoPolicy((2, 3), 8), 2.0)
        for _ in range(3):
            assert bool(grow(policy, torch.tensor(scores), cheap)) is grows
            policy.rerank(torch.tensor(scores), cheap)


def test_no_layer_is_grown_where_copies_promise_the_same_for_nothing():
    scores, cheap = torch.tensor([[0.9, 0.05]]), costs(draft=[0.05] * 2)
    copied = torch.tensor([[0.9, 0.85, 0.8, 0.75, 0.05, 0.0, 0.0]])
    for left, grows in (([[0.9 * 0.04, 0.05]], False), ([[0.9, 0.05]], True)):
        policy = priced(AutoPolicy((2, 8), 8), 2.0)
        for _ in range(2):  # what is copied tells nothing of what the draft will propose
            assert bool(grow(policy, scores, cheap))
            policy.rerank(scores, cheap)
        policy.stand(copied, torch.tensor(left))
        assert bool(grow(policy, scores, cheap)) is grows
        policy.rerank(copied, cheap)
        assert bool(grow(policy, scores, cheap))  # the next step has no copies


def test_a_copy_is_looked_for_while_it_is_worth_a_row_in_the_mean():
    stairs = costs(verify=[1.0, 1.0, 1.3, 1.3, 1.7])
    policy = priced(AutoPolicy((2, 5), 8), 2.0)
    assert policy.least_score(1, stairs) == pytest.approx(2.0 * 0.7 / 4)
    assert policy.least_score(1, costs()) == LEAST_CUT  # where rows cost nothing


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


def test_equal_histories_give_equal_decisions():
    results = [
        run(AutoPolicy(SIZES, LAYERS), Text(4, 1), make_costs("stairs", 4), 4, 60, Acceptance())
        for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


# --- Plain decoding as a candidate ---


def test_a_passing_dip_does_not_stop_speculation():
    policy, step_costs = AutoPolicy(SIZES, LAYERS), make_costs("memory", 1)
    plain = []
    for step in range(1, 1501):
        if not policy.speculate(1, step_costs):
            plain.append(step)
        policy.observe(1, 2.0 if (step - 1) % 30 < 20 else 0.0, 1.5)
    # It decodes plainly in its turns alone. They lose a third of a pass or more.
    assert 1500 / 200 < len(plain) < 1500 / 90


def test_a_plain_step_takes_its_row_and_what_it_takes_beyond():
    for overhead, stays in ((0.0, False), (0.6, True)):
        step_costs = make_costs("memory", 8)._replace(plain_overhead=overhead)
        policy = AutoPolicy(SIZES, LAYERS)
        decisions = []
        for _ in range(200):
            decisions.append(policy.speculate(8, step_costs))
            if decisions[-1]:
                policy.observe(8, 0.5, 2.0)  # 1.5 tokens in 2 passes: 0.75 of 1 / (1 + overhead)
        assert decisions[-1] is stays
        assert (sum(decisions) >= 195) is stays


def test_plain_decoding_is_tried_the_more_often_the_less_that_loses():
    tries = []
    for tokens in (1.6, 1.8, 4.0):
        policy, step_costs = AutoPolicy(SIZES, LAYERS), make_costs("memory", 8, plain=1.0)
        decisions = []
        for _ in range(3000):
            decisions.append(policy.speculate(8, step_costs))
            if decisions[-1]:
                policy.observe(8, tokens - 1.0, 1.5)
        times = np.where(decisions[1000:], 1.5, 1.0)
        served = np.where(decisions[1000:], tokens, 1.0).sum()
        # A turn of plain decoding costs a share of the time, turns of trees none here.
        assert times.sum() < 1.0025 * served * 1.5 / tokens
        tries.append(2000 - sum(decisions[1000:]))
    most = 2000 * PLAIN_STEPS / PLAIN_AFTER
    assert most / 3 < tries[0] <= most and tries[0] > tries[1] > tries[2] > 0


def test_a_try_is_saved_for_with_what_the_draft_has_to_catch_up_on():
    step_costs, waits = make_costs("compute", 4), []
    for catch_up in (0.0, 1.0):
        policy, behind, lost, tries = AutoPolicy(SIZES, LAYERS), 0.0, 0.0, []
        for step in range(4000):
            if policy.speculate(4, step_costs, catch_up=behind):
                policy.observe(4, 0.0, 1.5)
                if step >= 2000:
                    lost += 1.5 + behind - plain_units(step_costs)
                    tries.append(step)
                behind = 0.0
            else:
                behind = catch_up
        waits.append(np.diff(tries).mean())
        assert lost <= 1.2 * 0.01 * 2000 * plain_units(step_costs)
    assert waits[1] > 1.5 * waits[0]


def test_plain_steps_until_the_next_try_are_known():
    """Whether requests want drafts in them or not."""
    step_costs = make_costs("compute", 4)
    for wants_drafts in (True, False):
        policy = AutoPolicy(SIZES, LAYERS)
        assert policy.plain_steps(4) == 0  # nothing is known
        while not (policy.state() and policy.state()[0]["is_plain"]):
            assert policy.plain_steps(4) == 0
            if policy.speculate(4, step_costs):  # else it is plain decoding's turn
                policy.observe(4, 0.0, 1.5)
        left = policy.plain_steps(4)
        assert left > 5 and policy.plain_steps(1) == 0 and policy.plain_steps(3) == left
        for _ in range(left):
            if wants_drafts:
                assert not policy.speculate(4, step_costs)
            else:
                assert not policy.speculate(4, step_costs, wants_drafts=False)
        assert policy.plain_steps(4) == 0
        if not wants_drafts:
            # The try waits for a request that wants drafts.
            assert not policy.speculate(4, step_costs, wants_drafts=False)
        assert policy.speculate(4, step_costs)


@pytest.mark.parametrize("prefill_units", [0.0, 0.3])
def test_what_the_drafts_prefill_takes_counts_against_speculation(prefill_units):
    """Drafts that gain less than that are given up, as if plain decoding took so much less."""
    step_costs = make_costs("compute", 4)
    policy = AutoPolicy(SIZES, LAYERS)
    time_units = 2.0 * (plain_units(step_costs) - 0.15)  # for two tokens
    decisions = []
    for _ in range(400):
        decisions.append(policy.speculate(4, step_costs, prefill=Prefill(prefill_units)))
        if decisions[-1]:
            policy.observe(4, 1.0, time_units)
    tries = sum(decisions[-100:])
    assert tries < 20 if prefill_units else tries > 90
    # Which tree is best does not depend on what is behind.
    rate = 2.0 / time_units
    assert policy.price(4) == pytest.approx(rate, rel=0.05)


def test_a_long_prompt_before_a_short_answer_does_not_stop_speculation_for_long():
    """The next requests have other prompts."""
    step_costs = make_costs("compute", 4)
    policy = AutoPolicy(SIZES, LAYERS)
    while policy.plain_steps(4) == 0:
        if policy.speculate(4, step_costs, prefill=Prefill(50.0)):
            policy.observe(4, 2.0, 1.5)
    waits = 0
    while not policy.speculate(4, step_costs):
        waits += 1
    assert waits < 200
    policy.observe(4, 2.0, 1.5)
    assert all(policy.speculate(4, step_costs) for _ in range(10))


def test_a_try_waits_for_prompts_that_the_draft_has_seen():
    """The account covers their prefill, and no request runs that the draft does not know."""
    step_costs = make_costs("compute", 4)

    def waits(prefill):
        policy = AutoPolicy(SIZES, LAYERS)
        while policy.plain_steps(4) == 0:
            if policy.speculate(4, step_costs):
                policy.observe(4, 0.0, 2.0)
        steps = policy.plain_steps(4)
        policy.speculate(4, step_costs, prefill=prefill)
        told, count = policy.plain_steps(4), 1
        while count < 2000 and not policy.speculate(4, step_costs, prefill=prefill):
            count += 1
        return steps, told, count

    steps, told, count = waits(Prefill())
    assert 0 <= count - steps <= 1 and told == steps - 1
    _, told, count = waits(Prefill(4.0, answer_tokens=1e6))
    plain = plain_units(step_costs)
    assert told == pytest.approx(steps + 4.0 / (0.01 * plain), abs=2)
    assert 0 <= count - steps <= 1  # these requests have theirs
    *_, count = waits(Prefill(num_left_out=1))
    assert count == 2000


def test_each_batch_size_decides_for_itself():
    policy = AutoPolicy(SIZES, LAYERS)
    small, large = make_costs("compute", 1), make_costs("compute", 32)
    drafted = 0
    for _ in range(200):
        if policy.speculate(32, large):
            policy.observe(32, 0.1, 2.0)
        drafted += policy.speculate(1, small)
        policy.observe(1, 2.0, 1.5)
    assert drafted >= 197  # but for turns of plain decoding
    assert policy.price(1) == pytest.approx(2.0, rel=0.05)
    state = json.loads(json.dumps(policy.state()))
    assert [row["batch_sizes"] for row in state] == [[1, 1], [17, 32]]
    assert [row["is_plain"] for row in state] == [False, True]
    assert state[0]["price"] == policy.price(1)


def test_sizes_are_those_of_the_simulator():
    assert SIZES == tuple(range(2, TOKENS + 1)) and TOPK == 8


# --- Turns of other trees ---


def grown(policy, batch_size=4, step_costs=None, topk=TOPK):
    """Grow a tree whose draft is always sure; return layers, widths and rows."""
    step_costs = make_costs("memory", batch_size) if step_costs is None else step_costs
    drafts = policy.speculate(batch_size, step_costs)
    if not drafts:
        return (0, (), 1)
    scores = torch.full((batch_size, topk), 0.9)
    widths, num_nodes = [], topk
    while True:
        width = policy.breadth(scores, step_costs)
        if not policy.deepen():
            break
        widths.append(width)
        num_nodes += width * topk
        policy.expanded(scores, torch.full((batch_size * width, topk), 0.5))
    return (
        len(widths) + 1,
        tuple(widths),
        policy.rerank(scores.repeat(1, num_nodes // topk), step_costs),
    )


def test_other_trees_get_their_turn():
    policy = AutoPolicy(SIZES, LAYERS)
    seen = [grown(policy) for _ in range(2 * FIRST)]
    turns = seen[FIRST - 1 + PLAIN_STEPS :]
    assert seen[FIRST - 1 : FIRST - 1 + PLAIN_STEPS] == [(0, (), 1)] * PLAIN_STEPS
    assert turns[0] == turns[4] == (3, (1, 1), 4)
    assert turns[2] == turns[6] == (5, (4, 4, 4, 4), 8)
    own = turns[1]
    assert own not in ((3, (1, 1), 4), (5, (4, 4, 4, 4), 8))


@pytest.mark.parametrize(
    ("sizes", "layers", "topk", "expected"),
    [
        ((2, 3), 2, 2, (2, (1,), 3)),  # no room for more
        ((2, 6, 8), 8, 8, (3, (1, 1), 6)),  # the next size that is allowed
        ((2,), 1, 8, (1, (), 2)),
    ],
)
def test_a_turn_stays_within_the_envelope(sizes, layers, topk, expected):
    policy = AutoPolicy(sizes, layers)
    seen = [grown(policy, topk=topk) for _ in range(2 * FIRST)]
    assert seen[FIRST - 1 + PLAIN_STEPS] == expected


# --- What outlives the policy ---


def test_what_drawn_requests_verify_comes_from_earlier_steps():
    policy, step_costs = AutoPolicy(SIZES, LAYERS), costs(verify=[1.0 + 0.1 * n for n in range(64)])
    policy.speculate(1, step_costs)
    # At first the price of a row, here a tenth of a pass, and any number of nodes.
    cut, num_rows = policy.settlement(1, step_costs, True)
    assert cut == pytest.approx(0.1 * policy.price(1)) and num_rows == max(SIZES)
    policy.learn_settlement(1, 0.3, 6)
    assert policy.settlement(1, step_costs, True) == (pytest.approx(0.3), 6)
    for _ in range(20 * HALF_LIFE):
        policy.learn_settlement(1, 0.05, 9)
    assert policy.settlement(1, step_costs, True) == (pytest.approx(0.05, rel=1e-3), 9)
    assert policy.settlement(1, step_costs, False)[1] == max(SIZES)
    # A score that is none changes nothing, and other batch sizes have their own.
    policy.learn_settlement(1, float("nan"), 3)
    policy.learn_settlement(8, 0.7, 2)
    assert policy.settlement(1, step_costs, True) == (pytest.approx(0.05, rel=1e-3), 9)


def test_in_a_turn_drawn_requests_have_its_rows_and_teach_nothing():
    policy, step_costs = AutoPolicy(SIZES, LAYERS), costs(verify=[1.0] * TOKENS)
    policy.learn_settlement(1, 0.3, 12)
    for _ in range(FIRST + PLAIN_STEPS):  # plain decoding comes first
        policy.speculate(1, step_costs)
    assert policy.settlement(1, step_costs, True) == (pytest.approx(0.3), DEFAULT_SHAPES[0][2])
    policy.learn_settlement(1, 0.9, 2)
    policy.speculate(1, step_costs)
    assert policy.settlement(1, step_costs, True) == (pytest.approx(0.3), 12)


def test_a_policy_goes_on_where_another_was():
    first, second = AutoPolicy(SIZES, LAYERS), AutoPolicy(SIZES, LAYERS)
    costs = make_costs("compute", 32)
    for _ in range(100):
        first.observe(1, 2.0, 1.5)
        if first.speculate(32, costs):
            first.observe(32, 0.1, 2.0)
    second.load_state(json.loads(json.dumps(first.state())))
    for ours, theirs in zip(second.state(), first.state(), strict=True):
        # Plain decoding is a candidate from the first step on.
        assert {**ours, "price": None} == {**theirs, "price": None}
    assert second.price(1) == pytest.approx(2.0, rel=0.05)
    assert not second.speculate(32, costs)  # decoded plainly there
    first.observe(1, 5.0, 1.5)
    second.observe(1, 5.0, 1.5)
    assert second.price(1) == first.price(1)


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": -1.0},
        {"units": 0.0},
        {"steps": float("nan")},
        {"account": float("inf")},
        {"turn": -1},
        {"batch_sizes": []},
        {"is_plain": None, "tokens": "many"},
    ],
)
def test_a_damaged_state_changes_nothing(damage):
    policy = AutoPolicy(SIZES, LAYERS)
    policy.observe(1, 2.0, 1.5)
    before = policy.state()
    for state in ([{**before[0], **damage}], [{}], 3, "text"):
        with pytest.raises(ValueError, match="prices: "):
            policy.load_state(state)
    assert policy.state() == before
