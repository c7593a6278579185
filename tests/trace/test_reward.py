"""The reward of a tree against its definition, and against sampling."""

import math

import numpy as np
import pytest

from cast_sglang.trace.reward import tree_reward


def test_by_hand():
    # 0 and 1 below the root, 4 below 0.
    found = tree_reward(np.array([0, 1, 4]), np.array([-1, -1, 0]), np.array([0.5, 0.3, 0.8]))
    assert found.expected == pytest.approx(0.5 + 0.3 + 0.4)
    assert found.draft_tree_reward == pytest.approx(math.log(math.exp(0.9) + math.exp(0.3)))


def test_a_chain_is_its_expected_length():
    found = tree_reward(np.arange(3), np.array([-1, 0, 1]), np.array([0.9, 0.8, 0.5]))
    assert found.draft_tree_reward == pytest.approx(found.expected)
    assert found.expected == pytest.approx(0.9 + 0.72 + 0.36)


def test_an_empty_tree_has_none():
    empty = np.empty(0, dtype=int)
    assert tree_reward(empty, empty, np.empty(0)) == (0.0, 0.0)


def test_expected_is_what_sampling_accepts():
    random = np.random.default_rng(0)
    nodes, parents = np.arange(6), np.array([-1, -1, 0, 0, 1, 2])
    probs = np.array([0.5, 0.4, 0.6, 0.3, 0.7, 0.9])
    lengths = []
    for _ in range(20_000):
        at, length = -1, 0
        while len(children := np.nonzero(parents == at)[0]):
            place = int((probs[children].cumsum() <= random.random()).sum())
            if place == len(children):
                break
            at, length = int(nodes[children[place]]), length + 1
        lengths.append(length)
    expected = tree_reward(nodes, parents, probs).expected
    assert np.mean(lengths) == pytest.approx(expected, abs=0.03)
