"""The tables in use: passes that were timed correct them, and a wrong profile is reported."""

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from cast_sglang.config import CastConfig
from cast_sglang.costs.correction import REFRESH_EVERY, REPORT_AFTER
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.policy.lookahead import KEEP
from cast_sglang.serving import served_costs as module
from cast_sglang.serving.pass_clock import TimedPass
from cast_sglang.serving.served_costs import EXPORT_EVERY, ServedCosts
from cast_sglang.serving.step import PendingStep
from tests.support.builders import make_profile

LIMITS = Limits(max_batch_size=4, max_context=1024, max_verify_rows=8, max_width=4)
SLOW = TimedPass("verify", 1, 4, predicted_us=1000.0, measured_us=2000.0)


class Clock:
    def __init__(self):
        self.passes, self.prefills = [], []

    def finished_prefills(self):
        while self.prefills:
            yield self.prefills.pop(0)

    def finished(self):
        while self.passes:
            yield self.passes.pop(0)


@pytest.fixture
def make(monkeypatch):
    """Return a function that makes the costs of one rank, with its clock and statistics."""

    def make(tp_size=1, **settings):
        monkeypatch.setattr(module, "get_parallel", lambda: SimpleNamespace(tp_size=tp_size))
        clock, exported = Clock(), []
        stats = SimpleNamespace(record_residuals=exported.append)
        costs = ServedCosts(CastConfig(**settings), clock, stats)
        costs.use(FoundProfile(make_profile(), Path("some.json"), [], "COMMAND"), LIMITS)
        return costs, clock, exported

    return make


def measure(clock, costs, count=4 * REPORT_AFTER):
    clock.passes += [SLOW] * count
    costs.take_times(None)


def test_before_there_is_a_profile():
    clock = Clock()
    clock.passes.append(SLOW)
    costs = ServedCosts(CastConfig(), clock, None)
    seen = []
    costs.take_times(seen.append)
    costs.correct(REFRESH_EVERY)
    assert seen == [SLOW] and costs.model is costs.corrected is costs.residuals is None


@pytest.mark.parametrize("residuals", ["on", "off"])
def test_a_row_of_a_prompt_takes_what_the_last_prefills_took(make, residuals):
    costs, clock, _ = make(residuals=residuals)
    costs.correct(REFRESH_EVERY)
    assert costs.prompt_row_us is None
    clock.prefills += [(10, 3000.0), (30, 5000.0)]
    costs.take_times(None)
    costs.correct(REFRESH_EVERY)
    expected = (KEEP * 3000 + 5000) / (KEEP * 10 + 30)
    assert costs.prompt_row_us == (pytest.approx(expected) if residuals == "on" else None)
    assert costs.reset() == (residuals == "on")
    costs.correct(REFRESH_EVERY)
    assert costs.prompt_row_us is None


@pytest.mark.parametrize("found_by_others", [True, False])
@pytest.mark.parametrize("found_by_first", [True, False])
def test_every_rank_decides_by_the_profile_that_rank_0_finds(
    monkeypatch, found_by_first, found_by_others
):
    """Another server may save one between the looks of two ranks."""
    sent, taken = [], []
    found = FoundProfile(make_profile(), Path("first.json"), [], "COMMAND")
    there = {0: found_by_first, 1: found_by_others}

    def broadcast(value, src):
        sent.append(value)
        return sent[src]

    monkeypatch.setattr(module, "get_tp_group", lambda: SimpleNamespace(broadcast_object=broadcast))
    for rank in (0, 1):
        parallel = SimpleNamespace(tp_rank=rank, tp_size=2)
        monkeypatch.setattr(module, "get_parallel", lambda parallel=parallel: parallel)
        mine = found if there[rank] else None
        monkeypatch.setattr(module, "find_server_profile", lambda *args, mine=mine: mine)
        monkeypatch.setattr(module, "host_identity", lambda args: None)
        costs = ServedCosts(CastConfig(), Clock(), None)
        costs.find(None, LIMITS)
        taken.append(costs.profile)
    assert taken == [found if found_by_first else None] * 2


@pytest.mark.parametrize(
    "settings", [{"residuals": "off"}, {"policy": "eagle"}, {"trace_full": True, "trace": "t"}]
)
def test_tables_that_are_not_corrected(make, settings):
    costs, clock, exported = make(**settings)
    measure(clock, costs)
    costs.correct(REFRESH_EVERY)
    assert costs.residuals is None and exported == []
    assert costs.corrected.step_costs(1, 128).unit_us == costs.model.step_costs(1, 128).unit_us


def test_what_was_timed_corrects_the_tables_now_and_then(make):
    costs, clock, exported = make()
    measure(clock, costs)
    before = costs.corrected.step_costs(1, 128).unit_us
    costs.correct(REFRESH_EVERY - 1)
    assert costs.corrected.step_costs(1, 128).unit_us == before and exported == []
    costs.correct(EXPORT_EVERY)
    assert costs.corrected.step_costs(1, 128).unit_us > 1.5 * before
    assert exported == [costs.residuals]


def test_a_whole_step_tells_what_it_takes_beyond_its_passes(make):
    costs, _, _ = make()
    before = costs.corrected.step_costs(1, 128)
    step = PendingStep(
        predicted_us=1000.0,
        units=1.0,
        expected_us=1000.0,
        num_layers=0,
        unit_us=1000.0,
        follows_alike=True,
        max_tokens=1,
    )
    for _ in range(200):
        costs.take_step(1, step, 1100.0)
    costs.take_step(1, step._replace(expected_us=None), 9000.0)
    costs.correct(REFRESH_EVERY)
    after = costs.corrected.step_costs(1, 128)
    assert after.plain_overhead - before.plain_overhead == pytest.approx(0.1, abs=0.02)


def test_a_profile_that_ends_below_the_server_is_reported(make, caplog):
    costs, _, _ = make()
    assert not caplog.records
    larger = dataclasses.replace(LIMITS, max_batch_size=100)
    costs.use(FoundProfile(make_profile(), Path("some.json"), []), larger)
    [record] = caplog.records
    assert "some.json ends below this server's limits, in draft.batch_sizes" in record.getMessage()


def test_a_wrong_profile_is_reported_once(make, caplog):
    costs, clock, _ = make()
    measure(clock, costs)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            costs.correct(step * EXPORT_EVERY)
    [record] = caplog.records
    assert "some.json is off: verify" in record.getMessage()
    assert record.getMessage().endswith("Measure again: COMMAND")


def test_every_rank_takes_the_times_of_the_first(make, monkeypatch):
    leader, clock, _ = make()
    measure(clock, leader)
    state = leader.residuals.values(), (500.0, 5.0)
    group = SimpleNamespace(broadcast_object=lambda own, src: state)
    monkeypatch.setattr(module, "get_tp_group", lambda: group)
    follower, _, _ = make(tp_size=2)
    before = follower.corrected.step_costs(1, 128).unit_us
    follower.correct(REFRESH_EVERY)
    assert follower.corrected.step_costs(1, 128).unit_us > 1.5 * before
    assert follower.prompt_row_us == 100.0


def test_corrections_can_be_forgotten(make):
    costs, clock, _ = make()
    before = costs.corrected.step_costs(1, 128).unit_us
    measure(clock, costs)
    costs.correct(REFRESH_EVERY)
    assert costs.reset()
    assert costs.corrected.step_costs(1, 128).unit_us == before
    assert not list(costs.residuals)
    assert not make(residuals="off")[0].reset()
