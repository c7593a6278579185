"""The profiler against a fake device whose true costs are known."""

import dataclasses
import json
from typing import NamedTuple

import numpy as np
import pytest

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.costs.passes import NAMES, PASSES
from cast_sglang.costs.profiles import load_profile, save_profile
from cast_sglang.costs.schema import NO_DRAFT, validate_profile
from cast_sglang.errors import ProfileError
from cast_sglang.profiling import run, sampler
from cast_sglang.profiling.grid import default_grid
from cast_sglang.profiling.journal import journal_path
from cast_sglang.profiling.meter import Sampling
from cast_sglang.profiling.run import (
    Measured,
    choose_references,
    make_profile,
    run_profile,
    summarize,
)
from tests.support.builders import make_identity
from tests.support.meters import LIMITS, Clock, StaircaseMeter, make_grid, true_us

SMALL = make_grid((1,), (64,), (1, 2), (1,), (1, 2))
# A device of few shapes, for runs to their end: grid, refinement and held-out points.
FEW = Limits(max_batch_size=2, max_context=512, max_verify_rows=16, max_width=4)
BRIEF = Sampling(max_visits=6, heldout_points=9)


class Run(NamedTuple):
    meter: StaircaseMeter
    measured: Measured
    journal: bytes


def run_whole(folder, limits, sampling) -> Run:
    meter, journal = StaircaseMeter(limits=limits), journal_path(folder / "p.json")
    measured = run_profile(meter, journal=journal, sampling=sampling)
    return Run(meter, measured, journal.read_bytes())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), LIMITS, None)


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("brief"), FEW, BRIEF)


def median_error(table, operation):
    errors = [
        abs(table.time_us[b][c][n] / true_us(operation, batch_size, context, tokens) - 1)
        for b, batch_size in enumerate(table.batch_sizes)
        for c, context in enumerate(table.contexts)
        for n, tokens in enumerate(table.token_counts)
    ]
    return float(np.median(errors))


def test_tables_recover_the_staircase(whole):
    measured = whole.measured
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
    grid, num_refined = default_grid(FEW), 0
    for seed in range(5):
        sampling = dataclasses.replace(BRIEF, seed=seed, max_visits=3)
        meter = StaircaseMeter(limits=FEW)
        with sampler.Sampler(meter, sampling, choose_references(grid)) as timing:
            measuring = run._Run(timing, FEW, grid)
            measuring.measure()
        in_tables = {point for operation in NAMES for point in measuring._points(operation)}
        num_refined += len(measuring._axes["verify"].num_tokens) > len(grid.token_counts["verify"])
        assert len(measuring._heldout) == BRIEF.heldout_points
        assert measuring._heldout.isdisjoint(in_tables)
        assert all(timing.has(point) for point in measuring._heldout | in_tables)
    assert num_refined == 5  # refinement, which must keep clear of them, took place


def test_heldout_error_tells_a_bad_grid_from_a_good_one(whole):
    coarse = Sampling(interpolation_tolerance=10.0)
    bad = run_profile(
        StaircaseMeter(), grid=make_grid((1, 4), (960,), (1, 24), (1, 8), (1, 24)), sampling=coarse
    )
    assert bad.tables.target.token_counts == [1, 24]
    assert bad.heldout.median_error > 1.5 * whole.measured.heldout.median_error


def test_smooth_costs_need_no_refinement():
    class Smooth(StaircaseMeter):
        def _seconds(self, operation, batch_size, context, tokens):
            return 1e-3 * (1 + 0.01 * tokens)

    grid = default_grid(FEW)
    tables = run_profile(Smooth(limits=FEW), grid=grid, sampling=BRIEF).tables
    assert tuple(tables.target.token_counts) == grid.token_counts["verify"]
    assert tuple(tables.draft.token_counts) == grid.token_counts["draft"]


def test_shapes_that_do_not_fit_are_filled_but_never_run():
    limits = dataclasses.replace(LIMITS, max_tokens=2500)  # the fake asserts that this is kept
    grid = make_grid((1, 2, 3, 4), (128, 512, 960), (1, 4, 12, 24), (1, 8), (1, 24))
    tables = run_profile(StaircaseMeter(limits=limits), grid=grid, sampling=BRIEF).tables
    samples = np.asarray(tables.target.samples)
    assert tables.target.batch_sizes == [1, 2, 3, 4]
    assert (samples[-1, -1] == 0).all() and (samples[:, 0] > 0).all()
    for each in PASSES:
        table = tables.table_of(each)
        times_us = np.asarray(table.time_us)
        assert (np.diff(times_us, axis=0) >= 0).all() and (np.diff(times_us, axis=1) >= 0).all()
        # What the context adds is linear in batch size and context, so the corner is found.
        corner = [true_us(each.name, 4, 960, count) for count in table.token_counts]
        assert times_us[-1, -1] == pytest.approx(corner, rel=0.1)


