"""The profiler against a fake device whose true costs are known."""

import dataclasses
import json
import math
import random
import time

import numpy as np
import pytest

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.costs.passes import NAMES, PASSES
from cast_sglang.costs.profiles import load_profile
from cast_sglang.errors import ProfileError
from cast_sglang.profiling import run
from cast_sglang.profiling.grid import Grid, default_grid
from cast_sglang.profiling.journal import journal_path
from cast_sglang.profiling.meter import Sampling
from cast_sglang.profiling.run import choose_references, run_profile, summarize, write_profile
from cast_sglang.profiling.sampler import Sampler
from tests.support.builders import make_identity

LIMITS = Limits(max_batch_size=4, max_context=1024, max_verify_rows=24, max_width=8)
BASE_US = {"verify": 1000.0, "draft": 100.0, "draft_extend": 150.0}
TILE = 8


def make_grid(batch_sizes, contexts, verify, draft, draft_extend):
    counts = {"verify": verify, "draft": draft, "draft_extend": draft_extend}
    return Grid(batch_sizes, contexts, counts)


SMALL = make_grid((1,), (64,), (1, 2), (1,), (1, 2))


class StaircaseMeter:
    """Costs step up after each TILE rows of the batch, with seeded one-sided noise and outliers."""

    def __init__(self, noise=0.01, limits=LIMITS, drift=0.0, seconds=0.0, dies_after=math.inf):
        self._rng = random.Random(7)
        self._noise, self._limits, self._drift = noise, limits, drift
        self._seconds, self._dies_after = seconds, dies_after
        self.calls = []

    def limits(self):
        return self._limits

    def verify(self, batch_size, context, rows):
        return self._run("verify", batch_size, context, rows)

    def draft(self, batch_size, context, width):
        return self._run("draft", batch_size, context, width)

    def draft_extend(self, batch_size, context, rows):
        return self._run("draft_extend", batch_size, context, rows)

    def step_overhead(self, batch_size):
        return None

    def _run(self, operation, batch_size, context, tokens):
        if len(self.calls) >= self._dies_after:
            raise KeyboardInterrupt
        assert 1 <= batch_size <= self._limits.max_batch_size
        assert context + tokens <= self._limits.max_context
        if self._limits.max_tokens:
            assert batch_size * (context + tokens) <= self._limits.max_tokens
        self.calls.append((operation, batch_size, context, tokens))
        time.sleep(self._seconds)
        noise = abs(self._rng.gauss(0, self._noise)) + (self._rng.random() < 0.02) * 5
        slower = 1 + self._drift * len(self.calls)
        return true_us(operation, batch_size, context, tokens) / 1e6 * (1 + noise) * slower


def true_us(operation, batch_size, context, tokens):
    rows = TILE * math.ceil(batch_size * tokens / TILE)
    return BASE_US[operation] * (1 + 0.02 * rows + 1e-4 * batch_size * context)


def median_error(table, operation):
    errors = [
        abs(table.time_us[b][c][n] / true_us(operation, batch_size, context, tokens) - 1)
        for b, batch_size in enumerate(table.batch_sizes)
        for c, context in enumerate(table.contexts)
        for n, tokens in enumerate(table.token_counts)
    ]
    return float(np.median(errors))


def test_tables_recover_the_staircase():
    meter = StaircaseMeter()
    measured = run_profile(meter)
    tables = measured.tables
    for table, operation in [
        (tables.target, "verify"),
        (tables.draft, "draft"),
        (tables.draft_extend, "draft_extend"),
    ]:
        assert median_error(table, operation) < 0.02
        samples = np.asarray(table.samples)
        assert (samples[:, 0] >= Sampling().min_visits).all()
        # Beyond the first context only a few counts are measured; the others are filled in.
        assert ((samples[:, 1:] > 0).sum(axis=2) >= 2).all()
    # Both sides of the steps at batch size 1 were found.
    assert {8, 9, 16, 17} <= set(tables.target.token_counts)
    assert tables.step_overhead_us is None
    assert measured.heldout.points == Sampling().heldout_points
    assert measured.heldout.median_error < 0.05
    assert measured.sampling["imprecise_points"] <= 0.02 * measured.sampling["points"]


