"""What surrounds a policy in a step: catching up, graph sizes, room, and other sizes tried."""

import math

import numpy as np
import pytest
import torch

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.policy.base import NO_PREFILL, TreePolicy
from cast_sglang.policy.decider import Decider, PromptFacts, StepFacts
from tests.support.policies import costs

TOPK, MOST = 4, 12
SIZES = tuple(range(2, MOST + 1))


class Scripted(TreePolicy):
    """A policy that gives preset answers and records its calls."""

    def __init__(self, drafts=True, widths=(2, 3), size=6, shares=None) -> None:
        self.drafts, self.widths, self.size, self.shares = drafts, widths, size, shares
        self.asked: list[tuple] = []
        self._layer = 0

    def speculate(self, batch_size, costs, catch_up=0.0, prefill=NO_PREFILL, wants_drafts=True):
        self.asked.append(("speculate" if wants_drafts else "wait", batch_size, catch_up))
        self.prefill = prefill
        return self.drafts

    def plain_steps(self, batch_size):
        return batch_size

    def weigh(self, weights):
        self._layer = 0
        self.asked.append(("weigh", None if weights is None else weights.tolist()))

    def breadth(self, scores, costs):
        return self.widths[min(self._layer, len(self.widths) - 1)]

    def deepen(self):
        self._layer += 1
        return self._layer <= len(self.widths)

    def share_out(self, scores, costs):
        return self.shares

    def rerank(self, scores, costs):
        return self.size

    def settlement(self, batch_size, costs, is_even):
        return 0.35, 7 if is_even else MOST

    def learn_settlement(self, batch_size, score, num_rows):
        self.asked.append(("learn", batch_size, round(score, 3), num_rows))

    def observe(self, batch_size, accepted_mean, time_units):
        self.asked.append(("observe", batch_size, accepted_mean, time_units))


def decider(policy: TreePolicy, **changes) -> Decider:
    return Decider(policy, **{"max_missing": MOST, "topk": TOPK, **changes})


def facts(**changes) -> StepFacts:
    values = {
        "batch_size": 2,
        "costs": costs(extend=[0.5, 0.6, 0.7]),
        "weights": None,
        "missing_rows": 0,
        "max_layers": 5,
        "max_rows": MOST,
    }
    return StepFacts(**{**values, **changes})


def scores(nodes: int, batch: int = 2) -> torch.Tensor:
    return torch.linspace(1.0, 0.1, nodes).repeat(batch, 1)


def grown(made: Decider) -> list[int]:
    """Return the widths of a whole tree."""
    widths = []
    while (width := made.width(scores(TOPK))) is not None:
        widths.append(width)
    return widths


def test_a_step_is_decided_by_the_policy():
    policy = Scripted()
    made = decider(policy)
    assert made.begin_step(facts()) == (True, 0.0)
    assert grown(made) == [2, 3]
    assert made.rows(scores(MOST - 1)) == (6, None)
    made.end_step(2, 1.5, 3.0)
    assert policy.asked == [
        ("weigh", None),
        ("speculate", 2, 0.0),
        ("observe", 2, 1.5, 3.0),
    ]
    assert made.seconds > 0.0


@pytest.mark.parametrize(
    "room", [{"max_layers": 0}, {"max_rows": 1}, {"weights": np.zeros(2)}], ids=str
)
def test_nothing_is_drafted_where_nobody_can_take_it(room):
    assert not decider(Scripted()).begin_step(facts(**room)).drafts
    assert not decider(Scripted()).begin_step(facts(costs=None, **room)).drafts


