"""Plain steps beside steps with a tree, on a device whose speed wanders."""

import math
import random

import pytest

from cast_sglang.costs.noise import MIN_SAMPLES
from cast_sglang.costs.plain_ratio import DEADBAND, NEIGHBOURS, PlainRatio


def record(ratios, plain, *, steps=3000, plain_every=24, wander=0.2, noise=0.05, bucket=0):
    """Record steps of which one in `plain_every` is plain and takes `plain` times its costs."""
    rng = random.Random(1)
    for index in range(steps):
        speed = math.exp(wander * math.sin(index / 300) + rng.gauss(0.0, noise))
        is_plain = index % plain_every == 0
        ratios.record(bucket, is_plain, speed * (plain if is_plain else 1.0))


@pytest.mark.parametrize("plain", [0.9, 1.0, 1.3])
@pytest.mark.parametrize("plain_every", [24, 2])
def test_a_wandering_speed_cancels(plain, plain_every):
    ratios = PlainRatio(2)
    record(ratios, plain, plain_every=plain_every)
    assert ratios.of(0) == 1.0  # until it is refreshed
    ratios.refresh()
    assert ratios.of(0) == pytest.approx(plain, abs=0.03)
    assert ratios.of(1) == 1.0  # other batch sizes have their own


def test_a_difference_that_noise_explains_is_not_believed():
    ratios = PlainRatio(1)
    record(ratios, 1.0, steps=200, plain_every=12, wander=0.0, noise=0.1)
    ratios.refresh()
    assert ratios.of(0) == pytest.approx(1.0, abs=0.02)


def test_steps_far_apart_are_not_compared():
    ratios = PlainRatio(1)
    for _ in range(10):
        for is_plain in (False, True):
            for _ in range(NEIGHBOURS + MIN_SAMPLES):
                ratios.record(0, is_plain, 1.5 if is_plain else 1.0)
    # Only the steps after a change of kind have neighbours of the other kind, and those count.
    assert ratios.refresh()
    assert ratios.of(0) == pytest.approx(1.5)
    lonely = PlainRatio(1)
    for _ in range(100):
        lonely.record(0, True, 1.5)
    assert not lonely.refresh() and lonely.of(0) == 1.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_ratios_are_ignored(bad):
    ratios = PlainRatio(1)
    record(ratios, 0.9)
    for _ in range(100):
        ratios.record(0, True, bad)
    ratios.refresh()
    assert ratios.of(0) == pytest.approx(0.9, abs=0.03)


def test_small_changes_are_not_applied():
    ratios = PlainRatio(1)
    record(ratios, 1.0 + DEADBAND / 2, noise=0.0, wander=0.0)
    assert not ratios.refresh() and ratios.of(0) == 1.0


def test_rank_0_decides():
    first, second = PlainRatio(1), PlainRatio(1)
    record(first, 1.2)
    record(second, 0.8)
    assert second.refresh(first.state()) and first.refresh(first.state())
    assert second.of(0) == first.of(0) > 1.1
