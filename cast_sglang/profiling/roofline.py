"""Roofline: estimates the cost tables from two rates of the device, where nothing was measured.

A pass takes as long as reading its bytes or computing its products, whichever is longer. The
estimate knows of kernels, tiles and links what it is told, and its tables are marked as estimated
wherever they are shown. Serving corrects them by the passes that it times.

Source: Williams, Waterman, Patterson, "Roofline" (CACM 52(4), 2009).
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from cast_sglang.costs.passes import PASSES
from cast_sglang.costs.schema import CostTable, CostTables
from cast_sglang.profiling.grid import Grid

__all__ = ["DeviceRates", "ModelSize", "estimate_tables", "measure_rates"]

COPY_BYTES = 1 << 27
MATMUL_SIZE = 1024
REPEATS = 5
SMALL_TILE_ROWS = 16


class DeviceRates(NamedTuple):
    """The best rates of the device; what is not known of it is left out of the times."""

    bytes_per_second: float
    flops_per_second: float
    tile_rows: int = 1  # products of more rows than that take whole tiles
    kernel_seconds: float = 0.0  # a kernel takes at least, and so much beside what it reads
    link_bytes_per_second: float = math.inf  # to other devices, in one direction
    exchange_seconds: float = 0.0  # of an exchange with them, beside its bytes
    decision_seconds: float = 0.0  # that the device waits while the host decides
    step_seconds: float = 0.0  # of a step, outside of its passes


class ModelSize(NamedTuple):
    """What a forward pass of one rank reads, multiplies and sends."""

    num_weights: int  # that every token is multiplied by: all but the input embedding
    weight_bytes: int  # that every pass reads
    kv_bytes_per_token: int
    attention_flops: int = 0  # of a token, for each token that it attends to
    expert_bytes: int = 0  # of all experts of all layers
    expert_share: float = 1.0  # of the experts, those that a token takes
    num_kernels: int = 0
    num_exchanges: int = 0  # with the other ranks
    sent_bytes_per_token: float = 0.0  # in all of them, in one direction


def measure_rates(device: str, dtype: torch.dtype) -> DeviceRates:
    """Time a large copy and a large matrix product on the device, within about a second."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=dtype, device=device)
    copied = _best_seconds(device, lambda: target.copy_(source))
    multiplied = _best_seconds(device, lambda: matrix @ matrix)
    return DeviceRates(2 * COPY_BYTES / copied, 2 * MATMUL_SIZE**3 / multiplied)


def estimate_tables(
    grid: Grid,
    rates: DeviceRates,
    target: ModelSize,
    draft: ModelSize | None,
    draft_extend: ModelSize | None = None,
) -> CostTables:
    """Estimate the tables of a grid; their entries have no samples.

    Each layer of the draft waits for a decision. Two more belong to no layer, whether to draft and
    how many rows to verify; every step that drafts has them once, so they are draft extend's.

    Args:
        draft: None where the grid has none of its passes.
        draft_extend: the draft as it runs over accepted rows; None where that is all the same.
    """
    sizes = {"verify": target, "draft": draft, "draft_extend": draft_extend or draft}
    decisions = {"verify": 0, "draft": 1, "draft_extend": 2}
    tables = {}
    for each in PASSES:
        if each.name not in grid.token_counts:
            continue
        size = sizes[each.name]
        assert size is not None
        axes = grid.batch_sizes, grid.contexts, grid.token_counts[each.name]
        seconds = _pass_seconds(rates, size, *np.ix_(*map(np.asarray, axes)))
        seconds += decisions[each.name] * rates.decision_seconds
        shape: tuple[int, int, int] = seconds.shape
        tables[each.table] = CostTable(
            batch_sizes=list(axes[0]),
            contexts=list(axes[1]),
            token_counts=list(axes[2]),
            time_us=np.round(seconds * 1e6, 3).tolist(),
            spread_us=np.zeros(shape).tolist(),
            samples=np.zeros(shape, dtype=int).tolist(),
        )
    overhead_us = [round(rates.step_seconds * 1e6, 3)] * len(grid.batch_sizes)
    return CostTables(**tables, step_overhead_us=overhead_us if rates.step_seconds else None)


def _pass_seconds(
    rates: DeviceRates, size: ModelSize, batch: np.ndarray, context: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """Return the seconds of passes over `batch` requests, `count` tokens each; they broadcast."""
    tokens = batch * count
    # Experts are chosen alike, and each token chooses for itself.
    touched = 1.0 - (1.0 - size.expert_share) ** tokens
    products = _roof(
        rates,
        size.weight_bytes + touched * size.expert_bytes,
        2.0 * size.num_weights * _tiled(tokens, rates.tile_rows),
    )
    attended = context + count
    attention = _roof(
        rates,
        batch * attended * size.kv_bytes_per_token,
        1.0 * tokens * attended * size.attention_flops,
    )
    sent = tokens * size.sent_bytes_per_token / rates.link_bytes_per_second
    fixed = size.num_kernels * rates.kernel_seconds + size.num_exchanges * rates.exchange_seconds
    return products + attention + sent + fixed


def _roof(rates: DeviceRates, read: np.ndarray, flops: np.ndarray) -> np.ndarray:
    return np.maximum(read / rates.bytes_per_second, flops / rates.flops_per_second)


def _tiled(tokens: np.ndarray, tile_rows: int) -> np.ndarray:
    """Return how many rows are computed: within a tile multiples of 16, beyond it whole tiles.

    For few rows there are kernels whose instructions take 16 of them.
    """
    step = np.where(tokens <= tile_rows, min(tile_rows, SMALL_TILE_ROWS), tile_rows)
    return -(-tokens // step) * step


def _best_seconds(device: str, run: Callable[[], object]) -> float:
    def synchronize() -> None:
        if device != "cpu":
            torch.get_device_module(device).synchronize()

    best = float("inf")
    for _ in range(REPEATS):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
