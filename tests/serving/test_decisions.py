"""The decisions of a step: who is asked, what is tried, and which sizes can run."""

import numpy as np
import pytest
import torch

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.policy.auto import KEEP_UP_SHARE, AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.serving.decisions import Decisions
from tests.support import policies

BATCH, TOPK, CAPACITY = 2, 4, 8
SCORES = torch.tensor([[0.9, 0.5, 0.3, 0.2, 0.1, 0.05], [0.8, 0.4, 0.2, 0.1, 0.1, 0.05]])


class Fixed(TreePolicy):
    """Answers what it is made with, and keeps what it is asked."""

    def __init__(self, width=2, num_layers=3, size=4, drafts=True, shared=None):
        self.width, self.num_layers, self.size, self.drafts = width, num_layers, size, drafts
        self.shared, self.asked = shared, []

    def speculate(self, batch_size, costs, plain_extra=0.0, catch_up=0.0):
        self.asked.append(("speculate", catch_up))
        return self.drafts

    def plain_loss(self, batch_size):
        return 0.125

    def weigh(self, weights):
        self.asked.append(("weigh", weights))

    def expect(self, answer_tokens):
        self.asked.append(("expect", answer_tokens))

    def breadth(self, scores, costs):
        self.asked.append("breadth")
        return self.width

    def deepen(self):
        return self.asked.count("breadth") < self.num_layers

    def depth(self, num_layers, costs):
        return num_layers - 1

    def share_out(self, scores, costs):
        return self.shared

    def rerank(self, scores, costs):
        return self.size


class Tries:
    """Residuals that always try another size."""

    def __init__(self):
        self.asked = []

    def explore(self, operation, batch_size, chosen, sizes, costs):
        self.asked.append((operation, batch_size, chosen, tuple(sizes)))
        return max(sizes)

    def explore_plain(self, batch_size, loss):
        self.asked.append(("plain", batch_size, loss))
        return True


class Tables:
    """One set of costs, whatever is looked up."""

    def __init__(self):
        self.costs = policies.costs(draft=[0.1] * TOPK, extend=[0.5, 1.0])

    def step_costs(self, batch_size, context):
        return self.costs


def make(policy, residuals=None, has_costs=True, **options):
    defaults = {
        "verify_sizes": (2, 3, 4, 5, 6),
        "max_width": TOPK,
        "max_missing": CAPACITY,
        "is_ragged": False,
        "shares_out": False,
        "graph_sizes": None,
        "layer_costs": lambda costs: costs,
    }
    decisions = Decisions(policy, **defaults | options)
    if has_costs:
        decisions.use_costs(Tables(), Tables(), residuals)
    return decisions


def begin(decisions, weights=None, may_draft=True, missing=0, is_timed=False):
    decisions.look_up(BATCH, 100.0, weights, None)
    return decisions.begin_step(BATCH, may_draft, missing, is_timed)


def test_a_step_without_costs_drafts_where_it_may():
    decisions = make(Fixed(drafts=False), has_costs=False)
    assert begin(decisions) == (True, 0.0)
    assert begin(decisions, may_draft=False, missing=3) == (False, 0.0)
    assert decisions.table is decisions.costs is None


def test_requests_are_shown_to_the_policy():
    policy, weights = Fixed(), np.array([0.0, 1.0])
    decisions = make(policy)
    decisions.look_up(BATCH, 100.0, weights, 40.0)
    assert policy.asked == [("expect", 40.0), ("weigh", weights)]
    assert decisions.weights is weights and decisions.costs is not None


def test_catching_up_is_paid_by_drafting():
    policy = Fixed()
    plan = begin(make(policy), missing=2)
    assert plan == (True, 1.0) and policy.asked[-1] == ("speculate", 1.0)
    # Nobody wants drafts, so the policy is not asked and the draft stays behind.
    policy = Fixed()
    assert begin(make(policy), may_draft=False, missing=2) == (False, 0.0)
    assert ("speculate", 1.0) not in policy.asked


