"""What the running requests tell of their answers."""

from types import SimpleNamespace

import pytest

from cast_sglang.serving.requests import HALF_LIFE, AnswerLengths


class Request(SimpleNamespace):
    """As much of SGLang's request as is read; compared by identity like it."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def finished(self) -> bool:
        return self.is_finished


def request(num_tokens: int, is_finished: bool = True) -> Request:
    return Request(output_ids_through_stop=[0] * num_tokens, is_finished=is_finished)


def test_only_answers_that_ended_count():
    lengths = AnswerLengths()
    short, long, retracted = request(10), request(30), request(5, is_finished=False)
    assert not lengths.note([short, long, retracted])
    assert lengths.mean_tokens is None
    assert not lengths.note([long, short])  # in another order, and without one that comes back
    assert lengths.note([long])
    assert lengths.mean_tokens == 10
    assert not lengths.note([long])
    assert lengths.note([retracted])
    assert lengths.mean_tokens == pytest.approx(20, abs=0.5)  # the later counts a little more


def test_a_new_kind_of_answers_is_followed():
    lengths = AnswerLengths()
    for num_tokens, count in ((100, 500), (20, HALF_LIFE)):
        for _ in range(count):
            lengths.note([request(num_tokens)])
    # The last one still runs.
    assert lengths.mean_tokens == pytest.approx(60, abs=2)


def test_an_answer_without_tokens_is_no_division_by_zero():
    lengths = AnswerLengths()
    lengths.note([request(0)])
    assert lengths.note([]) and lengths.mean_tokens == 1
