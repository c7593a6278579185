"""Whose turn a step is: rounds of other trees that become rare."""

import math

from cast_sglang.policy.turns import DEFAULT_SHAPES, FIRST, LONGEST, PLAIN, TIMES, Turns

NUM_TURNS = 1 + TIMES * len(DEFAULT_SHAPES)


def turns_of(num_steps):
    """Return the tree of each step that is a turn, by the number of the step."""
    turns = Turns()
    trees = {step: turns.next() for step in range(1, num_steps + 1)}
    return {step: tree for step, tree in trees.items() if tree is not None}


def test_a_round_has_every_tree_as_often_and_the_policys_own_in_between():
    turns = turns_of(2 * FIRST - 1)
    assert list(turns) == list(range(FIRST, FIRST + 2 * NUM_TURNS, 2))
    trees = list(turns.values())
    assert trees[0] is PLAIN and trees.count(PLAIN) == 1
    for tree in DEFAULT_SHAPES:
        assert trees.count(tree) == TIMES
    assert all(one != other for one, other in zip(trees, trees[1:], strict=False))


def test_rounds_become_rare_and_never_end():
    begins = [step for step, tree in turns_of(4 * LONGEST + 1).items() if tree is PLAIN]
    doubling = [FIRST << round_ for round_ in range(int(math.log2(LONGEST / FIRST)) + 1)]
    assert begins == [*doubling, 2 * LONGEST, 3 * LONGEST, 4 * LONGEST]


def test_the_stated_bound_holds():
    steps = list(turns_of(5000))
    for n in range(FIRST, 5001):
        bound = NUM_TURNS * (math.log2(n / FIRST) + 1) + NUM_TURNS * n / LONGEST
        assert sum(step <= n for step in steps) <= bound
