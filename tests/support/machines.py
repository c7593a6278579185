"""Machines that exist only as times: what a table says of one, and what its passes really take.

A table is measured once, pass by pass, on a quiet machine. Serving then meets other times: passes
run after each other, caches are shared, the clock moves. A `Machine` has both, and draws the
differences as they were seen on real ones:

* every pass takes 1.2 to 1.8 times what its table says, each pass another factor;
* single sizes take 0.7 to 2.5 times that, as where a kernel changes;
* the speed of all passes moves in plateaus of seconds;
* one pass varies by 15 %;
* on some, a step that drafts takes 1.15 times what its passes sum to, and a plain step does not;
* and a step takes some time that no table has.

A quick table has few points. Where the times between them are a staircase, it is wrong by half.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from cast_sglang.costs.correction import REFRESH_EVERY, CorrectedCosts, Residuals
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, StepCosts, pass_us, plain_units
from cast_sglang.costs.passes import NAMES
from cast_sglang.costs.profiles import load_profile
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.base import TreePolicy
from tests.support.simulator import (
    LAYERS,
    PLAIN,
    TOKENS,
    TOPK,
    Drafted,
    Result,
    Text,
    best_fixed,
    fixed_rate,
    run,
)

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 256.0

PASS_FACTORS = (1.2, 1.8)
SIZE_FACTORS = (0.7, 2.5)
SIZE_SHARE = 0.15  # of the sizes that are off by themselves
PLATEAU_SECONDS = 3.0  # mean length
PLATEAU_SPREAD = 0.12  # of the logarithm of the speed
NOISE = 0.15
LIMITS = Limits(32, 1024, TOKENS, TOPK, None, LAYERS + 1)
# What a step that drafts takes of the sum of its passes.
GAPS = {"amd-gaps": 1.15, "gpu-gaps": 1.15}
UNTABLED = 0.05  # of a target pass: a step's time outside of its passes that the table lacks


class Machine:
    """Times of passes as tabulated and as they are.

    Args:
        name: one of `MACHINES`.
        seed: of how the truth differs from the table, and of the noise; None for a table that is
            right, without noise.
    """

    def __init__(self, name: str, seed: int | None = 0) -> None:
        self.tables = MACHINES[name]()
        self._exact = self.tables.exact if isinstance(self.tables, _Coarse) else self.tables
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._factors: dict[int, dict[str, np.ndarray]] = {}
        self._pass_factors = {
            op: 1.0 if self._rng is None else self._rng.uniform(*PASS_FACTORS) for op in NAMES
        }
        self.gap = 1.0 if self._rng is None else GAPS.get(name, 1.0)
        self.untabled = 0.0 if self._rng is None else UNTABLED
        self._now = self._plateau_ends = 0.0
        self._speed = 1.0

    def table(self, batch_size: int) -> StepCosts:
        """Return the costs that the table has."""
        return self.tables.step_costs(batch_size, CONTEXT)

    def truth(self, batch_size: int) -> StepCosts:
        """Return the costs as they are on average, in units of the table's."""
        exact = self._exact.step_costs(batch_size, CONTEXT)
        factors = self._factors.get(batch_size)
        if factors is None:
            factors = self._factors[batch_size] = {
                op: self._draw(op, len(getattr(exact, op))) for op in NAMES
            }
        unit_us = self.table(batch_size).unit_us
        unit = np.float32(exact.unit_us / unit_us)
        overhead = exact.overhead * float(unit) + self.untabled
        times = {op: getattr(exact, op) * factors[op] * unit for op in NAMES}
        for op in NAMES:
            times[op][op == "verify" :] *= np.float32(self.gap)  # a plain step verifies one row
        return StepCosts(
            **times,
            unit_us=unit_us,
            overhead=overhead,
            plain_overhead=overhead,
        )

    def _draw(self, operation: str, num_sizes: int) -> np.ndarray:
        factors = np.full(num_sizes, self._pass_factors[operation], np.float32)
        if self._rng is not None:
            low, high = np.log(SIZE_FACTORS)
            is_off = self._rng.random(num_sizes) < SIZE_SHARE
            factors[is_off] *= np.exp(self._rng.uniform(low, high, is_off.sum()))
        return factors

    def run(self, true_us: float) -> float:
        """Return how long a pass takes now that takes `true_us` on average; time goes on by it."""
        if self._rng is None:
            return true_us
        if self._now >= self._plateau_ends:
            self._plateau_ends = self._now + self._rng.exponential(PLATEAU_SECONDS * 1e6)
            self._speed = math.exp(self._rng.normal(0.0, PLATEAU_SPREAD))
        took = true_us * self._speed * math.exp(self._rng.normal(0.0, NOISE))
        self._now += took
        return took


