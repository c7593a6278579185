"""How much of a scatter is noise."""

import numpy as np
import pytest

from cast_sglang.costs.noise import median_and_spread, median_error, shrink


def test_shrinking_forgets_noise_and_keeps_what_is_far_beyond():
    departed = np.array([0.0, 0.019, -0.019, 0.1, -1.0])
    error = np.full(5, 0.01)
    believed = shrink(departed, error)
    assert believed[:3].tolist() == [0.0, 0.0, 0.0]
    assert believed[3:] == pytest.approx([0.096, -0.9996])
    assert shrink(departed, np.zeros(5)).tolist() == departed.tolist()


def test_the_spread_of_normal_values_is_their_standard_deviation():
    values = np.random.default_rng(0).normal(3.0, 0.5, 20_000)
    median, spread = median_and_spread(values)
    assert median == pytest.approx(3.0, abs=0.02) and spread == pytest.approx(0.5, rel=0.03)
    # One value far off changes neither by much.
    assert median_and_spread([*values, 1e9]) == pytest.approx((median, spread), rel=1e-3)
    assert median_and_spread([2.0]) == (2.0, 0.0)


def test_the_error_of_a_median_is_that_of_repeats():
    samples = np.random.default_rng(1).normal(0.0, 0.5, (4000, 33))
    medians = np.median(samples, axis=1)
    expected = median_error(np.array(0.5), np.array(33))
    assert medians.std() == pytest.approx(float(expected), rel=0.05)