def test_references_fit_where_few_batch_sizes_do():
    limits = Limits(64, 1024, 24, 8, max_tokens=700)  # the fake asserts that this is kept
    grid = make_grid((1, 2, 4, 64), (128,), (1, 24), (1, 8), (1, 24))
    tables = run_profile(StaircaseMeter(limits=limits), grid=grid, sampling=BRIEF).tables
    assert tables.target.batch_sizes == [1, 2, 4]


def test_no_batch_fits():
    with pytest.raises(ProfileError, match="fits"):
        run_profile(StaircaseMeter(limits=dataclasses.replace(LIMITS, max_tokens=10)))


def test_the_overhead_of_steps_is_measured_where_it_can_be():
    meter = StaircaseMeter()
    meter.step_overhead = lambda batch_size: 1e-5 * batch_size
    grid = make_grid((1, 3), (64,), (1, 2), (1,), (1, 2))
    tables = run_profile(meter, grid=grid, sampling=BRIEF).tables
    ratios = np.array(tables.step_overhead_us) / (10.0 * np.array(tables.target.batch_sizes))
    assert ratios == pytest.approx(ratios[0], rel=0.05) and ratios[0] == pytest.approx(1.0, rel=0.1)


# Kill and resume


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_killed_run_resumes_without_repeating(tmp_path, brief, share):
    journal = journal_path(tmp_path / "p.json")
    num_calls = len(brief.meter.calls)
    first = StaircaseMeter(limits=FEW, dies_after=1 + int(share * num_calls))
    with pytest.raises(KeyboardInterrupt):
        run_profile(first, journal=journal, sampling=BRIEF)
    lines_before = journal.read_text().splitlines()
    second = StaircaseMeter(limits=FEW)
    measured = run_profile(second, journal=journal, sampling=BRIEF)

    # Beyond the other run's work: warm-up of points seen before and the visit that was cut.
    assert len(first.calls) + len(second.calls) < 1.25 * num_calls
    assert median_error(measured.tables.target, "verify") < 0.02
    assert measured.heldout.points == brief.measured.heldout.points
    num_before = len(lines_before) - 1
    assert summarize(measured, "p.json")["resumed_visits"] == num_before
    assert bool(num_before) == (share > 0.0)
    lines = journal.read_text().splitlines()
    assert measured.sampling["samples"] == sum(len(json.loads(x)["times_us"]) for x in lines[1:])
    assert measured.seconds == pytest.approx(sum(json.loads(x)["seconds"] for x in lines[1:]))


def test_finished_journal_measures_hardly_anything_again(tmp_path, brief):
    journal = journal_path(tmp_path / "p.json")
    journal.write_bytes(brief.journal)
    again = StaircaseMeter(limits=FEW)
    second = run_profile(again, journal=journal, sampling=BRIEF)
    # Knowing all times from the start, it may split an interval that the first run left.
    assert len(again.calls) < 0.1 * len(brief.meter.calls)
    assert second.heldout.points == brief.measured.heldout.points


def test_a_resumed_run_says_so(tmp_path, capsys):
    journal = journal_path(tmp_path / "p.json")
    options = {"grid": SMALL, "sampling": BRIEF, "journal": journal, "progress": True}
    with pytest.raises(KeyboardInterrupt):
        run_profile(StaircaseMeter(dies_after=60), **options)
    assert "resumed" not in capsys.readouterr().err
    lines = journal.read_text().splitlines()[1:]
    points = {tuple(json.loads(line)["point"]) for line in lines}
    measured = run_profile(StaircaseMeter(), **options)
    said = f"resumed: {len(points)} points were measured before, in 0 s ({journal})"
    assert said in capsys.readouterr().err
    assert summarize(measured, "p.json")["resumed_visits"] == len(lines) > 0


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
    run_profile(StaircaseMeter(), journal=journal, grid=SMALL, host="one")
    with pytest.raises(ProfileError, match=rf"other settings \({expected}\)"):
        run_profile(StaircaseMeter(), journal=journal, **{"grid": SMALL, "host": "one", **change})