class _Curves:
    """Tables made of functions: time of a pass over a number of rows in all."""

    def __init__(
        self,
        target: Callable[[np.ndarray], np.ndarray],
        draft: Callable[[np.ndarray], np.ndarray],
        unit_us: float,
        layer: float,
    ) -> None:
        self._target, self._draft, self._unit_us, self._layer = target, draft, unit_us, layer

    def step_costs(self, batch_size: int, context: float) -> StepCosts:
        rows = batch_size * np.arange(1, TOKENS + 1)
        verify = self._target(rows)
        layers = self._draft(rows)
        unit = float(verify[0])
        layer = self._layer / unit / float(self._draft(np.array([1]))[0])
        return StepCosts(
            verify=(verify / unit).astype(np.float32),
            draft=(layer * layers[:TOPK]).astype(np.float32),
            draft_extend=(1.2 * layer * layers[: LAYERS + 1]).astype(np.float32),
            unit_us=self._unit_us * unit,
            overhead=0.03 / unit,
            plain_overhead=0.03 / unit,
        )


class _Coarse:
    """A table that was measured at few points of curves, and is linear between them."""

    BATCH_SIZES = (1, 4, 16, 32)
    COUNTS: ClassVar = {"verify": (1, 4, 16, 32), "draft": (1, 4, 8), "draft_extend": (1, 4, 9)}

    def __init__(self, exact: _Curves) -> None:
        self.exact = exact

    def step_costs(self, batch_size: int, context: float) -> StepCosts:
        measured = [self.exact.step_costs(each, context) for each in self.BATCH_SIZES]
        times = {name: np.stack([self._line(each, name) for each in measured]) for name in NAMES}
        times["overhead"] = np.array([[each.overhead * each.unit_us] for each in measured])
        between = {
            name: np.array([np.interp(batch_size, self.BATCH_SIZES, column) for column in rows.T])
            for name, rows in times.items()
        }
        overhead, unit_us = between.pop("overhead"), float(between["verify"][0])
        return StepCosts(
            **{name: (row / unit_us).astype(np.float32) for name, row in between.items()},
            unit_us=unit_us,
            overhead=float(overhead[0]) / unit_us,
            plain_overhead=float(overhead[0]) / unit_us,
        )

    def _line(self, costs: StepCosts, name: str) -> np.ndarray:
        times = getattr(costs, name) * costs.unit_us
        counts = [count for count in self.COUNTS[name] if count <= len(times)]
        return np.interp(np.arange(1, len(times) + 1), counts, times[np.array(counts) - 1])


def _flat(knee: int) -> Callable[[np.ndarray], np.ndarray]:
    """Flat to `knee` rows in all, then linear."""
    return lambda rows: 1.0 + 2e-4 * rows + np.maximum(rows - knee, 0) / knee


def _stairs(rows: np.ndarray) -> np.ndarray:
    """Tiles of 64 rows."""
    return 0.7 + 0.3 * np.ceil(rows / 64)


def _amx_target(rows: np.ndarray) -> np.ndarray:
    """Up to 32 rows in all take nearly as long as one, the next half as long again.

    So it was seen on two cores with AMX, where 3-1-4 at batch 8 took half of what the quick table's
    best tree took.
    """
    beyond = np.maximum(rows - 32, 0)
    return 1.0 + 0.009 * np.minimum(rows, 32) + 0.55 * (beyond > 0) + 0.004 * beyond


def _amx_draft(rows: np.ndarray) -> np.ndarray:
    beyond = np.maximum(rows - 32, 0)
    return 1.0 + 0.01 * np.minimum(rows, 32) + 0.5 * (beyond > 0) + 0.012 * beyond


def _gpu(target: Callable[[np.ndarray], np.ndarray], layer: float = 0.05) -> Callable[[], _Curves]:
    return lambda: _Curves(target, _flat(256), 10_000.0, layer)


