"""The largest shapes: what a record accepts, and what lies beyond tables."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits, exceeded
from cast_sglang.costs.passes import PASSES
from tests.support.builders import make_draftless_profile, make_profile, make_table

LIMITS = Limits(max_batch_size=4, max_context=1032, max_verify_rows=8, max_width=8)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_every_limit_is_at_least_1_but_those_of_a_draft(name):
    least = 0 if name in ("max_width", "max_extend_rows") else 1
    assert getattr(dataclasses.replace(LIMITS, **{name: least}), name) == least
    with pytest.raises(ValueError, match=f"{name} is {least - 1}"):
        dataclasses.replace(LIMITS, **{name: least - 1})


def test_without_a_draft_there_is_verify_alone():
    limits = dataclasses.replace(LIMITS, max_width=0, max_extend_rows=0)
    assert [each.name for each in limits.passes] == ["verify"] and LIMITS.passes == PASSES
    assert Limits.of_tables(make_draftless_profile()) == limits
    assert exceeded(make_draftless_profile(), limits) == frozenset()
    more = dataclasses.replace(limits, max_verify_rows=9, max_context=1033)
    assert exceeded(make_draftless_profile(), more) == {"target.token_counts"}
    assert exceeded(make_profile(), limits) == frozenset()


def test_draft_extend_runs_no_more_rows_than_verify_unless_it_is_said():
    assert [LIMITS.most(each) for each in PASSES] == [8, 8, 8]
    fewer = dataclasses.replace(LIMITS, max_width=2, max_extend_rows=3)
    assert [fewer.most(each) for each in PASSES] == [8, 2, 3]


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_the_longest_context_leaves_room_for_the_pass(max_context, rows):
    longest = Limits(1, max_context, rows, 1).longest_context
    assert longest >= 1 and longest + rows <= max(max_context, rows + 1)
    assert longest <= CONTEXT_BUCKET_TOKENS or longest % CONTEXT_BUCKET_TOKENS == 0
    assert Limits(1, longest + rows, rows, 1).longest_context == longest


def test_tables_do_not_exceed_themselves():
    profile = make_profile()
    limits = Limits.of_tables(profile)
    assert limits == dataclasses.replace(LIMITS, max_extend_rows=8)
    assert limits.longest_context == 1024
    assert exceeded(profile, limits) == frozenset()


def test_of_tables_of_different_ends_the_largest_count():
    profile = make_profile(draft=make_table(batch_sizes=(1, 16), token_counts=(1, 2)))
    limits = Limits.of_tables(profile)
    assert (limits.max_batch_size, limits.max_width, limits.max_verify_rows) == (16, 2, 8)
    assert exceeded(profile, limits) == {"target.batch_sizes", "draft_extend.batch_sizes"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"max_batch_size": 5}, {f"{t}.batch_sizes" for t in ("target", "draft", "draft_extend")}),
        ({"max_context": 4096}, {f"{t}.contexts" for t in ("target", "draft", "draft_extend")}),
        ({"max_verify_rows": 9, "max_extend_rows": 8}, {"target.token_counts"}),
        ({"max_width": 9}, {"draft.token_counts"}),
        ({"max_extend_rows": 9}, {"draft_extend.token_counts"}),
    ],
)
def test_each_axis_is_compared_with_its_own_limit(change, expected):
    assert exceeded(make_profile(), dataclasses.replace(LIMITS, **change)) == expected
