"""Search the thresholds of policy `fixed` that would have served a trace fastest.

The objective is the speed of `fixed` divided by that of policy `auto` at the same batch size, as a
mean over steps, so that batch sizes of different speeds count alike. The result also states how
much slower the thresholds are than `auto`, and than the best fixed tree of each batch size, which
only a replay can know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cast_sglang.costs.schema import CostTables
from cast_sglang.trace.fixed_trees import FIXED_TREES, fits, replay_tree
from cast_sglang.trace.records import Trace, TracedStep
from cast_sglang.trace.replay import Replay, make_policy

__all__ = ["Thresholds", "Tuned", "print_tuned", "sample_steps", "tune"]

# Length of a run of consecutive steps. The depth rule averages over steps, so single steps will not
# do.
STRETCH = 50
# Policies that the thresholds found are compared with.
YARDSTICKS = ("auto", "fixed tree")
PRICES = (0.125, 32.0)  # range of C1, C2 and C3
AVERAGED = (1, 2, 4, 8, 16, 32, 64)  # values of R
# Share of the evaluations that are drawn at random; the rest refines the best of them.
RANDOM_SHARE = 0.4
# Factors by which the refinement changes a price.
FIRST_STRIDE, LAST_STRIDE = 2.0, 1.05


class Thresholds(NamedTuple):
    """The thresholds of policy `fixed`."""

    c1: float
    c2: float
    c3: float
    r: int


class Tuned(NamedTuple):
    """The best thresholds found, and the tokens per second of each policy by batch size."""

    thresholds: Thresholds
    recorded: Thresholds  # those of the recording server's settings
    steps: dict[int, int]  # number of steps by batch size
    speeds: dict[str, dict[int, float]]  # of "tuned", "recorded" and `YARDSTICKS`, by batch size
    trees: dict[int, str]  # the best fixed tree by batch size
    evaluations: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and all regrets as values that JSON can hold."""
        regrets = {
            against: {size: self.regret("tuned", against, size) for size in self.steps}
            for against in (*YARDSTICKS, "recorded")
        }
        thresholds = {name: getattr(self, name)._asdict() for name in ("thresholds", "recorded")}
        return {**self._asdict(), **thresholds, "regret": regrets}

    def regret(self, of: str, against: str, batch_size: int) -> float:
        """Return by what share policy `of` is slower than policy `against`."""
        return 1.0 - self.speeds[of][batch_size] / self.speeds[against][batch_size]