def _profile(path: str) -> Callable[[], CostModel]:
    def load() -> CostModel:
        return CostModel(load_profile(ROOT / path), LIMITS)

    return load


MACHINES: dict[str, Callable[[], CostModel | _Curves | _Coarse]] = {
    "amd-170m": _profile("profiles/amd-epyc-2-cores__tiny-170m__tp1__bfloat16.json"),
    "amd-tiny": _profile("profiles/amd-epyc-2-cores__tiny__tp1__bfloat16.json"),
    "intel-170m": _profile("tests/data/intel-xeon-amx-2-cores__tiny-170m__tp1__bfloat16.json"),
    "amx-quick": lambda: _Coarse(_Curves(_amx_target, _amx_draft, 50_000.0, 0.12)),
    "gpu-64": _gpu(_flat(64)),
    "gpu-128": _gpu(_flat(128)),
    "gpu-256": _gpu(_flat(256), 0.1),
    "gpu-tiles": _gpu(_stairs),
    "amd-gaps": _profile("profiles/amd-epyc-2-cores__tiny-170m__tp1__bfloat16.json"),
    "gpu-gaps": _gpu(_flat(64), 0.1),
}


class Corrected:
    """A server with a machine's table, which it corrects by measured times, as servers do.

    Args:
        batch_size: of all its steps.
        residuals: what an earlier server learned; None for a first start.
    """

    def __init__(
        self, machine: Machine, batch_size: int, residuals: Residuals | None = None
    ) -> None:
        self._machine, self._batch_size = machine, batch_size
        self._residuals = Residuals(LIMITS) if residuals is None else residuals
        self._corrected = CorrectedCosts(machine.tables, self._residuals)
        self._table, self._truth = machine.table(batch_size), machine.truth(batch_size)

    def costs(self, step: int) -> StepCosts:
        if step % REFRESH_EVERY == 0:
            self._residuals.refresh()
        return self._corrected.step_costs(self._batch_size, CONTEXT)

    def units(self, step: Drafted, costs: StepCosts) -> float:
        machine, table, truth = self._machine, self._table, self._truth
        passes = [("verify", step.mean_rows), *(("draft", width) for width in step.widths)]
        if step is not PLAIN:
            passes.append(("draft_extend", step.extend_rows))
        took = machine.run(truth.overhead * truth.unit_us)
        for operation, count in passes:
            measured = machine.run(pass_us(truth, operation, count))
            took += measured
            ratio = measured / pass_us(table, operation, count)
            if step is not PLAIN:
                ratio /= machine.gap  # lies between passes, where no clock sees it
            self._residuals.record(operation, self._batch_size, round(count), ratio)
        num_layers = len(step.widths) + 1 if step is not PLAIN else 0
        expected = step.units(costs) * costs.unit_us
        self._residuals.record_step(
            self._batch_size, num_layers, took / table.unit_us, expected / table.unit_us
        )
        return step.units(truth)


class Served(NamedTuple):
    """A closed loop of one batch size, and what the best fixed tree would have reached."""

    result: Result  # times as they are on average, without noise and plateaus
    fixed: float  # rate of the best fixed tree of hindsight
    plain: float  # rate of plain decoding
    shape: tuple[int, int, int]
    truth: StepCosts
    text: Text

    def rate(self, first: int = 0, last: int | None = None) -> float:
        """Return the rate of these steps, relative to that of the best fixed tree on them."""
        fixed = fixed_rate(self.truth, self.text, self.shape, first, last)
        return self.result.rate(first, last) / fixed

    def rate_against_own(self, first: int, last: int) -> float:
        """Return the same, relative to the fixed tree that is best for these steps alone."""
        return self.result.rate(first, last) / best_fixed(self.truth, self.text, first, last)[0]


def serve(
    policy: TreePolicy,
    machine: Machine,
    text: Text,
    batch_size: int,
    steps: int,
    acceptance: Acceptance | None = None,
    residuals: Residuals | None = None,
) -> Served:
    """Serve as a server does: by corrected tables, by measured times."""
    truth = machine.truth(batch_size)
    costs = Corrected(machine, batch_size, residuals)
    result = run(policy, text, costs, batch_size, steps, acceptance)
    fixed, shape = best_fixed(truth, text)
    return Served(result, fixed, 1.0 / plain_units(truth), shape, truth, text)
