"""Fixed trees over a trace: the same tree in every step, as EAGLE-3 without CAST serves it."""

import numpy as np
import pytest
import torch

from cast_sglang.policy.turns import Shape
from cast_sglang.trace.fixed_trees import FIXED_TREES, FixedTree, fits, replay_tree
from cast_sglang.trace.records import unpacked
from cast_sglang.trace.replay import Replay, make_policy
from tests.support.simulator import LAYERS, TOKENS, TOPK
from tests.support.traces import Recorder, make_header, make_tables


@pytest.fixture(scope="module")
def tables():
    return make_tables()


@pytest.fixture(scope="module")
def full(tables):
    """A trace in which every step grew and verified the whole envelope."""
    trace = Recorder(make_policy("eagle", make_header(None)), tables, seed=3).run(20)
    return trace._replace(header=make_header(tables, is_full=True))


@pytest.mark.parametrize("shape", [Shape(1, 1, 2), Shape(3, 2, 4), Shape(5, 4, 8), Shape(2, 8, 3)])
def test_every_step_grows_and_verifies_the_shape(full, tables, shape):
    for outcome in replay_tree(full, tables, shape, rewards=False):
        choice = outcome.choice
        assert choice.num_layers == shape.num_steps
        assert choice.widths == [shape.topk] * (shape.num_steps - 1)
        assert choice.num_rows == [shape.num_draft_tokens] * 2


def test_the_whole_envelope_is_policy_eagle(full, tables):
    ours = replay_tree(full, tables, Shape(LAYERS, TOPK, TOKENS))
    theirs = Replay(full, tables, make_policy("eagle", full.header))
    for one, other in zip(ours, theirs, strict=True):
        assert one._replace(price=0.0) == other._replace(price=0.0)  # both have none: nan


@pytest.mark.parametrize("length", [1, 4, 8])
def test_a_chain_holds_the_first_child_of_each_node(full, tables, length):
    outcomes = list(replay_tree(full, tables, Shape(length, 1, length + 1), rewards=False))
    for step, outcome in zip(full.steps, outcomes, strict=True):
        accepted = []
        for request in step.requests:
            expanded = unpacked(request.expanded, "int32").tolist()
            node, steps = 0, 0
            while steps < length and node in request.follows:
                steps += 1
                # The best path of a full trace is expanded as far as the first child leads.
                node = TOPK * (1 + expanded.index(node)) if node in expanded else -1
            accepted.append(steps)
        known = outcome.accepted - outcome.assumed_accepted
        assert known == pytest.approx(np.mean(accepted))


def test_a_trees_size_is_bounded_by_its_candidates(full, tables):
    [outcome] = replay_tree(
        full._replace(steps=full.steps[:1]), tables, Shape(1, 2, 9), rewards=False
    )
    # What is not among the first two children ranks last, and is verified only to fill the rows.
    assert outcome.choice.num_rows == [9, 9]
    assert FixedTree(Shape(1, 2, 9)).rerank(torch.zeros(1, 2), None) == 3


def test_a_shape_fits_if_each_of_its_numbers_does():
    header = make_header(None, num_steps=3, topk=4, num_draft_tokens=16)
    assert fits(Shape(3, 4, 16), header) and fits(Shape(1, 1, 2), header)
    for beyond in (Shape(4, 4, 16), Shape(3, 5, 16), Shape(3, 4, 17)):
        assert not fits(beyond, header)


def test_the_common_trees_are_trees_and_differ():
    assert len(set(map(str, FIXED_TREES))) == len(FIXED_TREES)
    assert str(Shape(5, 4, 8)) == "5-4-8"  # as `--speculative-*` orders them
    for steps, topk, tokens in FIXED_TREES:
        candidates = topk + topk * topk * (steps - 1)
        # Deep enough to need every layer for its longest path, and no larger than what is drafted.
        assert steps < tokens <= candidates + 1
