"""Smoothing and completing of measured times, against surfaces that are known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cast_sglang.profiling.grid import Axes
from cast_sglang.profiling.tables import complete, smooth

AXES = ((1, 2, 4, 8, 16, 32), (128, 1024), (1, 2, 4, 8, 16, 32))
SHAPES = np.array(list(itertools.product(*AXES)), dtype=float)
NONE = np.empty((0, 3))


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
    smoothed, _ = smooth(SHAPES, times, np.full(len(times), 1e-3), NONE)
    assert np.abs(smoothed / times - 1).max() < 0.01


def test_noise_is_averaged_out():
    rng = np.random.default_rng(0)
    truth = flat_then_linear(SHAPES)
    noisy = truth * np.exp(rng.normal(0, 0.1, len(truth)))
    smoothed, _ = smooth(SHAPES, noisy, np.full(len(truth), 0.1), NONE)
    before, after = (np.abs(np.log(times / truth)).mean() for times in (noisy, smoothed))
    assert after < 0.6 * before


def test_units_do_not_matter():
    times = flat_then_linear(SHAPES)
    noise = np.full(len(times), 0.02)
    ratio = smooth(SHAPES, 1e3 * times, noise, NONE)[0] / smooth(SHAPES, times, noise, NONE)[0]
    assert np.allclose(ratio, 1e3, rtol=5e-3)


def test_a_single_time_is_returned():
    shape = np.array([[1.0, 128.0, 1.0]])
    ((estimated,), _) = smooth(shape, np.array([5000.0]), np.array([0.01]), NONE)
    assert math.isclose(estimated, 5000.0, rel_tol=0.01)


def test_shapes_that_were_not_measured_are_predicted():
    times = flat_then_linear(SHAPES)
    is_measured = np.random.default_rng(0).random(len(SHAPES)) < 0.5
    noise = np.full(is_measured.sum(), 0.02)
    _, predicted = smooth(SHAPES[is_measured], times[is_measured], noise, SHAPES[~is_measured])
    errors = np.abs(np.log(predicted / times[~is_measured]))
    assert np.median(errors) < 0.05
    assert errors.max() < 0.5


# Completing


def axis(draw, highest, max_size=4):
    values = st.integers(1, highest)
    return sorted(draw(st.lists(values, min_size=1, max_size=max_size, unique=True)))


@st.composite
def grids(draw):
    """Draw axes, the true times on them, and which cells a cache of some size holds."""
    axes = Axes(axis(draw, 64), axis(draw, 8192), axis(draw, 64))
    b, c, n = (values.astype(float) for values in np.ix_(*map(np.array, axes)))
    times = pass_us(b, c, n)
    held = draw(st.integers(1, 64 * 8192))
    fits = np.broadcast_to(b * (c + axes.num_tokens[-1]) <= held, times.shape).copy()
    fits[:, 0] = True
    return axes, times, fits


@st.composite
def measured_grids(draw):
    """Draw axes, noisy times and which were measured: a corner, or any cells, are missing."""
    axes, times, is_measured = draw(grids())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    times = times * np.exp(rng.normal(0, draw(st.sampled_from([0.01, 0.1, 2.0])), times.shape))
    if draw(st.booleans()):
        is_measured &= rng.random((1, 1, times.shape[2])) < 0.7
    else:
        is_measured = rng.random(times.shape) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    is_measured[:, 0] = True
    return axes, times, is_measured


def pass_us(b, c, n):
    """What a pass takes: weights, products of its tokens, and attention over the context."""
    return 8000.0 + 200.0 * b * n + 1.8 * b * c + 0.01 * b * c * n


def neighbours(is_measured, cell):
    """Return masks of the measured cells at no larger and at no smaller shapes, at its tokens."""
    b, c, n = cell
    below, above = np.zeros_like(is_measured), np.zeros_like(is_measured)
    below[: b + 1, : c + 1, n] = above[b:, c:, n] = True
    return below & is_measured, above & is_measured


@given(measured_grids())
def test_no_completed_time_falls(drawn):
    axes, times, is_measured = drawn
    completed = complete(np.where(is_measured, times, 0.0), is_measured, axes)
    assert np.isfinite(completed).all() and (completed > 0).all()
    for direction in (0, 1):
        assert (np.diff(completed, axis=direction) >= 0).all()
    for cell in np.ndindex(*completed.shape):
        below, above = neighbours(is_measured, cell)
        if is_measured[cell]:
            # Within what measured times disagree about, and untouched where they agree.
            longest, shortest = times[below].max(), times[above].min()
            assert shortest <= completed[cell] * (1 + 1e-9)
            assert completed[cell] <= longest * (1 + 1e-9)
            if longest == shortest:
                assert math.isclose(completed[cell], times[cell], rel_tol=1e-9)
        else:
            assert completed[cell] >= completed[below].max()
            assert not above.any() or completed[cell] <= completed[above].min()


@given(grids())
def test_the_missing_corner_of_a_true_pass_is_found(drawn):
    """Passes that follow the model: those measured beyond one context tell of the others."""
    axes, times, fits = drawn
    assume(fits[:, 1:].any())
    completed = complete(np.where(fits, times, 0.0), fits, axes)
    assert completed == pytest.approx(times, rel=1e-6)


def test_the_first_profile_of_a_cache_that_holds_no_full_batch():
    """48 requests of 4,032 tokens do not fit 131,072 slots; 16 do."""
    axes = Axes([1, 4, 16, 48], [128, 4032], [1, 4, 16, 32])
    b, c, n = np.ix_(*(np.array(values, float) for values in axes))
    times = pass_us(b, c, n)
    fits = np.broadcast_to(b * (c + 32) <= 131072, times.shape)
    assert not fits[3, 1].any() and fits[2, 1].all()
    is_measured = fits & ((c == 128) | (n != 4))
    completed = complete(np.where(is_measured, times, 0.0), is_measured, axes)
    assert completed == pytest.approx(times, rel=1e-6)


def test_without_a_second_context_times_stay_as_they_are():
    axes = Axes([1, 2], [128, 4096], [1, 2])
    is_measured = np.zeros((2, 2, 2), dtype=bool)
    is_measured[:, 0] = True
    completed = complete(np.arange(1.0, 9.0).reshape(2, 2, 2), is_measured, axes)
    np.testing.assert_array_equal(completed[:, 1], completed[:, 0])
