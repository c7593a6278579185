"""Records of a step: the rows that its shape counts."""

import numpy as np
import pytest

from cast_sglang.costs.model import plain_units, step_units
from cast_sglang.serving.step import PLAIN_SHAPE, DraftShape
from tests.support.policies import costs


@pytest.mark.parametrize(
    ("num_rows", "mean"),
    [(None, 5.0), (np.array([5, 1]), 3.0), (np.array([2, 5, 3, 1]), 2.75), (np.array([5]), 5.0)],
)
def test_mean_rows_are_those_that_are_verified(num_rows, mean):
    rows = DraftShape(widths=(3, 1), num_draft_tokens=5, num_rows=num_rows, depth=3).mean_rows
    assert rows == mean and isinstance(rows, float)


def test_a_plain_step_costs_what_plain_decoding_does():
    made_up = costs(verify=[1.0, 1.5, 2.0], draft=[0.1, 0.2], extend=[0.3])
    units = step_units(made_up, PLAIN_SHAPE.widths, PLAIN_SHAPE.mean_rows, 0)
    assert units == plain_units(made_up)