def test_a_step_for_which_nobody_wants_drafts_is_told_the_policy_apart():
    policy = Scripted()
    made = decider(policy)
    for weights, asked in ((np.zeros(2), ["wait"]), (np.ones(2), ["speculate"])):
        policy.asked.clear()
        made.begin_step(facts(weights=weights))
        assert [name for name, *_ in policy.asked if name != "weigh"] == asked
    policy.asked.clear()
    made.begin_step(facts(weights=np.zeros(2), costs=None))
    assert [name for name, *_ in policy.asked] == ["weigh"]
    assert made.plain_steps(3) == 3
    # A row of draft extend adds 0.1 units in the mean.
    made.begin_step(facts(prompts=PromptFacts(prompt_rows=4.0, answer_tokens=8.0, num_left_out=1)))
    assert policy.prefill == (pytest.approx(0.4), 8.0, 1)
    measured = PromptFacts(prompt_rows=4.0, prompt_row_us=facts().costs.unit_us / 20)
    made.begin_step(facts(batch_size=2, prompts=measured))  # a row is run for both requests
    assert policy.prefill == (pytest.approx(4 * 2 / 20), 1.0, 0)


def test_a_policy_without_costs_drafts():
    made = decider(Scripted(drafts=False))
    assert made.begin_step(facts(costs=None)) == (True, 0.0)
    assert grown(made) == [2, 3] and made.rows(scores(11)) == (6, None)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_tree_has_no_more_layers_than_there_is_room_for(layers):
    made = decider(Scripted(widths=(1,) * 9))
    made.begin_step(facts(max_layers=layers))
    assert len(grown(made)) == layers - 1


@pytest.mark.parametrize(
    ("nodes", "widths"), [(1, [1]), (3, [2, 1]), (5, [2, 3]), (7, [2, 3, 2]), (9, [2, 3, 3, 1])]
)
def test_a_tree_has_no_more_nodes_than_there_are_slots(nodes, widths):
    made = decider(Scripted(widths=(2, 3, 3, 3)))
    made.begin_step(facts(max_nodes=nodes))
    assert grown(made) == widths


@pytest.mark.parametrize(
    ("sizes", "batch_size", "widths"),
    [((2, 4), 2, [4, 2]), ((4,), 2, [4]), ((4,), 9, [3, 3, 1]), ((1, 3, 4), 1, [3, 3, 1])],
)
def test_the_last_slots_are_left_where_no_graph_fits_them(sizes, batch_size, widths):
    """But for a batch beyond the graphs, whose layers run without."""
    made = decider(Scripted(widths=(3, 3, 3, 3)), width_graphs=GraphSizes({4: sizes}))
    made.begin_step(facts(max_nodes=7, batch_size=batch_size))
    assert grown(made) == widths


def test_the_draft_catches_up_before_it_drafts_and_while_it_is_cheap():
    extend = [0.5, 0.6, 0.7]
    made = decider(Scripted())
    assert made.begin_step(facts(missing_rows=3)) == (True, pytest.approx(0.7))
    stays = decider(Scripted(drafts=False))
    assert stays.begin_step(facts(missing_rows=3)) == (False, 0.0)
    # Twelve rows take 0.7 + 9 * 0.1 units: more than a hundredth of twelve plain steps.
    assert stays.begin_step(facts(missing_rows=MOST)) == (False, 0.0)
    cheap = facts(missing_rows=MOST, costs=costs(extend=[value / 20 for value in extend]))
    assert stays.begin_step(cheap) == (False, pytest.approx(1.6 / 20))


def test_the_draft_keeps_up_where_later_turns_would_pay_for_what_it_misses():
    """By the share of tokens that are found again, and of steps that draft."""
    # Any number of rows takes a twentieth of a plain step.
    cheap = costs(extend=[0.05] * 3)

    def kept_up(made: Decider, reuse: float) -> list[bool]:
        """Return of each number of missing rows whether the draft takes them."""
        rows = range(1, MOST)
        asked = [
            facts(missing_rows=count, prompts=PromptFacts(reuse=reuse), costs=cheap)
            for count in rows
        ]
        return [made.begin_step(each).catch_up > 0.0 for each in asked]

    policy = Scripted()
    drafted = decider(policy)
    for _ in range(8_000):
        drafted.begin_step(facts())
    policy.drafts = False
    # 0.05 steps are less than 0.03 * 0.5 of each of four steps, and of each of two where all is
    # found again.
    assert kept_up(drafted, reuse=0.5) == [False] * 3 + [True] * (MOST - 4)
    assert kept_up(drafted, reuse=1.0) == [False] + [True] * (MOST - 2)
    assert not any(kept_up(drafted, reuse=0.0))
    assert not any(kept_up(decider(policy), reuse=1.0))  # no later turn would draft