def test_heldout_points_are_in_no_table():
    for seed in range(5):
        grid = default_grid(LIMITS)
        references = choose_references(grid)
        with Sampler(StaircaseMeter(), Sampling(seed=seed), references) as sampler:
            measuring = run._Run(sampler, LIMITS, grid)
            measuring.measure()
        in_tables = {point for operation in NAMES for point in measuring._points(operation)}
        assert len(measuring._heldout) == Sampling().heldout_points
        assert measuring._heldout.isdisjoint(in_tables)
        assert all(sampler.has(point) for point in measuring._heldout | in_tables)


def test_heldout_error_tells_a_bad_grid_from_a_good_one():
    coarse = Sampling(interpolation_tolerance=10.0)
    bad = run_profile(
        StaircaseMeter(), grid=make_grid((1, 4), (960,), (1, 24), (1, 8), (1, 24)), sampling=coarse
    )
    good = run_profile(StaircaseMeter(), grid=default_grid(LIMITS))
    assert bad.tables.target.token_counts == [1, 24]
    assert bad.heldout.median_error > 1.5 * good.heldout.median_error


def test_smooth_costs_need_no_refinement():
    class Smooth(StaircaseMeter):
        def _run(self, operation, batch_size, context, tokens):
            super()._run(operation, batch_size, context, tokens)
            return 1e-3 * (1 + 0.01 * tokens)

    grid = default_grid(LIMITS)
    tables = run_profile(Smooth(noise=0.0), grid=grid).tables
    assert tuple(tables.target.token_counts) == grid.token_counts["verify"]
    assert tuple(tables.draft.token_counts) == grid.token_counts["draft"]


def test_drift_is_not_structure():
    # The device slows down to half its speed during the run; equal counts must still agree.
    class Drifting(StaircaseMeter):
        def _run(self, operation, batch_size, context, tokens):
            super()._run(operation, batch_size, context, tokens)
            return 1e-3 * (1 + min(len(self.calls) / 400, 1.0))

    sampling = Sampling(interpolation_tolerance=10.0, heldout_points=0, max_visits=8, tolerance=0)
    grid = make_grid((1,), (128,), (1, 2, 4, 8), (1,), (1,))
    measured = run_profile(Drifting(noise=0.0), grid=grid, sampling=sampling)
    times_us = np.asarray(measured.tables.target.time_us[0][0])
    assert np.ptp(times_us) / times_us.mean() < 0.02
    assert measured.sampling["drift"] > 1.3


