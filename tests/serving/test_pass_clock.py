"""Timing of served passes."""

import time
from collections import deque

import pytest

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.serving.pass_clock import MAX_PREFILLS, PassClock
from tests.support.builders import make_profile


def is_timing(clock) -> bool:
    return clock._costs is not None


@pytest.fixture
def costs():
    limits = Limits(max_batch_size=4, max_context=256, max_verify_rows=8, max_width=8)
    return CostModel(make_profile(), limits).step_costs(2, 100)


def test_passes_of_a_step_are_timed_against_the_table(costs):
    clock = PassClock("cpu")
    clock.begin_step(2, costs)
    with clock.time("draft", 4):
        time.sleep(0.002)
    with clock.time("verify", 8):
        time.sleep(0.005)
    clock.end_step()
    draft, verify = clock.finished()
    assert (draft.operation, draft.batch_size, draft.num_tokens) == ("draft", 2, 4)
    assert verify.predicted_us == pytest.approx(float(costs.verify[7]) * costs.unit_us)
    assert verify.measured_us >= 5000 and draft.measured_us >= 2000
    assert list(clock.finished()) == []


def test_a_step_behind_one_of_the_other_kind_is_not_timed(costs):
    clock, told = PassClock("cpu"), []
    for drafts in (True, False, False, None, True, True, False):
        if drafts is None:
            clock.follows_prefill()
            continue
        clock.begin_step(2, costs, drafts)
        told.append((is_timing(clock), clock.follows_alike))
    yes, no = (True, True), (False, False)
    assert told == [(True, False), no, yes, (True, False), yes, no]


def test_prefills_are_timed_outside_of_steps():
    clock = PassClock("cpu")
    for rows in (3, 5, 7):  # the first one compiles
        with clock.time_prefill(rows):
            time.sleep(0.002)
    assert [(rows, us >= 2000) for rows, us in clock.finished_prefills()] == [(5, True), (7, True)]
    assert list(clock.finished_prefills()) == list(clock.finished()) == []
    # Without a step nobody asks for them.
    for rows in range(2 * MAX_PREFILLS):
        with clock.time_prefill(rows):
            pass
    kept = [rows for rows, _ in clock.finished_prefills()]
    assert kept == list(range(MAX_PREFILLS, 2 * MAX_PREFILLS))


def test_what_leads_to_a_pass_is_timed_with_it(costs):
    clock = PassClock("cpu")
    with clock.lead("draft_extend"):
        time.sleep(0.002)  # outside of a step
    clock.begin_step(2, costs)
    with clock.lead("draft_extend"):
        time.sleep(0.004)
    with clock.time("verify", 8):
        pass
    with clock.time("draft_extend", 2):
        time.sleep(0.002)
    clock.end_step()
    _, extend = clock.finished()
    assert extend.operation == "draft_extend" and extend.measured_us >= 6000
    assert extend.predicted_us == pytest.approx(float(costs.draft_extend[1]) * costs.unit_us)
    # It leads to one pass of its own step.
    clock.begin_step(2, costs)
    with clock.time("draft_extend", 2):
        pass
    [(_, spans)] = clock._running
    assert len(spans) == 1


def test_nothing_is_timed_outside_of_a_step_or_without_costs(costs):
    clock = PassClock("cpu")
    with clock.time("verify", 8):
        pass
    clock.begin_step(2, None)
    with clock.time("verify", 8):
        pass
    assert not is_timing(clock)
    clock.begin_step(2, costs)
    assert is_timing(clock)
    clock.end_step()
    assert not is_timing(clock)
    with clock.time("verify", 8):
        pass
    assert list(clock.finished()) == []


def test_a_pass_that_fails_is_not_counted(costs):
    clock = PassClock("cpu")
    clock.begin_step(2, costs)
    with pytest.raises(RuntimeError), clock.time("verify", 8):
        raise RuntimeError
    assert list(clock.finished()) == []


class FakeDevice:
    """Events that finish when they are told to."""

    def __init__(self):
        self.now = 0.0
        self.done_until = 0.0
        self.events = deque()

    def Event(self, enable_timing):
        assert enable_timing
        device = self

        class Event:
            def record(self):
                self.at = device.now
                device.events.append(self)

            def query(self):
                return self.at <= device.done_until

            def elapsed_time(self, end):
                assert end.query()
                return end.at - self.at

        return Event()


def test_events_are_read_only_after_the_device_has_passed_them(costs, monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr("torch.get_device_module", lambda name: device)
    clock = PassClock("cuda")
    for step in range(33):
        clock.begin_step(2, costs)
        assert is_timing(clock) == (step % 16 == 15)
        device.now = 10.0 * step
        with clock.time("verify", 4):
            device.now += 3.0
        clock.end_step()
    # One step in sixteen is timed.
    assert len(device.events) == 4
    assert list(clock.finished()) == []
    device.done_until = 155.0
    (timed,) = clock.finished()
    assert timed.measured_us == pytest.approx(3000.0)
    device.done_until = 1000.0
    assert len(list(clock.finished())) == 1
