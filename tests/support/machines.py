"""Machines that exist only as times: what a table says of one, and what its passes really take.

A table is measured once, pass by pass, on a quiet machine. Serving then meets other times: passes
run after each other, caches are shared, the clock moves. A `Machine` has both, and draws the
differences as they were seen on real ones:

* every pass takes 1.2 to 1.8 times what its table says, each pass another factor;
* single sizes take 0.7 to 2.5 times that, as where a kernel changes;
* the speed of all passes moves in plateaus of seconds;
* one pass varies by 15 %;
* and a step takes some time that no table has.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cast_sglang.costs.correction import REFRESH_EVERY, CorrectedCosts, Residuals
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, StepCosts, pass_us, plain_units, step_units
from cast_sglang.costs.passes import NAMES
from cast_sglang.costs.profiles import load_profile
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.base import TreePolicy
from tests.support.simulator import (
    LAYERS,
    TOKENS,
    TOPK,
    Drafted,
    Result,
    Text,
    best_fixed,
    drafted,
    facts,
    fixed_rate,
    make_decider,
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
PLAIN = Drafted(1.0, 0.0, [], 1.0, 0)
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
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._factors: dict[int, dict[str, np.ndarray]] = {}
        self._pass_factors = {
            op: 1.0 if self._rng is None else self._rng.uniform(*PASS_FACTORS) for op in NAMES
        }
        self.untabled = 0.0 if self._rng is None else UNTABLED
        self._now = self._plateau_ends = 0.0
        self._speed = 1.0

    def table(self, batch_size: int) -> StepCosts:
        """Return the costs that the table has."""
        return self.tables.step_costs(batch_size, CONTEXT)

    def truth(self, batch_size: int) -> StepCosts:
        """Return the costs as they are on average, in units of the table's."""
        table = self.table(batch_size)
        factors = self._factors.get(batch_size)
        if factors is None:
            factors = self._factors[batch_size] = {
                op: self._draw(op, len(getattr(table, op))) for op in NAMES
            }
        overhead = table.overhead + self.untabled
        return table._replace(
            **{op: getattr(table, op) * factors[op] for op in NAMES},
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


def _flat(knee: int) -> Callable[[np.ndarray], np.ndarray]:
    """Flat to `knee` rows in all, then linear."""
    return lambda rows: 1.0 + 2e-4 * rows + np.maximum(rows - knee, 0) / knee


def _stairs(rows: np.ndarray) -> np.ndarray:
    """Tiles of 64 rows."""
    return 0.7 + 0.3 * np.ceil(rows / 64)


def _gpu(target: Callable[[np.ndarray], np.ndarray], layer: float = 0.05) -> Callable[[], _Curves]:
    return lambda: _Curves(target, _flat(256), 10_000.0, layer)


def _profile(path: str) -> Callable[[], CostModel]:
    def load() -> CostModel:
        return CostModel(load_profile(ROOT / path), LIMITS)

    return load


MACHINES: dict[str, Callable[[], CostModel | _Curves]] = {
    "amd-170m": _profile("profiles/amd-epyc-2-cores__tiny-170m__tp1__bfloat16.json"),
    "amd-tiny": _profile("profiles/amd-epyc-2-cores__tiny__tp1__bfloat16.json"),
    "intel-170m": _profile("tests/data/intel-xeon-amx-2-cores__tiny-170m__tp1__bfloat16.json"),
    "gpu-64": _gpu(_flat(64)),
    "gpu-128": _gpu(_flat(128)),
    "gpu-256": _gpu(_flat(256), 0.1),
    "gpu-tiles": _gpu(_stairs),
}


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
        tokens, times = self.result.tokens[first:last], self.result.times[first:last]
        fixed = fixed_rate(self.truth, self.text, self.shape, first, last)
        return float(tokens.sum() / times.sum()) / fixed


def serve(
    policy: TreePolicy,
    machine: Machine,
    text: Text,
    batch_size: int,
    steps: int,
    acceptance: Acceptance | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Served:
    """Serve as a server does: by corrected tables, by measured times."""
    residuals = Residuals(LIMITS)
    corrected = CorrectedCosts(machine.tables, residuals)
    decider = make_decider(policy)
    table, truth = machine.table(batch_size), machine.truth(batch_size)
    rows = []
    for step in range(steps):
        if on_step is not None:
            on_step(step)
        text.advance()
        if step % REFRESH_EVERY == 0:
            residuals.refresh()
        costs = corrected.step_costs(batch_size, CONTEXT)
        price = decider.price(batch_size) or math.nan
        is_plain = not decider.begin_step(facts(batch_size, costs)).drafts
        tree = PLAIN if is_plain else drafted(decider, text, batch_size, acceptance)
        passes = [("verify", tree.mean_rows), *(("draft", width) for width in tree.widths)]
        if not is_plain:
            passes.append(("draft_extend", tree.extend_rows))
        took = machine.run(truth.overhead * truth.unit_us)
        for operation, count in passes:
            measured = machine.run(pass_us(truth, operation, count))
            took += measured
            ratio = measured / pass_us(table, operation, count)
            residuals.record(operation, batch_size, round(count), ratio)
        shape = tree.widths, tree.mean_rows, tree.extend_rows
        units = step_units(costs, *shape)
        num_layers = 0 if is_plain else len(tree.widths) + 1
        scale = costs.unit_us / table.unit_us
        residuals.record_step(batch_size, num_layers, took / table.unit_us, units * scale)
        if not is_plain:
            decider.end_step(batch_size, tree.accepted, units)
        rows.append((tree.tokens, step_units(truth, *shape), price, is_plain))
    result = Result(*(np.array(column) for column in zip(*rows, strict=True)))
    fixed, shape = best_fixed(truth, text)
    return Served(result, fixed, 1.0 / plain_units(truth), shape, truth, text)