def test_visits_during_a_change_of_speed_do_not_count():
    class Jumping(StaircaseMeter):
        def _run(self, operation, batch_size, context, tokens):
            super()._run(operation, batch_size, context, tokens)
            # Slow for 37 passes, fast for the next 37.
            return 1e-3 * (1 + (len(self.calls) // 37) % 2)

    sampling = Sampling(interpolation_tolerance=10.0, heldout_points=0)
    grid = make_grid((1,), (128,), (1, 2, 4, 8), (1,), (1,))
    measured = run_profile(Jumping(noise=0.0), grid=grid, sampling=sampling)
    times_us = np.asarray(measured.tables.target.time_us[0][0])
    assert np.ptp(times_us) / times_us.mean() < 0.02


def test_long_passes_are_repeated_less():
    short = run_profile(StaircaseMeter()).tables.target.samples[0][0][0]
    slow = StaircaseMeter()
    slow._run = lambda *point: 1e3 * StaircaseMeter._run(slow, *point)
    long = run_profile(slow).tables.target.samples[0][0][0]
    assert long < short


def test_noisy_points_get_more_samples():
    quiet = run_profile(StaircaseMeter(noise=0.001)).tables.target.samples
    noisy = run_profile(StaircaseMeter(noise=0.1)).tables.target.samples
    assert np.mean(noisy) > 1.5 * np.mean(quiet)
    assert np.max(noisy) <= Sampling().max_visits * Sampling().visit_passes


def test_precision_is_a_confidence_interval():
    rng = random.Random(1)
    covered = 0
    for _ in range(300):
        sampler = Sampler(StaircaseMeter(), Sampling(), [])
        point = object()
        sampler._values[point] = [rng.gauss(100, 5) for _ in range(24)]
        reach = sampler.precision(point) * 2
        covered += abs(sampler.median_us(point) - 100) / sampler.median_us(point) <= reach
    assert covered >= 0.9 * 300


def test_shapes_that_do_not_fit_are_filled_but_never_run():
    limits = dataclasses.replace(LIMITS, max_tokens=2500)  # the fake asserts that this is kept
    tables = run_profile(StaircaseMeter(limits=limits)).tables
    samples = np.asarray(tables.target.samples)
    assert tables.target.batch_sizes == [1, 2, 3, 4]
    assert (samples[-1, -1] == 0).all() and (samples[:, 0] > 0).all()
    times_us = np.asarray(tables.target.time_us)
    assert (np.diff(times_us, axis=1)[-1] >= -0.05 * times_us[-1, 0]).all()


def test_no_batch_fits():
    with pytest.raises(ProfileError, match="fits"):
        run_profile(StaircaseMeter(limits=dataclasses.replace(LIMITS, max_tokens=10)))


# Kill and resume


@pytest.mark.parametrize("dies_after", [1, 200, 1500])
def test_killed_run_resumes_without_repeating(tmp_path, dies_after):
    journal = journal_path(tmp_path / "p.json")
    whole = StaircaseMeter()
    expected = run_profile(whole)

    first = StaircaseMeter(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        run_profile(first, journal=journal)
    second = StaircaseMeter()
    measured = run_profile(second, journal=journal)

    # Beyond the other run's work: warm-up of points seen before and the visit that was cut.
    assert len(first.calls) + len(second.calls) < 1.25 * len(whole.calls)
    assert median_error(measured.tables.target, "verify") < 0.02
    assert measured.heldout.points == expected.heldout.points
    lines = journal.read_text().splitlines()
    assert measured.sampling["samples"] == sum(len(json.loads(x)["times_us"]) for x in lines[1:])
    assert measured.seconds == pytest.approx(sum(json.loads(x)["seconds"] for x in lines[1:]))


def test_torn_last_line_is_dropped_and_overwritten(tmp_path):
    journal = journal_path(tmp_path / "p.json")
    with pytest.raises(KeyboardInterrupt):
        run_profile(StaircaseMeter(dies_after=300), journal=journal)
    whole = journal.read_bytes()
    for cut in (1, 7, 30):
        journal.write_bytes(whole[:-cut])
        measured = run_profile(StaircaseMeter(), journal=journal)
        assert measured.num_points > 0
        for line in journal.read_text().splitlines():
            json.loads(line)


def test_finished_journal_measures_hardly_anything_again(tmp_path):
    journal = journal_path(tmp_path / "p.json")
    whole, again = StaircaseMeter(), StaircaseMeter()
    first = run_profile(whole, journal=journal)
    second = run_profile(again, journal=journal)
    # Knowing all times from the start, it may split an interval that the first run left.
    assert len(again.calls) < 0.1 * len(whole.calls)
    assert second.heldout.points == first.heldout.points


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sampling": Sampling(tolerance=0.5)}, "sampling"),
        ({"grid": make_grid((1,), (128,), (1, 2), (1,), (1, 2))}, "grid"),
        ({"host": "another"}, "host"),
    ],
)
def test_journal_of_other_settings_is_refused(tmp_path, change, expected):
    journal = journal_path(tmp_path / "p.json")
    grid = make_grid((1,), (64,), (1, 2), (1,), (1, 2))
    run_profile(StaircaseMeter(), journal=journal, grid=grid, host="one")
    with pytest.raises(ProfileError, match=rf"other settings \({expected}\)"):
        run_profile(StaircaseMeter(), journal=journal, **{"grid": grid, "host": "one", **change})


@pytest.mark.parametrize("line", ["{", "[]", '{"point": 1}', "\xff"])
def test_damaged_journal_is_refused(tmp_path, line):
    journal = journal_path(tmp_path / "p.json")
    run_profile(StaircaseMeter(), journal=journal, grid=SMALL)
    lines = journal.read_text().splitlines()
    for position in (0, 1):
        journal.write_text("\n".join([*lines[:position], line, *lines[position:]]) + "\n")
        with pytest.raises(ProfileError, match="journal") as caught:
            run_profile(StaircaseMeter(), journal=journal, grid=SMALL)
        assert "\n" not in str(caught.value)


# Budget


def test_budget_ends_the_run_in_time():
    meter = StaircaseMeter(seconds=0.001, noise=0.5)
    begin = time.monotonic()
    measured = run_profile(
        meter, budget_seconds=3.0, grid=make_grid((1, 2), (128,), (1, 8, 24), (1, 8), (1, 8))
    )
    assert time.monotonic() - begin < 6.0
    assert measured.sampling["imprecise_points"] > 0
    assert measured.heldout is not None


def test_budget_too_small_for_the_grid_says_so_and_resumes(tmp_path):
    journal = journal_path(tmp_path / "p.json")
    meter = StaircaseMeter(seconds=0.001)
    with pytest.raises(ProfileError, match="--budget-seconds"):
        run_profile(meter, budget_seconds=0.1, journal=journal)
    measured = run_profile(StaircaseMeter(), journal=journal)
    assert measured.num_points > 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, None])
