"""The arithmetic behind the benchmark's numbers, on streams whose speed is known."""

import pytest

from benchmarks.bench_serving import (
    Answer,
    Cell,
    Result,
    accept_length,
    as_rows,
    choose_prompts,
    ratio,
    steady_window,
)
from benchmarks.servers import Arm, parse_arm


def steps(start: float, seconds: float, gains: list[int], lag: float = 0.0) -> Answer:
    """A request whose first token comes at `start` and that gains tokens each step after it."""
    answer = Answer(times=[start + lag], counts=[1])
    for gain in gains:
        answer.times.append(answer.times[-1] + seconds)
        answer.counts.append(answer.counts[-1] + gain)
    return answer


def test_window_of_one_request_is_all_its_steps():
    assert steady_window([steps(5.0, 0.1, [3] * 10)]) == pytest.approx((30, 1.0))


def test_window_ends_with_the_first_request_and_begins_with_the_last():
    fast = steps(0.0, 0.1, [4] * 10)  # ends at 1.0
    slow = steps(0.2, 0.1, [2] * 20)  # begins at 0.2
    tokens, seconds = steady_window([fast, slow])
    assert seconds == pytest.approx(0.8)
    assert tokens == pytest.approx(8 * 4 + 8 * 2)


def test_arrival_one_after_the_other_costs_no_tokens():
    # Eight requests of one step reach the client up to 7 ms apart.
    answers = [steps(0.0, 0.1, [3] * 20, lag=0.001 * i) for i in range(8)]
    tokens, seconds = steady_window(answers)
    assert tokens / seconds == pytest.approx(8 * 3 / 0.1)


def test_requests_that_never_ran_together_are_an_error():
    with pytest.raises(ValueError, match="no moment"):
        steady_window([steps(0.0, 0.1, [1] * 5), steps(9.0, 0.1, [1] * 5)])


def test_ratio_is_formed_within_a_repeat():
    # The machine halves its speed in the second repeat; the ratio does not move.
    assert ratio(Result(tok_s=[20, 10, 20]), Result(tok_s=[10, 5, 10])) == 2.0
    assert ratio(Result(tok_s=[1.0]), None) is None


def test_rows_compare_with_plain_and_with_the_best_static_arm():
    arms = [Arm("plain", "plain"), Arm("a", "static"), Arm("b", "static"), Arm("cast", "cast")]
    speeds = {"plain": 10.0, "a": 15.0, "b": 20.0, "cast": 30.0}

    def result(name: str) -> Result:
        ids = [1, 2] if name == "a" else [1, 3]
        answer = Answer(counts=[1, 12], output_ids=ids, verify_passes=0 if name == "plain" else 4)
        return Result(tok_s=[speeds[name]] * 3, answers=[answer])

    rows = as_rows(Cell(8, 0.0, "t"), arms, {arm.name: result(arm.name) for arm in arms})
    by_arm = {row["arm"]: row for row in rows}
    assert (by_arm["cast"]["vs_plain"], by_arm["cast"]["vs_best_static"]) == (3.0, 1.5)
    assert (by_arm["a"]["vs_best_static"], by_arm["b"]["vs_best_static"]) == (0.75, 1.0)
    assert (by_arm["plain"]["accept_length"], by_arm["cast"]["accept_length"]) == (None, 3.0)
    assert (by_arm["a"]["identical_to_plain"], by_arm["cast"]["identical_to_plain"]) == (
        False,
        True,
    )
    sampled = as_rows(Cell(8, 0.8, "t"), arms, {arm.name: result(arm.name) for arm in arms})
    assert {row["identical_to_plain"] for row in sampled} == {None}


def test_accept_length_weighs_by_passes():
    answers = [Answer(counts=[10], verify_passes=2), Answer(counts=[10], verify_passes=8)]
    assert accept_length(answers) == 2.0


def test_prompts_fill_whole_batches():
    assert choose_prompts(["a", "b", "c"], batch=4, num_requests=5) == list("abcabcab")


def test_arms():
    assert parse_arm("plain", "d").flags == ()
    static = parse_arm("static:3-1-4", "d")
    assert static.name == "static:3-1-4"
    assert static.flags[-1] == "4"
    assert parse_arm("static", "d").name == "static:5-4-8"
    assert "eagle" in parse_arm("cast:eagle", "d", "p.json").flags
    for wrong in ("", "plain:1", "static:3-1", "static:x-1-4", "fast"):
        with pytest.raises(ValueError):
            parse_arm(wrong, "d")
