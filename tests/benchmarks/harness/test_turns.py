"""Taking turns, and what ratios of rounds say."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.arms import Arm
from benchmarks.harness.turns import (
    CONFIDENCE,
    extent,
    interval,
    is_settled,
    is_sure,
    quotients,
    rounds,
)

ARMS = [Arm(name, "cast") for name in "abc"]


def test_every_arm_has_one_turn_a_round_and_none_is_always_first():
    taken: list[tuple[int, str]] = []

    def take(arm: Arm, number: int) -> str:
        taken.append((number, arm.name))
        return f"{arm.name}{number}"

    found = list(itertools.islice(rounds(ARMS, take), 3))
    assert found == [{name: f"{name}{number}" for name in "abc"} for number in range(3)]
    assert ["".join(name for at, name in taken if at == number) for number in range(3)] == [
        *("abc", "bca", "cab")
    ]
    # One round of each start goes on with the order where the last one ended.
    taken.clear()
    assert next(rounds(ARMS, take, first=1)) == {"a": "a1", "b": "b1", "c": "c1"}
    assert [name for _, name in taken] == ["b", "c", "a"]


def test_an_arm_that_fails_has_no_further_turn():
    def take(arm: Arm, number: int) -> int:
        if (arm.name, number) == ("b", 1):
            raise ValueError("gone")
        return number

    lost: list[tuple[str, str]] = []
    found = rounds(ARMS, take, lambda arm, error: lost.append((arm.name, str(error))))
    assert [sorted(turns) for turns in itertools.islice(found, 3)] == [
        *(["a", "b", "c"], ["a", "c"], ["a", "c"])
    ]
    assert lost == [("b", "gone")]
    with pytest.raises(ValueError, match="gone"):
        list(itertools.islice(rounds(ARMS, take), 3))
    # Where none is left, rounds are empty; a mistake of the benchmark is nobody's failure.
    broken = rounds(ARMS[1:2], take, lambda arm, error: None, first=1)
    assert list(itertools.islice(broken, 2)) == [{}, {}]
    with pytest.raises(ZeroDivisionError):
        next(rounds(ARMS, lambda arm, number: 1 // 0, lambda arm, error: None))


def test_a_drift_of_the_machine_cancels_within_a_round():
    drift = [1.0, 0.5, 0.8, 2.0, 0.1, 1.3]
    ours, theirs = ([speed * factor for factor in drift] for speed in (24.0, 20.0))
    assert interval(quotients(ours, theirs)) == (1.2, 1.2, 1.2)
    assert is_settled(quotients(ours, theirs)) and not is_settled([12.0 * f for f in drift])
    with pytest.raises(ValueError):
        quotients(ours, theirs[1:])


def test_a_stall_of_one_round_is_no_end_of_the_interval():
    steady = [1.1, 1.11, 1.12, 1.13, 1.14, 1.15, 1.16, 1.17, 1.18]
    assert interval([*steady[:-1], 9.0]) == (1.14, 1.11, 1.17)
    assert extent([*steady[:-1], 9.0]) == (1.14, 1.1, 9.0)
    # Of a few rounds each counts, and none of them is sure.
    assert interval([2.0, 1.0, 1.5]) == extent([2.0, 1.0, 1.5]) == (1.5, 1.0, 2.0)
    assert [count for count in range(1, 12) if is_sure(count)] == [6, 7, 8, 9, 10, 11]
    assert not is_settled([1.0] * 5) and is_settled([1.0] * 6)


@pytest.mark.parametrize(("spread", "settled"), [(0.024, True), (0.026, False)])
def test_rounds_are_enough_when_their_ends_are_a_twentieth_apart(spread, settled):
    assert is_settled([1.0 - spread, 1.0, 1.0, 1.0, 1.0, 1.0 + spread]) is settled


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=60))
def test_the_interval_lies_within_the_extent_around_the_same_median(values):
    inner, outer = interval(values), extent(values)
    assert inner.median == outer.median
    assert outer.low <= inner.low <= inner.median <= inner.high <= outer.high


@pytest.mark.parametrize("count", [6, 9, 15, 30])
def test_the_interval_holds_the_true_median_as_often_as_it_says(count):
    source = random.Random(count)
    tries, missed = 4000, 0
    for _ in range(tries):
        # Skewed, as times are: its median is 1.
        found = interval([math.exp(source.gauss(0, 0.2)) for _ in range(count)])
        missed += not found.low <= 1.0 <= found.high
    # Ranks are whole, so it may hold more often, but not by more than one rank.
    dropped = round((1 - CONFIDENCE) * tries)
    assert 0.2 * dropped <= missed <= dropped + 4 * math.sqrt(dropped)
