"""CostModel: looks up what the passes of a step cost in the tables S_T and S_D of a profile.

Source: Hong, Tan, Hu, "Inference-Cost-Aware Dynamic Tree Construction" (arXiv 2510.26577), the
tables S_T(B), S_D(B) and the function `select`.
"""

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cast_sglang.config import LOOKUPS
from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits, exceeded
from cast_sglang.costs.passes import NAMES
from cast_sglang.costs.schema import CostTable, CostTables

__all__ = [
    "CostModel",
    "StepCosts",
    "cost_of",
    "extend_row_units",
    "extend_units",
    "pass_us",
    "plain_units",
    "step_units",
]

MAX_CACHED_STEPS = 4096
# Beyond the last measured context the cost rises with its last slope up to this multiple of it.
MAX_CONTEXT_EXTRAPOLATION = 2


class StepCosts(NamedTuple):
    """Costs of the passes of one step, in units of `unit_us`, at one batch size and context.

    The arrays are on the host, where policies decide; they are no tensors, as reading one entry of
    a tensor takes ten times as long. N, K and E are the most rows to verify, nodes of a draft layer
    and rows of draft extend. Of passes that are not run there is one entry, 0.
    """

    verify: np.ndarray  # [N] float32; index k - 1: one target pass over k rows per request
    draft: np.ndarray  # [K] float32; index k - 1: one draft layer over k nodes per request
    draft_extend: np.ndarray  # [E] float32; index k - 1: the draft's pass over k rows
    unit_us: float  # S_T(B)[c][1] in microseconds: one target pass over 1 row per request
    overhead: float  # time of a step outside of its passes; 0 if the profile has none
    plain_overhead: float  # the same of a plain step, which verifies the root alone


def cost_of(costs: np.ndarray, count: float) -> float:
    """Return the cost of `count` tokens per request, linear between whole counts.

    Args:
        costs: [n]; index k - 1 is the cost of k tokens.
        count: in [1, n]; not whole where it is a mean over requests.
    """
    whole = int(count)
    cost = float(costs[whole - 1])
    return cost if whole == count else cost + (count - whole) * (float(costs[whole]) - cost)


def pass_us(costs: StepCosts, name: str, num_tokens: float) -> float:
    """Return the time of one pass in microseconds.

    Args:
        name: of `passes.NAMES`.
        num_tokens: rows or nodes per request; may be a mean over requests.
    """
    return cost_of(getattr(costs, name), num_tokens) * costs.unit_us


def step_units(
    costs: Any,
    widths: Sequence[int],
    num_rows: float,
    num_extend_rows: float,
    drafts: bool | None = None,
) -> float:
    """Return the time of a step in units, as `TreePolicy.observe` takes it.

    Args:
        costs: `StepCosts`, or what a policy reads of them; the same in the next two functions.
        widths: nodes expanded per request in each layer below the root.
        num_rows: rows verified per request, root included; may be a mean over requests.
        num_extend_rows: rows per request of draft extend, 0 for none; may be a mean.
        drafts: whether the step drafted or looked for copies; None: where it has draft extend.
    """
    drafts = num_extend_rows > 0 if drafts is None else drafts
    overhead = costs.overhead if drafts else costs.plain_overhead
    time = overhead + cost_of(costs.verify, num_rows)
    time += sum(cost_of(costs.draft, width) for width in widths)
    if num_extend_rows:
        time += cost_of(costs.draft_extend, num_extend_rows)
    return time


def plain_units(costs: Any) -> float:
    """Return the time of a plain step, which verifies the root alone, in units."""
    return float(costs.verify[0]) + costs.plain_overhead


def extend_units(costs: Any, num_rows: int) -> float:
    """Return the time of draft extend in units, for any number of rows.

    Beyond the costs' last row, each further row adds what a row adds in the mean before it.
    """
    if num_rows == 0:
        return 0.0
    measured = len(costs.draft_extend)
    if num_rows <= measured:
        return cost_of(costs.draft_extend, num_rows)
    return float(costs.draft_extend[-1]) + extend_row_units(costs) * (num_rows - measured)


def extend_row_units(costs: Any) -> float:
    """Return what a further row per request adds to draft extend in the mean, in units."""
    extend = costs.draft_extend
    return max(0.0, float(extend[-1] - extend[0])) / max(1, len(extend) - 1)


