"""Measuring under tensor parallelism: the other ranks run what rank 0 runs, and then stop."""

from collections import deque
from types import SimpleNamespace

import pytest

from cast_sglang.costs.limits import Limits
from cast_sglang.serving.profiling import ranks
from cast_sglang.serving.profiling.ranks import measure_on_all_ranks

LIMITS = Limits(max_batch_size=4, max_context=64, max_verify_rows=8, max_width=2)


class Meter:
    """Runs passes that take as long as they have tokens."""

    def __init__(self, log):
        self.log = log

    def limits(self):
        self.log.append("limits")
        return LIMITS

    def verify(self, batch_size, context, rows):
        self.log.append(("verify", batch_size, context, rows))
        return float(batch_size * rows)

    def step_overhead(self, batch_size):
        self.log.append(("step_overhead", batch_size))

    def close(self):
        self.log.append("closed")


class Group:
    """One rank of a group whose broadcasts wait until the others read them."""

    def __init__(self, rank, world_size, sent):
        self.rank_in_group, self.world_size, self._sent = rank, world_size, sent

    def broadcast_object(self, content, src):
        assert src == 0
        if self.rank_in_group == 0:
            self._sent.append(content)
            return content
        return self._sent.popleft()


def measure(run, monkeypatch, world_size=2):
    """Return what rank 0 returns, what the last rank returns, and what each meter was asked."""
    sent, results, logs = deque(), [], []
    monkeypatch.setattr(ranks, "EngineMeter", Meter)
    for rank in (0, world_size - 1):
        logs.append([])
        group = Group(rank, world_size, sent)
        scheduler = SimpleNamespace(tp_group=group, draft_worker=logs[-1])
        try:
            results.append(measure_on_all_ranks(scheduler, run))
        except RuntimeError as error:
            results.append(error)
    assert not sent
    return results, logs


def test_the_other_ranks_repeat_every_call(monkeypatch):
    def run(meter):
        assert meter.limits() is LIMITS
        return meter.verify(2, 16, 4) + meter.verify(1, 16, 3), meter.step_overhead(2)

    results, logs = measure(run, monkeypatch)
    assert results == [(11.0, None), None]
    calls = [("verify", 2, 16, 4), ("verify", 1, 16, 3), ("step_overhead", 2), "closed"]
    assert logs == [["limits", *calls], calls]  # limits are no pass


def test_the_other_ranks_stop_where_measuring_fails(monkeypatch):
    def run(meter):
        meter.verify(2, 16, 4)
        raise RuntimeError("too small a budget")

    (failed, other), logs = measure(run, monkeypatch)
    assert isinstance(failed, RuntimeError) and other is None
    assert logs == [[("verify", 2, 16, 4), "closed"]] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_single_rank_has_the_meter_to_itself(monkeypatch, fails):
    def run(meter):
        assert type(meter) is Meter
        if fails:
            raise RuntimeError
        return meter.verify(1, 8, 2)

    sent, log = deque(), []
    monkeypatch.setattr(ranks, "EngineMeter", Meter)
    scheduler = SimpleNamespace(tp_group=Group(0, 1, sent), draft_worker=log)
    if fails:
        with pytest.raises(RuntimeError):
            measure_on_all_ranks(scheduler, run)
    else:
        assert measure_on_all_ranks(scheduler, run) == 2.0
    assert log[-1] == "closed" and not sent