def test_a_full_backlog_is_worked_off_where_that_is_cheap():
    decisions = make(Fixed(drafts=False))
    decisions.look_up(BATCH, 100.0, None, None)
    cheap = KEEP_UP_SHARE * CAPACITY
    for extend, is_due in ((cheap / 2, True), (2 * cheap, False)):
        decisions.costs = policies.costs(draft=[0.1] * TOPK, extend=[extend] * CAPACITY)
        plan = decisions.begin_step(BATCH, True, CAPACITY, False)
        assert plan == (False, pytest.approx(extend) if is_due else 0.0)
        assert decisions.begin_step(BATCH, True, CAPACITY - 1, False).catch_up == 0.0


def test_plain_steps_are_tried_where_times_are_taken():
    residuals = Tries()
    decisions = make(Fixed(), residuals)
    assert begin(decisions, is_timed=False).drafts and residuals.asked == []
    assert not begin(decisions, is_timed=True).drafts
    assert residuals.asked == [("plain", BATCH, 0.125)]


def test_widths_until_the_policy_stops():
    decisions = make(Fixed(width=2, num_layers=3))
    begin(decisions)
    assert [decisions.width(SCORES) for _ in range(3)] == [2, 2, None]
    assert decisions.depth(3) == 2 and decisions.seconds > 0.0
    begin(decisions)
    assert decisions.seconds == 0.0


def test_other_widths_are_tried_in_the_first_layer_alone():
    residuals = Tries()
    decisions = make(Fixed(width=2, num_layers=3), residuals)
    begin(decisions, may_draft=False, is_timed=True)
    assert [decisions.width(SCORES) for _ in range(3)] == [TOPK, 2, None]
    assert residuals.asked == [("draft", BATCH, 2, (1, 2, 3, 4))]


@pytest.mark.parametrize(("size", "expected"), [(4, 4), (9, 7)])
def test_no_more_rows_than_nodes(size, expected):
    decisions = make(Fixed(size=size))
    begin(decisions)
    assert decisions.rows(SCORES) == (expected, None)


def test_rows_are_fitted_to_graphs():
    decisions = make(Fixed(size=4), graph_sizes=GraphSizes({4: (2, 6)}))
    begin(decisions)
    assert decisions.rows(SCORES) == (6, None)
    assert decisions.rows(SCORES[:, :3]) == (2, None)  # 4 rows there are, and no graph between


def test_other_rows_are_tried_among_those_there_are_nodes_for():
    residuals = Tries()
    decisions = make(Fixed(size=3), residuals)
    begin(decisions, may_draft=False, is_timed=True)
    assert decisions.rows(SCORES[:, :3]) == (4, None)
    assert residuals.asked == [("verify", BATCH, 3, (2, 3, 4))]


def test_requests_without_drafts_verify_their_root_alone():
    weights = np.array([0.0, 1.0])
    decisions = make(Fixed(size=4), is_ragged=True)
    begin(decisions, weights)
    size, num_rows = decisions.rows(SCORES)
    assert size == 4 and num_rows.tolist() == [1, 4]
    # Where all requests run equal numbers of rows, there is nothing to be told apart.
    decisions = make(Fixed(size=4))
    begin(decisions, weights)
    assert decisions.rows(SCORES) == (4, None)


def test_a_shared_budget_is_taken_as_it_is():
    decisions = make(Fixed(shared=np.array([2, 5])), is_ragged=True, shares_out=True)
    begin(decisions)
    size, num_rows = decisions.rows(SCORES)
    assert size == 5 and num_rows.tolist() == [2, 5]
    decisions = make(Fixed(shared=np.array([3, 3])), is_ragged=True, shares_out=True)
    begin(decisions)
    assert decisions.rows(SCORES) == (3, None)


def test_the_price_is_that_of_a_policy_with_one():
    assert make(Fixed()).price(BATCH) is None
    decisions = make(AutoPolicy((2, 3, 4), 4))
    before = decisions.price(BATCH)
    for _ in range(100):
        decisions.end_step(BATCH, accepted_mean=3.0, time_units=2.0)
    assert before < decisions.price(BATCH) == pytest.approx(2.0, rel=0.05)
