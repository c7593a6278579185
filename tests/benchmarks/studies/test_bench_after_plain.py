"""Two turns under each condition, on a server that is made up."""

import pytest

from benchmarks.harness.talks import Reply
from benchmarks.studies import bench_after_plain
from benchmarks.studies.bench_after_plain import (
    CONDITIONS,
    accept_length,
    ratio,
    second_replies,
)


class FakeServer:
    url = "http://nowhere"

    def __init__(self):
        self.log = []

    def flush_cache(self):
        self.log.append("flush")

    def take_turn(self, url, prompts, num_tokens, at_once, mode=None):
        self.log.append((num_tokens, mode, prompts))
        return [Reply([7] * num_tokens, num_tokens, 0) for _ in prompts]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_second_turn_holds_the_first_and_is_drafted(monkeypatch, condition):
    server = FakeServer()
    monkeypatch.setattr(bench_after_plain, "take_turn", server.take_turn)
    second_replies(server, [[[1, 2], [3]]], (2, 4), condition, at_once=1)
    mode, flushes = CONDITIONS[condition]
    first, second = (2, mode, [[1, 2]]), (4, None, [[1, 2, 7, 7, 3]])
    assert server.log == ["flush", first, *["flush"] * flushes, second]


def replies(*pairs):
    return [Reply([0] * tokens, passes, 0) for tokens, passes in pairs]


def test_ratios_are_those_of_sums_with_their_range():
    ours, theirs = replies((10, 5), (20, 4)), replies((10, 2), (20, 4))
    assert accept_length(ours) == 30 / 9 and accept_length(theirs) == 5
    middle, low, high = ratio(ours, theirs)
    assert middle == pytest.approx(30 / 9 / 5)
    # One conversation alone, drawn twice, and the other.
    assert low == pytest.approx(0.4) and high == pytest.approx(1.0)
    assert ratio(ours, ours) == (1.0, 1.0, 1.0)