# Budget


@pytest.fixture
def clock(monkeypatch):
    """The time by which budgets are kept; only passes take any."""
    clock = Clock()
    monkeypatch.setattr(sampler, "time", clock)
    return clock


def test_budget_ends_the_run_in_time(clock):
    grid = make_grid((1, 2), (128,), (1, 8, 24), (1, 8), (1, 8))
    measured = run_profile(StaircaseMeter(noise=0.5, clock=clock), budget_seconds=0.5, grid=grid)
    # One visit and the references around it may begin just before the end.
    assert 0.5 <= clock.now < 0.6
    assert measured.sampling["imprecise_points"] > 0
    assert measured.heldout is not None


def test_a_budget_too_small_for_the_grid_leaves_tables_of_the_right_size(clock):
    """A busy machine at a first start: some of the grid was visited, the rest is predicted."""
    meter = StaircaseMeter(limits=FEW, clock=clock)
    with pytest.raises(ProfileError, match="after .* grid points"):
        run_profile(meter, budget_seconds=0.2, sampling=BRIEF)
    partial = run_profile(meter, budget_seconds=0.2, sampling=BRIEF, allow_partial=True)
    for each in PASSES:
        table = getattr(partial.tables, each.table)
        times, samples = np.array(table.time_us), np.array(table.samples)
        assert (times > 0).all()
        assert (samples == 0).any() or each.model == "draft"
        for b, batch_size in enumerate(table.batch_sizes):
            for n, tokens in enumerate(table.token_counts):
                true = true_us(each.name, batch_size, table.contexts[0], tokens)
                assert 0.4 < times[b][0][n] / true < 2.5


def test_budget_too_small_for_the_grid_says_so_and_resumes(tmp_path, clock):
    journal = journal_path(tmp_path / "p.json")
    options = {"journal": journal, "sampling": BRIEF}
    meter = StaircaseMeter(limits=FEW, clock=clock)
    with pytest.raises(ProfileError, match="after .* grid points.*--budget-seconds"):
        run_profile(meter, budget_seconds=0.1, **options)
    measured = run_profile(StaircaseMeter(limits=FEW), **options)
    assert measured.num_points > 0


def test_a_run_that_cannot_resume_does_not_advise_it(clock):
    meter = StaircaseMeter(limits=FEW, clock=clock)
    with pytest.raises(ProfileError, match=r"after \d+ of \d+ grid points$"):
        run_profile(meter, budget_seconds=0.1, sampling=BRIEF)


# Result


def test_quick_is_much_quicker(whole):
    quick = StaircaseMeter()
    run_profile(quick, grid=default_grid(LIMITS, quick=True), sampling=Sampling.quick())
    assert len(quick.calls) < len(whole.meter.calls) / 3


def test_a_profile_holds_provenance(tmp_path, brief):
    measured = brief.measured
    profile = make_profile(measured, make_identity(), "cast-sglang profile --x")
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    assert profile.provenance.command == "cast-sglang profile --x"
    assert profile.provenance.heldout == measured.heldout
    assert profile.provenance.sampling["seed"] == 0
    assert profile.provenance.device_name == make_identity().device_name
    facts = summarize(measured, tmp_path / "p.json")
    assert json.loads(json.dumps(facts))["points"] == measured.num_points
    assert facts["resumed_visits"] == 0
    CostModel(profile, FEW).step_costs(1, 500)


def test_without_a_draft_verify_alone_is_measured():
    class Draftless(StaircaseMeter):
        draft = draft_extend = None

        def step_overhead(self, batch_size):
            return 1e-4

    limits = dataclasses.replace(FEW, max_width=0, max_extend_rows=0)
    meter = Draftless(limits=limits)
    measured = run_profile(meter, sampling=BRIEF)
    assert {operation for operation, *_ in meter.calls} == {"verify"}
    tables = measured.tables
    assert tables.draft is tables.draft_extend is None
    assert median_error(tables.target, "verify") < 0.03
    assert len(tables.step_overhead_us) == len(tables.target.batch_sizes)
    assert measured.heldout.points > 0
    profile = make_profile(measured, make_identity(draft=NO_DRAFT), "command")
    validate_profile(profile)