def tune(
    trace: Trace,
    tables: CostTables,
    *,
    correct: bool = False,
    evaluations: int = 80,
    max_steps: int = 400,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Tuned:
    """Search thresholds: at random first, then one at a time around the best.

    Args:
        tables, correct: as for `Replay`.
        evaluations: number of thresholds to try, at least 2.
        max_steps: if the trace is longer, replay runs of steps from all over it.
        seed: seed of the search and of the replays.
        progress: called after each replay with the replays done and their total number.

    Raises:
        TraceError: as `Replay` does.
    """
    trace = trace._replace(steps=sample_steps(trace.steps, max_steps))
    sizes = sorted({step.batch_size for step in trace.steps})
    steps = {size: sum(step.batch_size == size for step in trace.steps) for size in sizes}
    done = 0

    options: dict[str, Any] = {"correct": correct, "seed": seed, "rewards": False}
    shapes = [shape for shape in FIXED_TREES if fits(shape, trace.header)]
    num_replays = evaluations + 1 + len(shapes)

    def speeds(replay: Replay) -> dict[int, float]:
        nonlocal done
        tokens, time_us = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
        for step, outcome in zip(trace.steps, replay, strict=True):
            tokens[step.batch_size] += step.batch_size * (1.0 + outcome.accepted)
            time_us[step.batch_size] += outcome.time_us
        done += 1
        progress(done, num_replays)
        return {size: tokens[size] / time_us[size] * 1e6 for size in sizes}

    def value(of: dict[int, float]) -> float:
        return sum(steps[size] * of[size] / auto[size] for size in sizes) / len(trace.steps)

    tried: dict[Thresholds, dict[int, float]] = {}

    def best() -> Thresholds:
        return max(tried, key=lambda thresholds: value(tried[thresholds]))

    def attempt(thresholds: Thresholds) -> None:
        if thresholds not in tried and len(tried) < evaluations:
            policy = make_policy("fixed", trace.header, **thresholds._asdict())
            tried[thresholds] = speeds(Replay(trace, tables, policy, **options))

    auto = speeds(Replay(trace, tables, make_policy("auto", trace.header), **options))
    fixed = {shape: speeds(replay_tree(trace, tables, shape, **options)) for shape in shapes}
    best_tree = {size: max(fixed, key=lambda shape: fixed[shape][size]) for size in sizes}
    settings = trace.header.settings
    c1, c2, c3, r = (float(settings[key]) for key in ("c1", "c2", "c3", "r"))  # type: ignore[arg-type]
    recorded = Thresholds(c1, c2, c3, int(r))
    attempt(recorded)
    random = np.random.default_rng(seed)
    low, high = (math.log(price) for price in PRICES)
    while len(tried) < max(2, round(RANDOM_SHARE * evaluations)):
        prices = np.exp(random.uniform(low, high, size=3))
        c1, c2, c3 = (_rounded(price) for price in prices)
        attempt(Thresholds(c1, c2, c3, int(random.choice(AVERAGED))))
    stride = FIRST_STRIDE
    while len(tried) < evaluations and stride > LAST_STRIDE:
        before = best()
        for neighbour in _neighbours(before, stride):
            attempt(neighbour)
        if best() == before:
            stride = math.sqrt(stride)
    thresholds = best()
    found = {
        "tuned": tried[thresholds],
        "recorded": tried[recorded],
        "auto": auto,
        "fixed tree": {size: fixed[shape][size] for size, shape in best_tree.items()},
    }
    trees = {size: str(shape) for size, shape in best_tree.items()}
    return Tuned(thresholds, recorded, steps, found, trees, len(tried))


def sample_steps(steps: Sequence[TracedStep], max_steps: int) -> list[TracedStep]:
    """Return about `max_steps` steps, in runs of `STRETCH` from all over the trace."""
    num_stretches = max(1, max_steps // STRETCH)
    if len(steps) <= num_stretches * STRETCH:
        return list(steps)
    starts = np.linspace(0, len(steps) - STRETCH, num_stretches).astype(int)
    chosen = sorted({i for start in starts.tolist() for i in range(start, start + STRETCH)})
    return [steps[i] for i in chosen]


def print_tuned(tuned: Tuned, console: Console) -> None:
    """Print speeds and regrets by batch size, and the settings to use."""
    table = Table(box=SIMPLE_HEAD, padding=0)  # else ten columns are cut at a width of 80
    headings = ["batch", "steps", "before", "tuned", *YARDSTICKS, "of shape"]
    for heading in [*headings, *(f"to {against}" for against in YARDSTICKS)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for size, count in tuned.steps.items():
        speeds = [tuned.speeds[name][size] for name in ("recorded", "tuned", *YARDSTICKS)]
        regrets = [tuned.regret("tuned", against, size) for against in YARDSTICKS]
        cells = [f"{speed:.4g}" for speed in speeds] + [tuned.trees[size]]
        cells += [f"{regret:.1%}" for regret in regrets]
        table.add_row(str(size), str(count), *cells)
    console.print("[bold]predicted tokens per second[/bold]")
    console.print(table)
    console.print(
        f"before: {_words(tuned.recorded)}\n"
        "to: regret of the tuned thresholds, the share of the other's speed that they lack; "
        "the fixed\ntree is the best of each batch size, in layers-width-rows, known in hindsight",
        soft_wrap=True,
    )
    c1, c2, c3, r = tuned.thresholds
    flags = f"--cast-policy fixed --cast-c1 {c1:g} --cast-c2 {c2:g} --cast-c3 {c3:g} --cast-r {r}"
    console.print(f"\n[bold]flags[/bold]\n{flags}", soft_wrap=True, highlight=False)
    lines = [f'policy = "fixed"\nc1 = {c1:g}\nc2 = {c2:g}\nc3 = {c3:g}\nr = {r}']
    console.print("\n[bold]TOML, for --cast-config[/bold]", *lines, sep="\n", highlight=False)


def _neighbours(thresholds: Thresholds, stride: float) -> list[Thresholds]:
    found = []
    for name in ("c1", "c2", "c3"):
        for factor in (1.0 / stride, stride):
            moved: dict[str, Any] = {name: _rounded(getattr(thresholds, name) * factor)}
            found.append(thresholds._replace(**moved))
    place = min(range(len(AVERAGED)), key=lambda i: abs(AVERAGED[i] - thresholds.r))
    for other in (place - 1, place + 1):
        if 0 <= other < len(AVERAGED):
            found.append(thresholds._replace(r=AVERAGED[other]))
    return found


def _rounded(price: float) -> float:
    """Return the price rounded to three digits."""
    return float(f"{price:.3g}")


def _words(thresholds: Thresholds) -> str:
    c1, c2, c3, r = thresholds
    return f"C1 {c1:g}, C2 {c2:g}, C3 {c3:g}, R {r}"
