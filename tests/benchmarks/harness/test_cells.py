"""Turns of one arm and their sums, and how long a cold run is."""

from collections import Counter

import pytest

from benchmarks.harness import cells
from benchmarks.harness.arms import Arm
from benchmarks.harness.cells import COLD_STEPS, Cell, Result, cold_load, gather, take_turn
from benchmarks.harness.counters import TOTALS
from benchmarks.harness.streams import Answer, num_steps


class CountingServer:
    """A CAST server that counts one step more each time it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def get(self, path: str) -> dict:
        self.asked += 1
        return {"internal_states": [{"cast": dict.fromkeys(TOTALS, 10 * self.asked)}]}


def test_rounds_become_repeats_without_arms_that_missed_one(monkeypatch):
    answers = [Answer(counts=[40], verify_passes=passes) for passes in (10, 8)]
    monkeypatch.setattr(cells, "run", lambda *words: (20.0, answers))
    server, cell = CountingServer(), Cell(2, 0.0, "t")
    cast = take_turn(Arm("cast", "cast"), server, cell, ["a", "b"], 40)
    plain = take_turn(Arm("plain", "plain"), server, cell, ["a", "b"], 40)
    assert (cast.totals, plain.totals) == (Counter(dict.fromkeys(TOTALS, 10)), Counter())
    found = gather([{"cast": cast, "plain": plain}, {"cast": cast}, {"cast": cast}])
    assert list(found) == ["cast"]
    assert found["cast"] == Result([20.0] * 3, answers * 3, Counter(dict.fromkeys(TOTALS, 30)))
    # What was joined is as it was.
    assert (len(cast.tok_s), cast.totals["steps"]) == (1, 10)


@pytest.mark.parametrize("accept_length", [1.0, 1.7, 2.9, 4.0, 5.2])
@pytest.mark.parametrize("num_tokens", [40, 128, 600])
def test_the_arm_that_gains_most_takes_its_first_hundred_steps(accept_length, num_tokens):
    per_place, tokens = cold_load(accept_length, num_tokens)
    assert per_place >= 3
    steps = per_place * tokens / accept_length
    # Answers are whole, and so are tokens.
    assert steps == pytest.approx(COLD_STEPS, abs=per_place / accept_length)
    # Answers are as long as warm ones, or shorter where three of those would be too long.
    assert tokens < 1.2 * num_tokens


def test_steps_are_passes_of_the_target():
    answers = [Answer(counts=[1, 4, 9], verify_passes=3), Answer(counts=[1, 2, 3])]
    assert num_steps(answers) == 3 + 3
