"""How much of a scatter is noise."""

import numpy as np
import pytest

from cast_sglang.costs.noise import shrink


def test_shrinking_forgets_noise_and_keeps_what_is_far_beyond():
    departed = np.array([0.0, 0.019, -0.019, 0.1, -1.0])
    error = np.full(5, 0.01)
    believed = shrink(departed, error)
    assert believed[:3].tolist() == [0.0, 0.0, 0.0]
    assert believed[3:] == pytest.approx([0.096, -0.9996])
    assert shrink(departed, np.zeros(5)).tolist() == departed.tolist()
