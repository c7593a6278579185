"""Smoothing of measured times, against surfaces that are known."""

import itertools
import math

import numpy as np
import pytest

from cast_sglang.profiling.tables import smooth

AXES = ((1, 2, 4, 8, 16, 32), (128, 1024), (1, 2, 4, 8, 16, 32))
SHAPES = np.array(list(itertools.product(*AXES)), dtype=float)


def flat_then_linear(shapes):
    """Reading the weights, then computing: the floor and slope of a real pass."""
    batch, context, tokens = shapes.T
    return np.maximum(1000.0, 10.0 * batch * tokens) + 0.05 * batch * context + 200.0


def staircase(shapes, tile=8):
    batch, _, tokens = shapes.T
    return 1000.0 * (1 + 0.2 * np.ceil(batch * tokens / tile))


@pytest.mark.parametrize("surface", [flat_then_linear, staircase])
def test_precise_times_are_kept(surface):
    times = surface(SHAPES)
    smoothed = smooth(SHAPES, times, np.full(len(times), 1e-3))
    assert np.abs(smoothed / times - 1).max() < 0.01


def test_noise_is_averaged_out():
    rng = np.random.default_rng(0)
    truth = flat_then_linear(SHAPES)
    noisy = truth * np.exp(rng.normal(0, 0.1, len(truth)))
    smoothed = smooth(SHAPES, noisy, np.full(len(truth), 0.1))
    before, after = (np.abs(np.log(times / truth)).mean() for times in (noisy, smoothed))
    assert after < 0.6 * before


def test_units_do_not_matter():
    times = flat_then_linear(SHAPES)
    noise = np.full(len(times), 0.02)
    ratio = smooth(SHAPES, 1e3 * times, noise) / smooth(SHAPES, times, noise)
    assert np.allclose(ratio, 1e3, rtol=5e-3)


def test_a_single_time_is_returned():
    shape = np.array([[1.0, 128.0, 1.0]])
    (estimated,) = smooth(shape, np.array([5000.0]), np.array([0.01]))
    assert math.isclose(estimated, 5000.0, rel_tol=0.01)
