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


def request(is_finished: bool = True) -> Request:
    return Request(is_finished=is_finished)


def test_tokens_over_ends():
    lengths = AnswerLengths()
    first, second, retracted = request(), request(), request(is_finished=False)
    lengths.note([first, second, retracted])
    lengths.count(10)
    assert lengths.mean_tokens is None
    lengths.note([second, first])  # in another order, and without one that comes back
    assert lengths.mean_tokens is None
    lengths.note([second])
    assert lengths.mean_tokens == pytest.approx(10, rel=0.03)
    lengths.count(30)  # of the one that runs: long ones count before they end
    assert lengths.mean_tokens == pytest.approx(40, rel=0.03)


def test_a_new_kind_of_answers_is_followed():
    lengths = AnswerLengths()
    for num_tokens, count in ((100, 500), (20, HALF_LIFE)):
        for _ in range(count):
            lengths.note([request()])
            lengths.count(num_tokens)
    lengths.note([])
    assert lengths.mean_tokens == pytest.approx(60, abs=2)


def test_answers_without_tokens_are_no_division_by_zero():
    lengths = AnswerLengths()
    lengths.note([request()])
    lengths.note([])
    assert lengths.mean_tokens == 1.0
