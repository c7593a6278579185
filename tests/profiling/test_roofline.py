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
    # 512 tokens of a billion operations each; attention, which is a kernel of its own, reads.
    assert np.isclose(times_us[1, 0, 2], 5120.0 + 8 * 0.1 * 192)
    assert (np.diff(times_us, axis=0) > 0).all() and (np.diff(times_us, axis=1) >= 0).all()
    assert (np.array(tables.draft.time_us) < times_us[:, :, :2]).all()


def times(rates: DeviceRates, size: ModelSize, of: str = "target", batch_size: int = 1):
    """Return [C, N] seconds of passes over 1 to 300 tokens, or what the grid has of the draft."""
    counts = COUNTS | {"verify": tuple(range(1, 301))}
    tables = estimate_tables(Grid((batch_size,), (128, 1024), counts), rates, size, DRAFT)
    return np.array(getattr(tables, of).time_us)[0] * 1e-6


def test_products_of_many_rows_take_whole_tiles():
    """Up to a tile in steps of 16 rows."""
    rates = RATES._replace(tile_rows=64)
    size = TARGET._replace(weight_bytes=0, kv_bytes_per_token=0)
    row = 2 * size.num_weights / rates.flops_per_second
    rows = times(rates, size)[0] / row
    assert np.allclose(
        rows[[0, 15, 16, 32, 63, 64, 127, 128, 191]], [16, 16, 32, 48, 64, *[128] * 2, *[192] * 2]
    )
    assert np.allclose(times(RATES, size)[0] / row, np.arange(1, 301))


def test_attention_reads_once_and_multiplies_for_each_token():
    size = ModelSize(0, 0, kv_bytes_per_token=1000, attention_flops=4000)
    rates = DeviceRates(bytes_per_second=1e9, flops_per_second=1e9)
    seconds = times(rates, size)
    for row in (1, 7):
        attended = np.array([128, 1024]) + row
        assert np.allclose(seconds[:, row - 1], attended * max(1000, row * 4000) / 1e9, atol=1e-9)


def test_experts_are_read_as_tokens_choose_them():
    """One token reads its own, many read nearly all."""
    size = ModelSize(0, 0, 0, expert_bytes=10**9, expert_share=1 / 16)
    seconds = times(DeviceRates(1e12, 1e30), size)[0] * 1e3
    assert np.isclose(seconds[0], 1 / 16) and np.isclose(seconds[1], 1 / 16 + 15 / 256)
    assert (np.diff(seconds) >= 0).all() and 0.99 < seconds[299] <= 1.0


def test_kernels_links_and_decisions_take_their_time():
    rates = RATES._replace(
        kernel_seconds=1e-6,
        link_bytes_per_second=1e9,
        exchange_seconds=1e-5,
        decision_seconds=1e-4,
        step_seconds=3e-5,
    )
    size = TARGET._replace(num_kernels=300, num_exchanges=60, sent_bytes_per_token=1e3)
    more = times(rates, size)[0] - times(RATES, TARGET)[0]
    assert np.allclose(more, 300e-6 + 60e-5 + np.arange(1, 301) * 1e-6, atol=1e-8)
    for of, decisions in (("draft", 1), ("draft_extend", 2)):
        more = times(rates, size, of) - times(RATES, TARGET, of)
        assert np.allclose(more, decisions * 1e-4, atol=1e-8)
    assert estimate_tables(GRID, rates, size, DRAFT).step_overhead_us == [30.0, 30.0]
    assert estimate_tables(GRID, RATES, TARGET, DRAFT).step_overhead_us is None


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
