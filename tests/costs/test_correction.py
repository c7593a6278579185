"""What serving learns of pass times, on devices whose true times are known."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from cast_sglang.costs.correction import (
    HORIZON,
    MAX_SCALE,
    REFRESH_EVERY,
    REPORT_AFTER,
    Residuals,
)
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.passes import NAMES
from tests.support.passes import LIMITS, SIZES, record, scale, serve


def spread(residuals, sizes=SIZES):
    """Return how far sizes of one pass are scaled apart, at most."""
    scales = [scale(residuals, size) for size in sizes]
    return max(scales) / min(scales)


def as_the_table(name, tokens):
    return 1.0


def test_without_measurements_the_tables_hold():
    residuals = Residuals(LIMITS)
    residuals.refresh()
    for name in NAMES:
        assert residuals.scales(name, 8, 32).tolist() == [1.0] * 32
    assert residuals.rest(4) == (0.0, 0.0, 0.0)
    assert list(residuals) == [] and residuals.suspects() == []


def test_measurements_count_from_the_next_refresh():
    residuals = Residuals(LIMITS)
    version = residuals.version
    residuals.record("verify", 4, 8, 1.5)
    residuals.record_step(4, 3, 2.0, 1.0)
    assert scale(residuals, 8) == 1.0 and residuals.rest(4) == (0.0, 0.0, 0.0)
    assert residuals.version == version
    residuals.refresh()
    assert scale(residuals, 8) > 1.0 and residuals.rest(4)[0] > 0.0
    assert residuals.version > version


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_a_pass_that_is_off_everywhere_is_known_from_one_of_its_sizes(factor):
    def ratio_of(name, tokens):
        return factor if name == "verify" else 1.0

    residuals = Residuals(LIMITS)
    serve(residuals, random.Random(0), 60, ratio_of, sizes=(8,))
    found = math.log(scale(residuals, 8)) / math.log(factor)
    assert 0.8 < found < 1.2
    # What was never measured takes more than half of it, and other passes hardly any.
    for tokens, batch_size in ((1, 1), (2, 4), (32, 8)):
        others = math.log(scale(residuals, tokens, batch_size=batch_size)) / math.log(factor)
        assert 0.5 < others < found
    for name in ("draft", "draft_extend"):
        assert 0.87 < scale(residuals, 4, operation=name) < 1.15


def test_a_size_that_was_not_measured_follows_its_bucket_then_its_octave_then_its_pass():
    residuals = Residuals(LIMITS)
    record(residuals, 2.0, times=5, tokens=8)
    same, bucket, octave, of_pass = (
        scale(residuals, 8),
        scale(residuals, 7),
        scale(residuals, 16),
        scale(residuals, 8, batch_size=8),
    )
    assert same > 1.01 * bucket > 1.01**2 * octave > 1.01**3 * of_pass > 1.01**4
    # Tokens 7-8 and requests 3-4 share a bucket.
    assert scale(residuals, 6) == scale(residuals, 9) == octave
    assert scale(residuals, 8, batch_size=3) == same
    assert scale(residuals, 8, batch_size=2) == scale(residuals, 1, batch_size=1) == of_pass
    assert scale(residuals, 8, operation="draft") == 1.0


def test_the_last_size_of_an_octave_is_not_the_first_of_the_next():
    residuals = Residuals(LIMITS)
    record(residuals, 2.0, tokens=32)
    assert len(set(residuals.scales("verify", 8, 32).tolist())) == 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("settled", [0, 200])
def test_a_size_that_departs_is_known_after_twenty_passes(settled, factor):
    """One size costs twice the table, or half, from the start or after long; noise is 15 %."""

    def ratio_of(name, tokens):
        return factor if (name, tokens) == ("verify", 8) else 1.0

    found = []
    for seed in range(8):
        residuals, rng = Residuals(LIMITS), random.Random(seed)
        serve(residuals, rng, settled, as_the_table)
        serve(residuals, rng, 20 * len(SIZES), ratio_of)
        others = [math.log(scale(residuals, size)) for size in SIZES if size != 8]
        apart = math.log(scale(residuals, 8)) - np.mean(others)
        found.append(apart / math.log(factor))
        assert np.abs(others).max() < 0.25
    # The first measurements weigh more than those after thousands of passes.
    assert np.mean(found) > (0.6 if settled else 0.85) and min(found) > 0.35
    assert max(found) < 1.2


def test_noise_alone_moves_no_size_against_another():
    ranges = []
    for seed in range(10):
        residuals = Residuals(LIMITS)
        serve(residuals, random.Random(seed), 200, lambda name, tokens: 1.2)
        assert 1.0 < scale(residuals, 8) < 1.4
        ranges.append(spread(residuals))
    assert np.mean(ranges) < 1.1 and max(ranges) < 1.2


def test_the_speed_of_the_moment_ends_in_no_table():
    """All passes take 1.3 times as long for 300 passes, in which other sizes are taken."""
    during, after = [], []
    for seed in range(10):
        residuals, rng = Residuals(LIMITS), random.Random(seed)
        serve(residuals, rng, 75, as_the_table, sizes=(2, 4))
        serve(residuals, rng, 75, lambda name, tokens: 1.3, sizes=(8, 16))
        during.append(scale(residuals, 8) / scale(residuals, 4))
        serve(residuals, rng, 75, as_the_table, sizes=(2, 4))
        after.append(scale(residuals, 8) / scale(residuals, 4))
        assert 0.87 < scale(residuals, 4) < 1.15
    # If all of it was put down to the sizes, these would be 1.3.
    assert 0.95 < np.mean(during) < 1.1
    assert 0.95 < np.mean(after) < 1.1
    assert max(during + after) < 1.2


def test_a_single_disturbance_does_little():
    residuals = Residuals(LIMITS)
    serve(residuals, random.Random(0), 100, as_the_table)
    before = residuals.scales("verify", 4, 32)
    record(residuals, 100.0, times=1)
    assert (residuals.scales("verify", 4, 32) / before).max() < 1.15
    # Nor does it as the first of all measurements.
    residuals = Residuals(LIMITS)
    record(residuals, 100.0, times=1)
    assert scale(residuals, 8) < MAX_SCALE
    serve(residuals, random.Random(0), 100, as_the_table)
    assert spread(residuals) < 1.2


def test_scales_are_clipped():
    residuals = Residuals(LIMITS)
    record(residuals, 100.0, times=1000)
    assert scale(residuals, 8) == MAX_SCALE
    residuals.reset()
    record(residuals, 0.01, times=1000)
    assert scale(residuals, 8) == 1.0 / MAX_SCALE


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_ignored(bad):
    residuals = Residuals(LIMITS)
    record(residuals, bad)
    residuals.record_step(4, 3, bad, 1.0)
    residuals.record_step(4, 3, 1.0, bad)
    residuals.refresh()
    assert list(residuals) == []
    assert residuals.scales("verify", 4, 32).tolist() == [1.0] * 32
    assert residuals.rest(4) == (0.0, 0.0, 0.0)
    # Nor do they make what follows count for less.
    clean = Residuals(LIMITS)
    for each in (residuals, clean):
        each.refresh()
        record(each, 1.5, times=3)
    assert scale(residuals, 8) == scale(clean, 8)


def test_reset_forgets():
    residuals, fresh = Residuals(LIMITS), Residuals(LIMITS)
    record(residuals, 2.0)
    residuals.record_step(4, 3, 2.0, 1.0)
    residuals.refresh()
    version = residuals.version
    residuals.reset()
    assert residuals.version > version
    assert scale(residuals, 8) == 1.0 and residuals.rest(4) == (0.0, 0.0, 0.0)
    assert list(residuals) == []
    # What comes next counts as at first.
    for each in (residuals, fresh):
        record(each, 1.5, times=3)
        each.record_step(4, 3, 2.0, 1.0)
        each.refresh()
    assert scale(residuals, 8) == scale(fresh, 8)
    assert residuals.rest(4) == fresh.rest(4)


def test_what_was_not_measured_for_long_is_uncertain_again():
    def moved(residuals):
        """Return how far some slow passes move the scale."""
        before = scale(residuals, 8)
        record(residuals, 1.6, times=4)
        return math.log(scale(residuals, 8) / before)

    at_first = moved(Residuals(LIMITS))
    waited = {}
    for refreshes in (0, HORIZON // REFRESH_EVERY // 8, HORIZON // REFRESH_EVERY):
        residuals = Residuals(LIMITS)
        serve(residuals, random.Random(0), 200, as_the_table)
        for _ in range(refreshes):
            residuals.refresh()
        waited[refreshes] = moved(residuals) / at_first
    right_away, soon, late = waited.values()
    assert right_away < 0.5
    assert right_away < soon < late
    assert late == pytest.approx(1.0, abs=0.15)


def test_no_part_becomes_less_certain_than_at_first():
    waited, fresh = Residuals(LIMITS), Residuals(LIMITS)
    for _ in range(10 * HORIZON // REFRESH_EVERY):
        waited.refresh()
    for residuals in (waited, fresh):
        record(residuals, 1.6, times=4)
    assert scale(waited, 8) == scale(fresh, 8)


def test_ranks_that_share_a_state_agree():
    first, second = Residuals(LIMITS), Residuals(LIMITS)
    for rank, ratio in ((first, 1.7), (second, 0.6)):
        record(rank, ratio)
        for layers in (0, 3) * 20:
            rank.record_step(4, layers, ratio * (1.0 + 0.1 * layers), 1.0)
    assert scale(first, 8) != scale(second, 8)
    values = tuple(part.copy() for part in first.values())
    for rank in (first, second):
        rank.refresh(values)
    for name in NAMES:
        scales = first.scales(name, 4, 32)
        assert scales.tolist() == second.scales(name, 4, 32).tolist()
    assert first.rest(4) == second.rest(4) != (0.0, 0.0, 0.0)
    assert scale(first, 8) > 1.3
    # What a rank learns afterwards on its own moves nothing that the others know.
    record_only = scale(second, 8)
    first.record("verify", 4, 8, 3.0)
    first.record_step(4, 3, 9.0, 1.0)
    assert scale(first, 8) == scale(second, 8) == record_only
    assert first.rest(4) == second.rest(4)


def test_measured_buckets_are_listed():
    residuals = Residuals(Limits(6, 1024, max_verify_rows=20, max_width=8))
    for batch_size, tokens, times in ((3, 7, 3), (4, 8, 2), (6, 19, 4), (1, 1, 1)):
        record(residuals, 1.5, times=times, batch_size=batch_size, tokens=tokens)
    record(residuals, 0.8, times=6, operation="draft", batch_size=2, tokens=6)
    residuals.record("draft_extend", 9, 40, 1.0)  # beyond the limits: in the last bucket
    residuals.refresh()
    rows = [(row.operation, row.batch_sizes, row.tokens, row.samples) for row in residuals]
    assert rows == [
        ("verify", (1, 1), (1, 1), 1),
        ("verify", (3, 4), (7, 8), 5),
        ("verify", (5, 6), (17, 20), 4),
        ("draft", (2, 2), (5, 6), 6),
        ("draft_extend", (5, 6), (17, 20), 1),
    ]
    for row in residuals:
        scales = residuals.scales(row.operation, row.batch_sizes[0], 20)
        first, last = row.tokens
        assert row.ratio == pytest.approx(np.exp(np.log(scales[first - 1 : last]).mean()))


def test_a_bucket_that_is_far_off_is_a_suspect_after_enough_passes():
    residuals = Residuals(LIMITS)
    ratios = {"draft": 1.6, "verify": 0.4, "draft_extend": 1.1}
    for _ in range(REPORT_AFTER):
        assert residuals.suspects() == []
        for name, ratio in ratios.items():
            residuals.record(name, 4, 8, ratio)
    worst, other = residuals.suspects()
    assert (worst.operation, other.operation) == ("verify", "draft")
    assert worst.tokens == other.tokens == (7, 8) and worst.batch_sizes == (3, 4)
    assert worst.ratio == pytest.approx(0.4, rel=0.2)
    assert other.ratio == pytest.approx(1.6, rel=0.2)


def test_what_was_learned_is_kept_but_for_the_speed_of_the_moment():
    learned, kept = Residuals(LIMITS), Residuals(LIMITS)
    record(learned, 1.7)
    for layers in (0, 3) * 40:
        learned.record_step(4, layers, 1.7 + 0.3 * layers, 1.0)
    learned.refresh()
    kept.load_state(json.loads(json.dumps(learned.state())))
    for name in NAMES:
        assert np.allclose(kept.scales(name, 4, 32), learned.scales(name, 4, 32), rtol=1e-3)
    assert np.allclose(kept.rest(4), learned.rest(4), atol=1e-3)
    assert learned.rest(4) != (0.0, 0.0, 0.0)
    assert not list(kept)  # no pass of this server


@pytest.mark.parametrize(("batch", "rows"), [(4, 8), (64, 64), (1, 1)])
def test_a_server_of_other_limits_takes_what_it_has_in_common(batch, rows):
    learned = Residuals(LIMITS)
    record(learned, 1.7)
    learned.refresh()
    other = Residuals(dataclasses.replace(LIMITS, max_batch_size=batch, max_verify_rows=rows))
    other.load_state(learned.state())
    for name in NAMES:
        common = min(rows, LIMITS.max_verify_rows)
        expected = learned.scales(name, 1, common)
        assert np.allclose(other.scales(name, 1, rows)[:common], expected, rtol=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("octave"),
        lambda state: state.update(rest="none"),
        lambda state: state.update({"pass": [float("nan")] * 3}),
        lambda state: state.update(size=[0.0]),
        lambda state: state.update(bucket=[[1.0], [1.0, 2.0]]),
    ],
)
def test_a_damaged_state_changes_nothing(damage):
    residuals, damaged = Residuals(LIMITS), Residuals(LIMITS).state()
    record(residuals, 1.7)
    before = residuals.state()
    damage(damaged)
    with pytest.raises(ValueError, match="corrections: "):
        residuals.load_state(damaged)
    assert residuals.state() == before
