"""Costs between, at and beyond grid points, against the definition written out."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits
from cast_sglang.costs.model import CostModel, plain_units, step_units
from tests.support.builders import make_profile, make_table
from tests.support.simulator import make_costs

LIMITS = Limits(max_batch_size=8, max_context=4096, max_verify_rows=12, max_width=8)


def make_model(profile=None, lookup="linear", **changes):
    return CostModel(
        profile or make_profile(), dataclasses.replace(LIMITS, **changes), lookup=lookup
    )


def verify_us(model, batch_size, context):
    costs = model.step_costs(batch_size, context)
    return costs.verify.astype(np.float64) * costs.unit_us


def test_exact_at_measured_points():
    profile = make_profile()
    model = make_model(profile)
    for table, field in [(profile.target, "verify"), (profile.draft, "draft")]:
        for b, batch_size in enumerate(table.batch_sizes):
            for c, context in enumerate(table.contexts):
                costs = model.step_costs(batch_size, context)
                indexes = [n - 1 for n in table.token_counts]
                times_us = getattr(costs, field).astype(np.float64)[indexes] * costs.unit_us
                np.testing.assert_allclose(times_us, table.time_us[b][c], rtol=1e-6)
                assert costs.unit_us == profile.target.time_us[b][c][0]
                assert costs.verify[0] == 1.0


def test_shapes_and_types():
    costs = make_model().step_costs(2, 300.5)
    assert [t.shape for t in costs[:3]] == [(12,), (8,), (12,)]
    assert all(array.dtype == np.float32 for array in costs[:3])
    assert costs.overhead == pytest.approx((50 + 30 / 3) / costs.unit_us)
    assert costs.plain_overhead == costs.overhead
    assert plain_units(costs) == pytest.approx(1.0 + costs.overhead)


def test_linear_between_points():
    table = make_table()
    model = make_model()
    times_us = np.asarray(table.time_us)
    # n = 3 lies between 2 and 4; batch 2 a third of the way from 1 to 4; 576 halfway in context.
    assert verify_us(model, 1, 128)[2] == pytest.approx(times_us[0, 0, 1:3].mean(), rel=1e-6)
    batch_2 = times_us[0, 0] + (times_us[1, 0] - times_us[0, 0]) / 3
    assert verify_us(model, 2, 128)[3] == pytest.approx(batch_2[2], rel=1e-6)
    assert verify_us(model, 1, 576)[0] == pytest.approx(times_us[0, :, 0].mean(), rel=1e-6)


def test_nearest_is_the_papers_select():
    table = make_table()
    model = make_model(lookup="nearest")
    for context, expected in [(0, 0), (1, 0), (128, 0), (129, 1), (1024, 1), (1025, 1), (9999, 1)]:
        assert verify_us(model, 1, context)[0] == pytest.approx(table.time_us[0][expected][0])
    for batch_size, expected in [(1, 0), (2, 1), (4, 1), (8, 1)]:
        assert verify_us(model, batch_size, 128)[0] == pytest.approx(table.time_us[expected][0][0])


def test_beyond_the_grid_the_last_slope_goes_on():
    table = make_table()
    times_us = np.asarray(table.time_us)
    model = make_model()
    tokens_slope = (times_us[0, 0, 3] - times_us[0, 0, 2]) / 4
    expected = times_us[0, 0, 3] + 4 * tokens_slope
    assert verify_us(model, 1, 128)[11] == pytest.approx(expected, rel=1e-6)

    batch_slope = (times_us[1, 0, 0] - times_us[0, 0, 0]) / 3
    expected = times_us[1, 0, 0] + 4 * batch_slope
    assert verify_us(model, 8, 128)[0] == pytest.approx(expected, rel=1e-6)

    context_slope = (times_us[0, 1, 0] - times_us[0, 0, 0]) / 896
    expected = times_us[0, 1, 0] + 1024 * context_slope
    assert verify_us(model, 1, 2048)[0] == pytest.approx(expected, rel=1e-6)
    assert verify_us(model, 1, 4096)[0] == pytest.approx(expected, rel=1e-6)
    # Below the grid its first point holds.
    assert verify_us(model, 1, 0)[0] == pytest.approx(times_us[0, 0, 0])


def test_falling_costs_do_not_fall_beyond_the_grid():
    table = make_table()
    falling = [[[1000.0, 1000.0, 900.0, 800.0]] * 2, [[900.0, 900.0, 800.0, 700.0]] * 2]
    model = make_model(make_profile(target=type(table)(**{**_fields(table), "time_us": falling})))
    assert verify_us(model, 1, 128)[11] == pytest.approx(800.0)
    assert verify_us(model, 8, 128)[0] == pytest.approx(900.0)


def _fields(table):
    return {name: getattr(table, name) for name in table.__struct_fields__}


def test_extrapolated_axes_are_named():
    model = make_model()
    assert model.extrapolated == {
        f"{table}.{axis}"
        for table in ("target", "draft", "draft_extend")
        for axis in ("batch_sizes", "contexts", "token_counts")
    } - {"draft.token_counts"}
    inside = make_model(max_batch_size=4, max_context=1024, max_verify_rows=8)
    assert inside.extrapolated == frozenset()


def test_single_point_tables_are_flat():
    table = make_table(batch_sizes=(1,), contexts=(128,), token_counts=(1,))
    profile = make_profile(target=table, draft=table, draft_extend=table, step_overhead_us=None)
    costs = make_model(profile).step_costs(8, 4096)
    assert costs.verify.tolist() == [1.0] * 12
    assert costs.overhead == 0.0 and plain_units(costs) == 1.0


def test_one_entry_per_bucket():
    model = make_model()
    bucket = CONTEXT_BUCKET_TOKENS
    assert model.step_costs(2, bucket + 1) is model.step_costs(2, 2 * bucket)
    assert model.step_costs(2, 2 * bucket) is not model.step_costs(2, 2 * bucket + 0.5)
    assert model.step_costs(2, 2 * bucket) is not model.step_costs(3, 2 * bucket)


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("cast_sglang.costs.model.MAX_CACHED_STEPS", 3)
    model = make_model()
    entries = [model.step_costs(1, context) for context in (64, 128, 192, 256)]
    assert model.step_costs(1, 256) is entries[3] and len(model._cache) == 3
    assert model.step_costs(1, 64) is not entries[0]


@pytest.mark.parametrize(("batch_size", "context"), [(0, 1), (9, 1), (1, -1000), (1, math.nan)])
def test_out_of_range_requests(batch_size, context):
    with pytest.raises(ValueError):
        make_model().step_costs(batch_size, context)


def test_lookups_have_names():
    with pytest.raises(ValueError, match="'cubic' is none of linear, nearest"):
        make_model(lookup="cubic")


@settings(deadline=None)
@given(st.integers(1, 64), st.floats(0, 1e6), st.sampled_from(["linear", "nearest"]))
def test_costs_are_positive_and_finite_anywhere(batch_size, context, lookup):
    limits = Limits(64, 10**6, max_verify_rows=64, max_width=16)
    model = CostModel(make_profile(), limits, lookup=lookup)
    costs = model.step_costs(batch_size, context)
    for tensor in costs[:3]:
        assert np.isfinite(tensor).all() and (tensor > 0).all()


def test_step_units_are_the_sum_of_the_passes():
    step_costs = make_costs("memory", 1)
    units = step_units(step_costs, (2, 1), 8, 4)
    parts = (step_costs.verify[7], step_costs.draft[1], step_costs.draft[0])
    expected = sum(map(float, parts)) + float(step_costs.draft_extend[3]) + step_costs.overhead
    assert units == pytest.approx(expected)
    # A plain step extends no draft, and has an overhead of its own.
    assert step_costs.plain_overhead != step_costs.overhead
    assert step_units(step_costs, (), 1, 0) == pytest.approx(plain_units(step_costs))
    # One that looked for copies and verifies the root alone has that of steps with a tree.
    looked = float(step_costs.verify[0]) + step_costs.overhead
    assert step_units(step_costs, (), 1, 0, drafts=True) == pytest.approx(looked)
