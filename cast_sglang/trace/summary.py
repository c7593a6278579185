"""Recorded against replayed: what a trace measured beside what a policy and a table would give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cast_sglang.errors import TraceError
from cast_sglang.trace.candidates import recorded_reward
from cast_sglang.trace.records import Trace, TracedStep
from cast_sglang.trace.replay import Outcome

__all__ = ["Comparison", "Side", "compare", "print_comparisons"]


# Batch sizes that few steps had, as while requests come and go, have no row of their own.
MIN_SHARE = 0.05


class Side(NamedTuple):
    """Means over steps: per step, of a request in the mean."""

    layers: float
    rows: float  # verified, root included
    accept_length: float  # bonus token included
    expected_length: float  # the same under the target's own probabilities; nan if not recorded
    draft_tree_reward: float
    plain_share: float  # of the steps
    step_ms: float
    tokens_per_second: float


class Comparison(NamedTuple):
    """All steps of one batch size, or of all."""

    batch_size: int  # 0 for all
    steps: int
    recorded: Side
    replayed: Side
    assumed_share: float  # of the replayed accepted drafts
    table_tokens_per_second: float  # replayed, by the tables as they are

    @property
    def error(self) -> float:
        """Replayed over measured tokens per second, less 1."""
        return self.replayed.tokens_per_second / self.recorded.tokens_per_second - 1.0

    @property
    def table_error(self) -> float:
        """The same by the tables as they are."""
        return self.table_tokens_per_second / self.recorded.tokens_per_second - 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; nan becomes None."""
        fields = {**self._asdict(), "error": self.error, "table_error": self.table_error}
        for name in ("recorded", "replayed"):
            fields[name] = {key: _finite(value) for key, value in fields[name]._asdict().items()}
        return {name: _finite(value) for name, value in fields.items()}


def compare(trace: Trace, outcomes: Sequence[Outcome]) -> list[Comparison]:
    """Compare step by step, for each batch size and for all, over steps whose time was measured.

    Raises:
        TraceError: no step of the trace has a measured time.
    """
    batches: dict[int, list[tuple[TracedStep, Outcome]]] = {}
    for step, outcome in zip(trace.steps, outcomes, strict=True):
        if step.measured_us is not None:
            batches.setdefault(step.batch_size, []).append((step, outcome))
    if not batches:
        raise TraceError(f"trace {trace.path}: the time of no step was measured")
    topk = trace.header.topk
    least = MIN_SHARE * sum(map(len, batches.values()))
    rows = [
        _comparison(size, pairs, topk)
        for size, pairs in sorted(batches.items())
        if len(pairs) >= least
    ]
    if len(batches) > 1:
        rows.append(_comparison(0, [pair for pairs in batches.values() for pair in pairs], topk))
    return rows


def _comparison(
    batch_size: int, pairs: Sequence[tuple[TracedStep, Outcome]], topk: int
) -> Comparison:
    steps = [step for step, _ in pairs]
    outcomes = [outcome for _, outcome in pairs]
    rewards = [recorded_reward(step, topk) for step in steps if not step.is_plain]
    told = [reward for reward in rewards if reward is not None]
    sizes = [step.batch_size for step in steps]
    lengths = [
        1.0 + sum(len(request.accepted) for request in step.requests) / step.batch_size
        for step in steps
    ]
    recorded = Side(
        layers=_mean(step.num_layers for step in steps),
        rows=_mean(step.mean_rows for step in steps),
        accept_length=_mean(lengths),
        expected_length=1.0 + _mean(reward.expected for reward in told),
        draft_tree_reward=_mean(reward.draft_tree_reward for reward in told),
        plain_share=_mean(step.is_plain for step in steps),
        step_ms=_mean(step.measured_us or 0.0 for step in steps) / 1e3,
        tokens_per_second=_speed(sizes, lengths, [step.measured_us or 0.0 for step in steps]),
    )
    grown = [outcome.reward for outcome in outcomes if outcome.reward is not None]
    lengths = [1.0 + outcome.accepted for outcome in outcomes]
    replayed = Side(
        layers=_mean(outcome.choice.num_layers for outcome in outcomes),
        rows=_mean(outcome.mean_rows for outcome in outcomes),
        accept_length=_mean(lengths),
        expected_length=1.0 + _mean(reward.expected for reward in grown),
        draft_tree_reward=_mean(reward.draft_tree_reward for reward in grown),
        plain_share=_mean(outcome.choice.is_plain for outcome in outcomes),
        step_ms=_mean(outcome.time_us for outcome in outcomes) / 1e3,
        tokens_per_second=_speed(sizes, lengths, [outcome.time_us for outcome in outcomes]),
    )
    accepted = sum(outcome.accepted for outcome in outcomes)
    return Comparison(
        batch_size=batch_size,
        steps=len(steps),
        recorded=recorded,
        replayed=replayed,
        assumed_share=sum(outcome.assumed for outcome in outcomes) / accepted if accepted else 0.0,
        table_tokens_per_second=_speed(sizes, lengths, [o.table_us for o in outcomes]),
    )


def print_comparisons(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print a table of two lines for each batch size, and what its columns mean."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    headings = ("batch", "steps", "", "layers", "rows", "accept", "expect", "GTO", "plain", "ms")
    for heading in (*headings, "tok/s"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for c in comparisons:
        table.add_row(str(c.batch_size or "all"), str(c.steps), "recorded", *_cells(c.recorded))
        table.add_row("", "", "replayed", *_cells(c.replayed))
    console.print(table)
    console.print(
        "accept: accepted length, bonus token included; expect: by the target's probabilities\n"
        "GTO: the draft-tree reward of the verified nodes (arXiv 2509.22134)\n"
        "ms and tok/s: recorded as measured, replayed as predicted",
        soft_wrap=True,
        highlight=False,
    )


def _cells(side: Side) -> list[str]:
    numbers = [f"{side.layers:.2f}", f"{side.rows:.1f}", f"{side.accept_length:.2f}"]
    for value in (side.expected_length, side.draft_tree_reward):
        numbers.append("" if math.isnan(value) else f"{value:.2f}")
    plain = f"{side.plain_share:.0%}" if side.plain_share else ""
    return [*numbers, plain, f"{side.step_ms:.3g}", f"{side.tokens_per_second:.4g}"]


def _speed(sizes: list[int], lengths: Sequence[float], times_us: Sequence[float]) -> float:
    tokens = sum(size * length for size, length in zip(sizes, lengths, strict=True))
    return tokens / max(sum(times_us), 1e-9) * 1e6


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / len(held) if held else math.nan


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