def test_without_costs_the_draft_takes_what_would_be_lost():
    made = decider(Scripted())
    for rows, takes in ((0, False), (MOST - 1, False), (MOST, True)):
        plan = made.begin_step(facts(costs=None, missing_rows=rows, weights=np.zeros(2)))
        assert not plan.drafts and math.isnan(plan.catch_up) == takes
        assert takes or plan.catch_up == 0.0


def test_sizes_with_a_graph_run():
    made = decider(
        Scripted(size=6),
        verify_graphs=GraphSizes({1: (2, 3), 4: (5, 9)}),
        width_graphs=GraphSizes({4: (3, 4)}),
    )
    made.begin_step(facts())
    assert grown(made) == [3, 3]
    assert made.rows(scores(11)) == (9, None)
    assert made.rows(scores(7)) == (5, None)  # there are no nodes for nine rows
    assert made.rows(scores(3)) == (4, None)  # nor for five
    made.begin_step(facts(batch_size=9))  # beyond the captured batch sizes
    assert grown(made) == [2, 3] and made.rows(scores(11, batch=9)) == (6, None)


def test_rows_are_shared_out_where_requests_may_differ():
    policy = Scripted(shares=np.array([5, 2]))
    made = decider(policy, is_ragged=True, shares_out=True)
    made.begin_step(facts())
    size, rows = made.rows(scores(11))
    assert size == 5 and rows.tolist() == [5, 2]


def test_who_wants_no_drafts_has_its_root_alone():
    weighted = facts(weights=np.array([1.0, 0.0]))
    made = decider(Scripted(), is_ragged=True)
    made.begin_step(weighted)
    size, rows = made.rows(scores(11))
    assert size == 6 and rows.tolist() == [6, 1]
    even = decider(Scripted())  # all requests have the same number of rows there
    even.begin_step(weighted)
    assert even.rows(scores(11)) == (6, None)


def settled(limit: float) -> torch.Tensor:
    found = scores(10)
    return found.masked_fill(found < limit, 0.0)


def test_a_drawn_request_verifies_what_earlier_steps_settled():
    policy = Scripted(size=6)
    made = decider(policy, is_ragged=True)
    made.begin_step(facts(is_drawn=np.array([True, False])))
    assert made.settlement() == (0.35, MOST - 1)
    size, rows = made.rows(scores(10), settled(0.35))
    assert size == 8 and rows.tolist() == [8, 6]
    # The fifth of ten scores from 1.0 to 0.1, the last one of six rows; for the next step.
    assert policy.asked[-1] == ("learn", 2, 0.6, 6)
    # Nothing reaches the limit: the root alone, in a tree of the least size.
    size, rows = made.rows(scores(10), settled(1.5))
    assert size == 6 and rows.tolist() == [1, 6]
    made.begin_step(facts(is_drawn=np.array([True, True])))
    size, rows = made.rows(scores(10), settled(1.5))
    assert size == 2 and rows.tolist() == [1, 1]


def test_places_without_a_node_settle_nothing():
    """Beside a request with copies a tree has places that a drawn request has no node for."""
    policy = Scripted(size=9)
    made = decider(policy, is_ragged=True)
    made.begin_step(facts(is_drawn=np.array([True, False])))
    ranked = scores(10)
    ranked[0, 4:] = 0.0
    made.rows(ranked, settled(0.35))
    kind, _, score, _ = policy.asked[-1]
    assert kind == "learn" and score == pytest.approx(float(ranked[0, 3]))


def test_where_all_have_equal_rows_a_drawn_request_stays_within_those_of_the_last_step():
    made = decider(Scripted(size=6), verify_graphs=GraphSizes({4: (7, 12)}))
    made.begin_step(facts(is_drawn=np.array([True, False])))
    assert made.settlement() == (0.35, 6)
    size, rows = made.rows(scores(11), settled(0.7))
    assert size == 7 and rows.tolist() == [5, 7]
    made.begin_step(facts())
    assert made.rows(scores(11)) == (7, None)


