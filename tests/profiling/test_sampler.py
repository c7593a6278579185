"""How often a point is timed, and what is made of its times, on machines of a known kind."""

import math
import random

import numpy as np
import pytest

from cast_sglang.errors import ProfileError
from cast_sglang.profiling import sampler as module
from cast_sglang.profiling.journal import STEP_OVERHEAD, Journal, Point
from cast_sglang.profiling.meter import Sampling
from cast_sglang.profiling.sampler import Sampler
from tests.support.meters import Clock, StaircaseMeter

POINTS = [Point("verify", 1, 128, rows) for rows in (1, 2, 4, 8)]
REFERENCES = [Point("verify", 1, 128, 1), Point("verify", 4, 128, 8)]
ALWAYS = Sampling(tolerance=0.0, max_visits=8)


class Machine(StaircaseMeter):
    """A meter whose passes take what a function of their number says."""

    def __init__(self, seconds=lambda count: 1e-3, clock=None):
        super().__init__(clock=clock)
        self.of_count = seconds

    def _seconds(self, *point):
        return self.of_count(len(self.calls))


@pytest.fixture
def clock(monkeypatch):
    """The time by which budgets are kept; only passes take any."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_visit_is_one_untimed_pass_and_a_few_timed_ones():
    meter = Machine()
    with Sampler(meter, Sampling(warmup=4, visit_passes=3), []) as sampler:
        sampler.visit_once("grid", POINTS[:1], share=1.0)
        assert len(meter.calls) == 4 + 3
        sampler.visit_again("grid", POINTS[:1], share=1.0)
        assert len(meter.calls) == 4 + 3 + 1 + 3
        assert sampler.summary(POINTS[0]) == (1000.0, 0.0, 6)


@pytest.mark.parametrize(("seconds", "passes"), [(0.049, 3), (0.051, 2), (0.1, 1), (1.0, 1)])
def test_long_passes_are_repeated_less(seconds, passes):
    meter = Machine(lambda count: seconds)
    with Sampler(meter, Sampling(warmup=1), []) as sampler:
        sampler.visit_once("grid", POINTS[:1], share=1.0)
    assert sampler.summary(POINTS[0])[2] == passes
    # In a long pass what another left in the caches does not show: it counts itself.
    assert len(meter.calls) == (passes + 1 if seconds < 0.15 else 1)


def test_points_are_visited_until_their_medians_are_known():
    quiet, rng = Machine(), random.Random(0)
    noisy = Machine(lambda count: 1e-3 * (1 + rng.random()))
    for meter, visits in ((quiet, Sampling().min_visits), (noisy, Sampling().max_visits)):
        with Sampler(meter, Sampling(), REFERENCES) as sampler:
            sampler.visit_until_precise("precision", POINTS[:2], share=1.0, always=POINTS[2:])
        for point in POINTS:
            assert sampler.summary(point)[2] == visits * Sampling().visit_passes
    assert sampler.describe()["imprecise_points"] == len(POINTS)


def test_precision_is_a_confidence_interval():
    rng = random.Random(1)
    covered = 0
    sampler = Sampler(StaircaseMeter(), Sampling(), [])
    for point in range(300):
        sampler._values[point] = [rng.gauss(100, 5) for _ in range(24)]
        reach = sampler.precision(point) * 2
        covered += abs(sampler.median_us(point) - 100) / sampler.median_us(point) <= reach
    assert covered >= 0.9 * 300


def test_the_error_of_a_median_is_learned_from_all_points():
    rng = random.Random(2)
    meter = Machine(lambda count: 1e-3 * (1 + rng.gauss(0, 0.05)))
    points = [Point("verify", 1, context, 1) for context in range(1, 201)]
    sampling = Sampling(tolerance=0.0, max_visits=4, visit_passes=1)
    with Sampler(meter, sampling, []) as sampler:
        sampler.visit_until_precise("precision", points, share=1.0)
    errors = [sampler.standard_error(point) for point in points]
    assert errors == pytest.approx([errors[0]] * len(points))
    true = np.std([sampler.median_us(point) for point in points]) / 1000
    assert errors[0] == pytest.approx(true, rel=0.35)


def test_drift_is_not_structure():
    # The device slows down to half its speed; equal counts must agree, whenever they were timed.
    meter = Machine(lambda count: 1e-3 * (1 + min(count / 200, 1.0)))
    with Sampler(meter, ALWAYS, REFERENCES) as sampler:
        for points in (POINTS[:2], POINTS[2:]):
            for _ in range(6):
                sampler.visit_again("grid", points, share=1.0)
    medians = np.array([sampler.median_us(point) for point in POINTS])
    assert np.ptp(medians) / medians.mean() < 0.02
    assert sampler.describe()["drift"] > 1.3


def test_visits_during_a_change_of_speed_do_not_count():
    meter = Machine()
    with Sampler(meter, ALWAYS, REFERENCES) as sampler:
        for points, seconds in ((POINTS[:2], 1e-3), (POINTS[2:], 2e-3)):
            meter.of_count = lambda count, seconds=seconds: seconds
            for _ in range(2):
                # Its references were fast before the first slow visit, and slow after it.
                sampler.visit_again("grid", points, share=1.0)
    medians = np.array([sampler.median_us(point) for point in POINTS])
    assert medians == pytest.approx(medians[0])


def test_a_machine_that_is_never_steady_is_believed_all_the_same():
    meter = Machine(lambda count: 1e-3 * 1.1**count)
    with Sampler(meter, ALWAYS, REFERENCES) as sampler:
        sampler.visit_once("grid", POINTS, share=1.0)
    assert all(sampler.median_us(point) > 0.0 for point in POINTS)


def test_a_stage_ends_with_its_share_of_the_budget(clock):
    # Times that differ, so that no point is done; the visits of 5 or 4 passes take at most 5 ms.
    meter = Machine(lambda count: 1e-3 - 1e-6 * count, clock)
    with Sampler(meter, ALWAYS, [], budget_seconds=0.1) as sampler:
        assert sampler.visit_once("grid", POINTS, share=0.5) and clock.now < 0.02
        for share in (0.3, 0.6, 1.0):
            assert not sampler.visit_again("grid", [*POINTS, *REFERENCES] * 99, share=0.0)
            sampler.visit_until_precise("precision", POINTS, share=share)
            # A visit may begin just before the end.
            assert 0.1 * share <= clock.now <= 0.1 * share + 5e-3
    assert sampler.num_measured(POINTS) == 4 == len(sampler.points("verify"))


def test_a_journal_brings_back_what_was_measured(tmp_path):
    meter, again = StaircaseMeter(noise=0.1), StaircaseMeter()
    with Journal(tmp_path / "j", {}) as journal, Sampler(meter, ALWAYS, REFERENCES) as first:
        first.record_to(journal)
        first.visit_until_precise("precision", POINTS, share=1.0)
    second = Sampler(again, ALWAYS, REFERENCES)
    second.record_to(Journal(tmp_path / "j", {}))
    assert [second.summary(p) for p in POINTS] == [first.summary(p) for p in POINTS]
    assert second.seconds == pytest.approx(first.seconds) and second.points("verify") == POINTS
    num_visits = sum(1 for _ in open(tmp_path / "j")) - 1
    assert again.calls == []
    assert second.describe() == {**first.describe(), "resumed_visits": num_visits}
    assert first.describe()["resumed_visits"] == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, None])
def test_impossible_times_of_the_meter(bad):
    meter = StaircaseMeter()
    meter.verify = lambda batch_size, context, rows: bad
    sampler = Sampler(meter, Sampling(), [])
    with pytest.raises(ProfileError, match=r"the meter returned .* seconds for Point\(.*verify"):
        with sampler:
            sampler.visit_once("grid", POINTS, share=1.0)


def test_what_a_meter_cannot_time_is_asked_once():
    meter = StaircaseMeter()
    sampler, asked = Sampler(meter, Sampling(), []), []
    meter.step_overhead = lambda batch_size: asked.append(batch_size)
    points = [Point(STEP_OVERHEAD, batch_size, 1, 1) for batch_size in (1, 2)]
    assert not any(sampler.supports(point) for point in points) and asked == [1]
    assert sampler.supports(POINTS[0])


def test_progress_goes_to_stderr_only(capsys):
    with Sampler(Machine(), Sampling(), [], progress=True) as sampler:
        sampler.visit_once("grid", POINTS, share=1.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "points" in captured.err
