"""What a profile may hold: each check that types cannot express, by the name of the field."""

import math

import msgspec
import pytest

from cast_sglang.costs.passes import PASSES
from cast_sglang.costs.schema import (
    CostProfile,
    validate_profile,
)
from cast_sglang.errors import ProfileError
from tests.support.builders import make_draftless_profile, make_profile, make_table


def changed(change):
    """Return a valid profile after a change of its plain data."""
    content = msgspec.to_builtins(make_profile())
    change(content)
    return msgspec.convert(content, CostProfile)


def refused(profile):
    """Return why a profile is refused."""
    with pytest.raises(ProfileError) as caught:
        validate_profile(profile)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("axis", "values", "reason"),
    [
        ("token_counts", [2, 1, 4, 8], "must be strictly increasing"),
        ("token_counts", [1, 2, 2, 8], "must be strictly increasing"),
        ("token_counts", [2, 3, 4, 8], "must start at 1, the unit of all costs"),
        ("token_counts", [0, 1, 4, 8], "holds 0: must be at least 1"),
        ("token_counts", [1, 2, 4, 10**12], "at most 1.07374e+09"),
        ("token_counts", [], "is empty"),
        ("batch_sizes", [4, 1], "must be strictly increasing"),
        ("contexts", [-128, 1024], "holds -128: must be at least 1"),
    ],
)
def test_axes_are_ascending_and_positive(axis, values, reason):
    message = refused(changed(lambda c: c["target"].update({axis: values})))
    assert message.startswith(f"target.{axis} ") and reason in message


def test_only_the_target_must_start_at_one_row():
    others = make_table(token_counts=(2, 4), base_us=100.0)
    validate_profile(make_profile(draft=others, draft_extend=others))


@pytest.mark.parametrize("table", [each.table for each in PASSES])
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("time_us", lambda cube: cube.pop()),
        ("time_us", lambda cube: cube[0].pop()),
        ("spread_us", lambda cube: cube[0][0].append(1.0)),
        ("samples", lambda cube: cube[1][1].pop()),
    ],
)
def test_arrays_have_the_shape_of_their_axes(table, field, change):
    message = refused(changed(lambda c: change(c[table][field])))
    assert message == f"{table}.{field} must have the shape of its axes, [2, 2, 4]"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("time_us", 0.0, "must be positive and at most 1e+09"),
        ("time_us", math.nan, "holds nan"),
        ("time_us", math.inf, "holds inf"),
        ("time_us", 1e10, "holds 10000000000.0"),
        ("spread_us", -0.5, "must be at least 0"),
        ("spread_us", math.nan, "holds nan"),
        ("samples", -1, "must be at least 0"),
    ],
)
def test_every_number_is_in_its_range(field, value, reason):
    def change(content):
        content["draft"][field][1][0][2] = value

    message = refused(changed(change))
    assert message.startswith(f"draft.{field} ") and reason in message


def test_times_may_be_tiny_and_spreads_nothing():
    def change(content):
        content["draft"]["time_us"][1][1][3] = math.ulp(0.0)
        content["draft"]["spread_us"][0][0][0] = 0.0
        content["draft"]["samples"][1][1][3] = 0  # a shape that does not fit the device

    validate_profile(changed(change))


def test_the_first_point_was_measured_unless_the_tables_are_estimated():
    table = make_table()
    bare = msgspec.structs.replace(table, samples=[[[0] * 4] * 2] * 2)
    measured = make_profile(target=bare)
    assert "target.samples: the first point was never measured" in refused(measured)
    provenance = msgspec.structs.replace(measured.provenance, estimated=True)
    validate_profile(msgspec.structs.replace(measured, provenance=provenance))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(step_overhead_us=[1.0]), "step_overhead_us must have one value per"),
        (lambda c: c.update(step_overhead_us=[1.0, -1.0]), "step_overhead_us holds -1.0"),
        (lambda c: c["provenance"].update(tp_size=0), "provenance.tp_size holds 0"),
        (lambda c: c["provenance"].update(page_size=-1), "provenance.page_size"),
        (lambda c: c["provenance"].update(device_memory_bytes=0), "provenance.device_memory_bytes"),
        (lambda c: c["provenance"].update(seconds=-1.0), "provenance.seconds"),
        (
            lambda c: c["provenance"]["target"].update(config_hash="zz"),
            "provenance.target.config_hash must be 64 hexadecimal digits",
        ),
        (
            lambda c: c["provenance"]["draft"].update(config_hash="A" * 64),
            "provenance.draft.config_hash",
        ),
        (
            lambda c: c["provenance"].update(
                heldout={"points": 3, "median_error": math.nan, "p95_error": 1.0}
            ),
            "provenance.heldout holds nan",
        ),
    ],
)
def test_the_rest_is_checked_by_name(change, expected):
    assert refused(changed(change)).startswith(expected)


def test_records_refuse_what_they_do_not_know():
    content = msgspec.to_builtins(make_profile())
    for record in (content, content["draft"], content["provenance"]["target"]):
        record["new"] = 1
        with pytest.raises(msgspec.ValidationError, match="unknown field `new`"):
            msgspec.convert(content, CostProfile)
        del record["new"]
    with pytest.raises(AttributeError, match="immutable"):
        make_profile().step_overhead_us = None


def test_what_was_measured_nowhere_at_a_shape_is_extrapolated():
    whole = make_profile()
    assert whole.target.is_extrapolated == [[False, False], [False, False]]
    assert whole.quotable_contexts == [128, 1024]
    # A few token counts are enough, as the others are interpolated.
    samples = [[[6] * 4, [6, 0, 0, 6]], [[6] * 4, [0] * 4]]
    gaps = msgspec.structs.replace(make_table(), samples=samples)
    assert gaps.is_extrapolated == [[False, False], [False, True]]
    # A summary quotes all tables.
    for each in PASSES:
        assert make_profile(**{each.table: gaps}).quotable_contexts == [128]


def test_an_estimate_has_no_better_contexts_than_its_own():
    bare = msgspec.structs.replace(make_table(), samples=[[[0] * 4] * 2] * 2)
    estimate = make_profile(target=bare, draft=bare, draft_extend=bare)
    assert estimate.quotable_contexts == [128, 1024]


def test_tables_of_a_draft_are_missing_where_there_is_none_and_nowhere_else():
    bare = make_draftless_profile()
    validate_profile(bare)
    assert [each.name for each in bare.passes] == ["verify"]
    assert bare.quotable_contexts == [128, 1024]
    for changes in ({"draft": None}, {"draft_extend": None}, {"draft": None, "draft_extend": None}):
        assert "is missing" in refused(make_profile(**changes))
    assert "draft_extend is missing" in refused(
        msgspec.structs.replace(bare, draft=make_table(base_us=100.0))
    )