def test_who_wants_no_drafts_has_its_root_alone_beside_drawn_requests():
    made = decider(Scripted(size=6), is_ragged=True)
    made.begin_step(facts(weights=np.array([1.0, 0.0]), is_drawn=np.array([True, False])))
    assert made.rows(scores(10), settled(0.35)).num_rows.tolist() == [8, 1]


def test_a_small_tree_is_verified_as_it_is():
    made = decider(Scripted(size=12))
    made.begin_step(facts())
    assert made.rows(scores(4)) == (5, None)


class Arrived:
    """Tensors that are on the host once they are waited for."""

    def __init__(self, *tensors):
        self.tensors, self.is_waited_for = tensors, False

    def wait(self):
        self.is_waited_for = True
        return self.tensors


class Planning(Scripted):
    """Plans chains of three layers."""

    def chain_layers(self, scores, costs, max_layers):
        self.asked.append(("chain", max_layers))
        return min(3, max_layers)

    def expanded(self, parent_scores, child_probs):
        self.asked.append(("expanded", parent_scores.item(), child_probs.item()))


@pytest.mark.parametrize(
    ("room", "nodes", "layers"), [(5, None, 3), (2, None, 2), (1, None, 1), (5, 9, 3), (2, 1, 2)]
)
def test_a_planned_chain_is_not_looked_at(room, nodes, layers):
    policy, unseen = Planning(size=2), None
    ours = decider(policy, topk=1, plans_chains=True)
    ours.begin_step(facts(batch_size=1, max_layers=room, max_nodes=nodes))
    assert ours.planned is None
    scores = torch.tensor([[0.5]])
    widths = [ours.width(scores)] + [ours.width(unseen) for _ in range(layers - 1)]
    assert widths == [1] * (layers - 1) + [None]
    assert policy.asked[2:] == [("chain", room)] * (room > 1)
    # What the layers were is learned when the rows are chosen, in their order.
    read = Arrived(*(torch.tensor([[0.1 * number]]) for number in range(1, 5)))
    ours.launched(read)
    assert not read.is_waited_for
    ours.rows(torch.tensor([[0.5, 0.2]]))
    seen = [call for call in policy.asked if call[0] == "expanded"]
    assert [tuple(round(part, 3) for part in call[1:]) for call in seen] == [(0.1, 0.2), (0.3, 0.4)]
    # The next step has a plan of its own.
    ours.begin_step(facts(batch_size=1, max_layers=room))
    assert ours.planned is None and ours.width(scores) == (1 if room > 1 else None)


def test_a_chain_is_planned_within_the_slots_that_there_are():
    policy = Planning(size=2)
    ours = decider(policy, topk=1, plans_chains=True)
    ours.begin_step(facts(batch_size=1, max_layers=5, max_nodes=1))
    scores = torch.tensor([[0.5]])
    assert [ours.width(scores), ours.width(scores)] == [1, None] and ours.planned == 2


def test_a_policy_without_plans_looks_at_each_layer():
    ours = decider(Scripted(widths=(1, 1)), topk=1, plans_chains=True)
    ours.begin_step(facts(batch_size=1))
    scores = torch.tensor([[0.5]])
    assert [ours.width(scores) for _ in range(3)] == [1, 1, None] and ours.planned is None


@pytest.mark.parametrize("is_worth", [True, False])
def test_where_nothing_was_drafted_the_root_alone_may_be_enough(is_worth):
    asked = []

    class Choosy(Scripted):
        def beats_plain(self, scores, costs, shares_out=False):
            asked.append((scores.shape, shares_out))
            return is_worth

    made = decider(Choosy(size=6), is_ragged=True, shares_out=True)
    made.begin_step(facts())
    assert made.rows_or_plain(scores(10)) == ((6, None) if is_worth else (1, None))
    assert asked == [((2, 10), True)]
