"""What a step asks a policy: in which order, with which arguments, and what is asked by default."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from cast_sglang.config import REPLAYED_POLICIES
from cast_sglang.costs.model import StepCosts
from cast_sglang.policy.base import Costs, TreePolicy
from cast_sglang.policy.turns import Shape
from cast_sglang.trace.fixed_trees import FixedTree
from cast_sglang.trace.replay import Replay, make_policy
from tests.support.simulator import LAYERS, TOPK
from tests.support.traces import Recorder, make_header, make_tables

DECISIONS = ("breadth", "deepen", "rerank")


class Least(TreePolicy):
    """The three decisions that a policy must take, and nothing else."""

    layers = 1

    def breadth(self, scores, costs):
        return 2

    def deepen(self):
        self.layers = self.layers % 3 + 1
        return self.layers > 1

    def rerank(self, scores, costs):
        return 5


class Watched(Least):
    """Notes each question, and checks what is promised of its arguments."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name in vars(TreePolicy) and not name.startswith("_"):
            self.calls.append(name)
        return super().__getattribute__(name)

    def breadth(self, scores, costs):
        assert scores.shape == (2, TOPK) and scores.dtype == torch.float32
        assert (scores.diff(dim=1) <= 0).all() and len(costs.draft) == TOPK
        return super().breadth(scores, costs)

    def expanded(self, parent_scores, child_probs):
        assert parent_scores.shape[0] == 2 and parent_scores.shape[1] >= 2
        assert child_probs.shape == (2 * 2, TOPK) and child_probs.dtype == torch.float32

    def rerank(self, scores, costs):
        assert len(scores) == 2 and (scores.diff(dim=1) <= 0).all()
        return super().rerank(scores, costs)

    def observe(self, batch_size, accepted_mean, time_units):
        assert batch_size == 2 and 0.0 <= accepted_mean <= LAYERS and time_units > 1.0


@pytest.fixture(scope="module")
def trace():
    return Recorder(make_policy("eagle", make_header(None)), make_tables()).run(5)


@pytest.mark.parametrize("missing", DECISIONS)
def test_a_policy_takes_three_decisions(missing):
    decisions = {name: vars(Least)[name] for name in DECISIONS if name != missing}
    with pytest.raises(TypeError, match=f"abstract method '?{missing}"):
        type("Lacking", (TreePolicy,), decisions)()
    type("Whole", (TreePolicy,), {**decisions, missing: vars(Least)[missing]})()


def test_by_default_every_step_drafts_and_keeps_its_whole_tree(trace):
    policy = Least()
    policy.weigh(np.ones(2))
    assert policy.speculate(2, None, catch_up=math.inf)
    assert policy.share_out(torch.ones(2, 3), None) is None
    for outcome in Replay(trace, make_tables(), policy):
        choice = outcome.choice
        assert (choice.widths, choice.num_layers, choice.num_rows) == ([2, 2], 3, [5, 5])


@pytest.mark.parametrize("shares_out", [False, True])
def test_a_step_asks_in_the_promised_order(trace, shares_out):
    policy = Watched()
    header = make_header(make_tables(), is_ragged=True, shares_out=shares_out)
    list(Replay(trace._replace(header=header), make_tables(), policy))
    # The last layer is not deepened, so nothing was expanded below it.
    last = "share_out rerank" if shares_out else "rerank"
    first = "weigh speculate"
    step = f"{first} (breadth deepen expanded )*breadth deepen {last} observe ?"
    assert re.fullmatch(f"({step})+", " ".join(policy.calls))
    assert policy.calls.count("observe") == len(trace.steps)
    assert policy.calls.count("expanded") == 2 * len(trace.steps)


@pytest.mark.parametrize("name", [*REPLAYED_POLICIES, "fixed tree"])
def test_every_policy_takes_the_arguments_of_the_interface(name):
    header = make_header(None)
    policy = FixedTree(Shape(2, 2, 4)) if name == "fixed tree" else make_policy(name, header)
    assert isinstance(policy, TreePolicy)
    for question, ours in inspect.getmembers(TreePolicy, inspect.isfunction):
        asked = inspect.signature(ours).parameters
        theirs = inspect.signature(getattr(type(policy), question)).parameters
        assert list(theirs) == list(asked), question


def test_the_costs_of_a_step_have_every_name_that_policies_read():
    names = {name for name, of in vars(Costs).items() if isinstance(of, property)}
    assert names <= set(StepCosts._fields) and len(names) == 5
    arrays = {
        name for name in names if StepCosts.__annotations__[name] in (np.ndarray, "np.ndarray")
    }
    assert arrays == {"draft", "verify", "draft_extend"}
