"""Roofline: estimates the cost tables from two rates of the device, where nothing was measured.

A pass takes as long as reading its bytes or computing its products, whichever is longer. The
estimate ignores kernels, launches and tiles, so its tables are marked as estimated wherever they
are shown. Serving corrects them by the passes that it times.

Source: Williams, Waterman, Patterson, "Roofline" (CACM 52(4), 2009).
"""

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


class DeviceRates(NamedTuple):
    """The best rates of the device."""

    bytes_per_second: float
    flops_per_second: float


class ModelSize(NamedTuple):
    """What a forward pass of one rank reads and multiplies."""

    num_weights: int  # that every token is multiplied by: all but the input embedding
    weight_bytes: int
    kv_bytes_per_token: int


def measure_rates(device: str, dtype: torch.dtype) -> DeviceRates:
    """Time a large copy and a large matrix product on the device, within about a second."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=dtype, device=device)
    copied = _best_seconds(device, lambda: target.copy_(source))
    multiplied = _best_seconds(device, lambda: matrix @ matrix)
    return DeviceRates(2 * COPY_BYTES / copied, 2 * MATMUL_SIZE**3 / multiplied)


def estimate_tables(
    grid: Grid, rates: DeviceRates, target: ModelSize, draft: ModelSize | None
) -> CostTables:
    """Estimate the tables of a grid; their entries have no samples.

    Args:
        draft: None where the grid has none of its passes.
    """

    def table(size: ModelSize, token_counts: tuple[int, ...]) -> CostTable:
        axes = (grid.batch_sizes, grid.contexts, token_counts)
        batch, context, count = (
            axis.astype(np.float64) for axis in np.ix_(*(np.asarray(axis) for axis in axes))
        )
        read = size.weight_bytes + batch * (context + count) * size.kv_bytes_per_token
        products = 2.0 * size.num_weights * batch * count + 0.0 * context
        seconds = np.maximum(read / rates.bytes_per_second, products / rates.flops_per_second)
        shape: tuple[int, int, int] = seconds.shape
        return CostTable(
            batch_sizes=list(grid.batch_sizes),
            contexts=list(grid.contexts),
            token_counts=list(token_counts),
            time_us=np.round(seconds * 1e6, 3).tolist(),
            spread_us=np.zeros(shape).tolist(),
            samples=np.zeros(shape, dtype=int).tolist(),
        )

    tables = {}
    for each in PASSES:
        if each.name in grid.token_counts:
            size = target if each.model == "target" else draft
            assert size is not None
            tables[each.table] = table(size, grid.token_counts[each.name])
    return CostTables(**tables, step_overhead_us=None)


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
