"""Estimated tables: two slopes and a floor, marked as estimates."""

import numpy as np
import torch

from cast_sglang.costs.schema import validate_profile
from cast_sglang.profiling.grid import Grid
from cast_sglang.profiling.roofline import DeviceRates, ModelSize, estimate_tables, measure_rates
from cast_sglang.profiling.run import make_profile
from tests.support.builders import make_identity

COUNTS = {"verify": (1, 8, 64), "draft": (1, 8), "draft_extend": (1, 9)}
GRID = Grid((1, 8), (128, 1024), COUNTS)
# A gigabyte of weights at 1 TB/s: a millisecond to read them.
TARGET = ModelSize(num_weights=500_000_000, weight_bytes=10**9, kv_bytes_per_token=100_000)
DRAFT = ModelSize(num_weights=50_000_000, weight_bytes=10**8, kv_bytes_per_token=5_000)
RATES = DeviceRates(bytes_per_second=1e12, flops_per_second=1e14)


def test_reading_or_computing_whichever_is_longer():
    tables = estimate_tables(GRID, RATES, TARGET, DRAFT)
    times_us = np.array(tables.target.time_us)
    read_us = 1000 + 0.1 * 129
    assert np.isclose(times_us[0, 0, 0], read_us, atol=0.01)
    # 512 tokens of a billion operations each.
    assert np.isclose(times_us[1, 0, 2], 5120.0)
    assert (np.diff(times_us, axis=0) > 0).all() and (np.diff(times_us, axis=1) >= 0).all()
    assert (np.array(tables.draft.time_us) < times_us[:, :, :2]).all()


def test_the_profile_is_marked_as_estimated():
    tables = estimate_tables(GRID, RATES, TARGET, DRAFT)
    profile = make_profile(tables, make_identity(), "--cast-profile estimate")
    validate_profile(profile)
    assert profile.provenance.estimated and profile.provenance.heldout is None
    assert not np.array(profile.target.samples).any()


def test_rates_of_this_machine_are_plausible():
    rates = measure_rates("cpu", torch.float32)
    assert 1e8 < rates.bytes_per_second < 1e13
    assert 1e8 < rates.flops_per_second < 1e14


def test_without_a_draft_the_target_alone_is_estimated():
    grid = GRID._replace(token_counts={"verify": COUNTS["verify"]})
    tables = estimate_tables(grid, RATES, TARGET, None)
    assert tables.target == estimate_tables(GRID, RATES, TARGET, DRAFT).target
    assert tables.draft is tables.draft_extend is None
