"""Which shapes are measured: a grid up to the limits, and intervals that can be halved."""

import random

import numpy as np
import pytest

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.passes import PASSES
from cast_sglang.profiling.grid import Interval, default_grid, log_uniform, spread
from cast_sglang.profiling.journal import Point
from tests.support.meters import LIMITS


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


def test_the_target_is_measured_more_finely_than_the_draft():
    grid = default_grid(Limits(10, 32768 + 64, 20, 20))
    assert grid.batch_sizes == (1, 2, 3, 4, 6, 8, 10)
    assert grid.contexts == (128, 512, 2048, 8192, 32768)
    assert grid.token_counts["verify"] == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    assert grid.token_counts["draft"] == grid.token_counts["draft_extend"] == (1, 4, 16, 20)
    quick = default_grid(Limits(10, 32768 + 64, 20, 20), quick=True)
    assert quick.batch_sizes == (1, 4, 10) and quick.contexts == (128, 8192, 32768)
    assert quick.token_counts["verify"] == (1, 4, 16, 20)


@pytest.mark.parametrize(
    ("max_tokens", "contexts"),
    [
        (None, (128, 4032)),
        (131072, (128, 4032)),
        (3000, (128, 2944, 4032)),
        (4064, (128, 4032)),
        (191, (128, 4032)),
        (20, (128, 4032)),
    ],
)
def test_a_small_cache_is_measured_to_its_end(max_tokens, contexts):
    limits = Limits(48, 4096, 32, 8, max_tokens, 9)
    assert default_grid(limits, quick=True).contexts == contexts


@pytest.mark.parametrize(
    ("axis", "low", "high", "added"),
    [
        ("batch_size", 4, 8, [6]),
        ("batch_size", 4, 5, []),
        # Times step up after a multiple of a tile: it lies on the line, its successor does not.
        ("num_tokens", 8, 24, [16, 17]),
        ("num_tokens", 8, 10, [9]),
        ("num_tokens", 8, 9, []),
        # Contexts are costed by buckets of 64.
        ("context", 128, 512, [320]),
        ("context", 128, 300, [192]),
        ("context", 128, 192, []),
        ("context", 20, 60, [40]),
    ],
)
def test_an_interval_is_halved_where_it_shows(axis, low, high, added):
    interval = Interval("verify", axis, low, high)
    assert interval.middle == added
    ends = [low, *added, high]
    parts = [(part.low, part.high) for part in interval.split()]
    assert parts == list(zip(ends, ends[1:], strict=False))


def test_halving_to_the_end_reaches_every_count_once():
    pending, reached = [Interval("draft", "num_tokens", 1, 300)], []
    while pending:
        interval = pending.pop()
        reached += interval.middle
        pending += interval.split() if interval.middle else []
    assert sorted(reached) == list(range(2, 300))


def test_the_ends_of_an_interval_differ_from_the_point_in_its_axis_alone():
    interval = Interval("verify", "context", 128, 512)
    low, high, share = interval.ends(Point("verify", 3, 224, 7))
    assert (low, high) == (Point("verify", 3, 128, 7), Point("verify", 3, 512, 7))
    assert share == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("count", "picked"), [(1, [0]), (2, [0, 9]), (3, [0, 4, 9]), (10, [*range(10)]), (99, None)]
)
def test_spread_items_hold_both_ends(count, picked):
    assert spread(range(10), count) == (picked or [*range(10)])
    assert spread([5], count) == [5]


def test_each_octave_is_drawn_equally_often():
    rng = random.Random(0)
    drawn = np.array([log_uniform(rng, (2, 7, 2048)) for _ in range(4000)])
    assert drawn.min() >= 2 and drawn.max() <= 2048
    shares = [np.mean((drawn > 2**k) & (drawn <= 2 ** (k + 1))) for k in range(5, 11)]
    assert shares == pytest.approx([0.1] * 6, abs=0.02)
