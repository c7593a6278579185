"""Whose turn a step is: rounds of other trees that become rare."""

import math

import pytest

from cast_sglang.policy.turns import DEFAULT_SHAPES, FIRST, LONGEST, TIMES, Turns


def turns_of(num_steps):
    """Return the shape of each step that is a turn, by the number of the step."""
    turns = Turns()
    shapes = {step: turns.next() for step in range(1, num_steps + 1)}
    return {step: shape for step, shape in shapes.items() if shape is not None}


def test_the_first_round_tells_the_time_of_every_tree():
    turns = turns_of(2 * FIRST - 1)
    assert list(turns) == list(range(FIRST, FIRST + 2 * TIMES * len(DEFAULT_SHAPES), 2))
    shapes = list(turns.values())
    for shape in DEFAULT_SHAPES:
        assert shapes.count(shape) == TIMES
    assert all(one != other for one, other in zip(shapes, shapes[1:], strict=False))


def test_later_rounds_have_each_tree_once():
    turns = turns_of(4 * FIRST - 1)
    later = {step: shape for step, shape in turns.items() if step >= 2 * FIRST}
    assert later == {2 * FIRST + 2 * place: shape for place, shape in enumerate(DEFAULT_SHAPES)}


def test_rounds_become_rare_and_never_end():
    first = DEFAULT_SHAPES[0]
    turns = turns_of(4 * LONGEST + 1)
    begins = [step for step, shape in turns.items() if shape is first and step >= 2 * FIRST]
    doubling = [FIRST << round_ for round_ in range(1, int(math.log2(LONGEST / FIRST)) + 1)]
    assert begins == [*doubling, 2 * LONGEST, 3 * LONGEST, 4 * LONGEST]


def test_the_stated_bound_holds():
    steps = list(turns_of(5000))
    for n in range(FIRST, 5001):
        assert sum(step <= n for step in steps) <= 6 + 2 * math.log2(n / FIRST) + 2 * n / LONGEST


@pytest.mark.parametrize("step", [0, FIRST, 3 * FIRST, LONGEST - 1, LONGEST, 5 * LONGEST + 3])
def test_turns_go_on_where_an_earlier_server_was(step):
    whole = Turns()
    for _ in range(step):
        whole.next()
    resumed = Turns(step)
    assert [resumed.next() for _ in range(3000)] == [whole.next() for _ in range(3000)]