def test_impossible_times_of_the_meter(bad):
    meter = StaircaseMeter()
    meter.verify = lambda batch_size, context, rows: bad
    with pytest.raises(ProfileError, match="the meter returned"):
        run_profile(meter)


# Grid and result


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    "limits",
    [LIMITS, Limits(1, 2, 1, 1), Limits(33, 131072, 65, 10), Limits(256, 100, 64, 8, 10**6)],
)
def test_default_grid_covers_the_limits(limits, quick):
    grid = default_grid(limits, quick)
    for axis in (grid.batch_sizes, grid.contexts, *grid.token_counts.values()):
        assert list(axis) == sorted(set(axis)) and axis[0] >= 1
    assert grid.batch_sizes[-1] == limits.max_batch_size
    for each in PASSES:
        counts = grid.token_counts[each.name]
        assert counts[0] == 1 and counts[-1] == limits.most(each)
    assert grid.contexts[-1] + limits.max_verify_rows <= max(limits.max_context, 2)


def test_quick_is_much_quicker():
    slow, quick = StaircaseMeter(), StaircaseMeter()
    run_profile(slow)
    run_profile(quick, grid=default_grid(LIMITS, quick=True), sampling=Sampling.quick())
    assert len(quick.calls) < len(slow.calls) / 3


def test_write_profile_saves_provenance_and_drops_the_journal(tmp_path):
    output = tmp_path / "deep" / "p.json"
    measured = run_profile(StaircaseMeter(), journal=journal_path(output))
    assert journal_path(output).exists()
    profile = write_profile(measured, make_identity(), output, "cast-sglang profile --x")
    assert load_profile(output) == profile and not journal_path(output).exists()
    assert profile.provenance.command == "cast-sglang profile --x"
    assert profile.provenance.heldout == measured.heldout
    assert profile.provenance.sampling["seed"] == 0
    assert profile.provenance.device_name == make_identity().device_name
    facts = summarize(measured, output)
    assert json.loads(json.dumps(facts))["points"] == measured.num_points
    CostModel(profile, LIMITS).step_costs(3, 500)


def test_progress_goes_to_stderr_only(capsys):
    run_profile(StaircaseMeter(), grid=SMALL, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "points" in captured.err