class CostModel:
    """Costs of a step at any batch size and context, from the tables of a profile.

    Along tokens, costs are exact at measured counts and linear between them. Along batch size and
    context they are linear between grid points; with lookup "nearest" they are those of the
    smallest grid point that covers the value, as the paper's `select` does. Beyond the grid each
    axis continues with its last measured slope, never downwards; the context does so up to twice
    the last grid point. Below the first grid point its costs hold.

    Contexts are rounded up to multiples of `CONTEXT_BUCKET_TOKENS`, so that a growing context needs
    new costs only every 64 tokens. Rounding up keeps `select` exact on grids of such multiples.

    Attributes:
        extrapolated: axes on which the limits exceed the tables, such as "target.batch_sizes".
    """

    def __init__(self, tables: CostTables, limits: Limits, *, lookup: str = "linear") -> None:
        """Densify the tables of a profile that `load_profile` accepted.

        Args:
            limits: the largest shapes that costs are needed for.
            lookup: "linear" or "nearest".

        Raises:
            ValueError: `lookup` is unknown.
        """
        if lookup not in LOOKUPS:
            raise ValueError(f"lookup {lookup!r} is none of {', '.join(LOOKUPS)}")
        nearest = lookup == "nearest"
        self._surfaces = {
            each.name: _Surface(tables.table_of(each), limits.most(each), nearest)
            for each in limits.passes
        }
        self._overhead_us = tables.step_overhead_us
        self._overhead_batch_sizes = tables.target.batch_sizes
        self._nearest = nearest
        self._max_batch_size = limits.max_batch_size
        self._cache: dict[tuple[int, int], StepCosts] = {}
        self.extrapolated = exceeded(tables, limits)

    def step_costs(self, batch_size: int, context: float) -> StepCosts:
        """Return the costs of a step.

        Args:
            batch_size: B, requests in the step; 1 <= B <= max_batch_size.
            context: mean context length of the batch in tokens; finite, >= 0.

        Returns:
            The same object for every context of a bucket; its arrays must not be modified.

        Raises:
            ValueError: batch size or context out of range.

        Effects: O(1), without allocation, for a batch size and bucket seen before.
        """
        bucket = math.ceil(context / CONTEXT_BUCKET_TOKENS)
        costs = self._cache.get((batch_size, bucket))
        if costs is None:
            if not 1 <= batch_size <= self._max_batch_size or bucket < 0:
                limit = f"batch size in [1, {self._max_batch_size}] and context >= 0"
                raise ValueError(f"no costs of {batch_size=}, {context=}: expected {limit}")
            costs = self._compute(batch_size, bucket * CONTEXT_BUCKET_TOKENS)
            if len(self._cache) >= MAX_CACHED_STEPS:
                # Contexts only grow, so the oldest entry is the least likely to return.
                del self._cache[next(iter(self._cache))]
            self._cache[batch_size, bucket] = costs
        return costs

    def _compute(self, batch_size: int, context: int) -> StepCosts:
        times_us = dict.fromkeys(NAMES, np.zeros(1))
        for name, surface in self._surfaces.items():
            times_us[name] = surface.at(batch_size, context)
        unit_us = float(times_us["verify"][0])
        overhead = self._overhead(batch_size) / unit_us
        return StepCosts(
            **{name: (time_us / unit_us).astype(np.float32) for name, time_us in times_us.items()},
            unit_us=unit_us,
            overhead=overhead,
            plain_overhead=overhead,
        )

    def _overhead(self, batch_size: int) -> float:
        if self._overhead_us is None:
            return 0.0
        low, high, weight = _locate(self._overhead_batch_sizes, batch_size, self._nearest)
        values = np.asarray(self._overhead_us)
        return float(_blend(values[low], values[high], weight))


class _Surface:
    """One cost table, dense along tokens, which gives times at any batch size and context."""

    def __init__(self, table: CostTable, num_counts: int, nearest: bool) -> None:
        self._batch_sizes = table.batch_sizes
        self._contexts = table.contexts
        self._nearest = nearest
        # [B grid, C grid, num_counts] float64, microseconds.
        self._time_us = _densify(np.asarray(table.time_us), table.token_counts, num_counts)

    def at(self, batch_size: int, context: int) -> np.ndarray:
        """Return [num_counts] float64 microseconds."""
        context = min(context, MAX_CONTEXT_EXTRAPOLATION * self._contexts[-1])
        low, high, weight = _locate(self._contexts, context, self._nearest)
        rows = _blend(self._time_us[:, low], self._time_us[:, high], weight)
        low, high, weight = _locate(self._batch_sizes, batch_size, self._nearest)
        return _blend(rows[low], rows[high], weight)


def _densify(time_us: np.ndarray, token_counts: list[int], num_counts: int) -> np.ndarray:
    """Interpolate [..., len(token_counts)] times linearly to [..., num_counts]."""
    counts = np.arange(1, num_counts + 1)
    flat = time_us.reshape(-1, len(token_counts))
    dense = np.stack([np.interp(counts, token_counts, row) for row in flat])
    if len(token_counts) > 1:
        # np.interp repeats the last value; continue with the last slope instead, never downwards.
        slope = (flat[:, -1] - flat[:, -2]) / (token_counts[-1] - token_counts[-2])
        beyond = np.maximum(counts - token_counts[-1], 0)
        dense += np.maximum(slope, 0.0)[:, None] * beyond
    return dense.reshape(*time_us.shape[:-1], num_counts)


def _locate(grid: list[int], value: float, nearest: bool) -> tuple[int, int, float]:
    """Return (low, high, weight) so that value = grid[low] + weight * (grid[high] - grid[low]).

    The weight exceeds 1 where the value lies beyond the grid. A value below the grid becomes its
    first point; with `nearest`, any value becomes the smallest grid point that covers it.
    """
    cover = bisect.bisect_left(grid, value)
    if nearest or len(grid) == 1 or cover == 0:
        cover = min(cover, len(grid) - 1)
        return cover, cover, 0.0
    high = min(cover, len(grid) - 1)
    weight = (value - grid[high - 1]) / (grid[high] - grid[high - 1])
    return high - 1, high, weight


def _blend(low: np.ndarray, high: np.ndarray, weight: float) -> np.ndarray:
    """Interpolate times; beyond `high` continue with the same slope, but never downwards."""
    step = high - low
    return low + min(weight, 1.0) * step + max(weight - 1.0, 0.0) * np.maximum(step, 0.0)
