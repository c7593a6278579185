"""Compare the recorded steps of a trace with the replayed ones, by batch size."""

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
from cast_sglang.trace.replay import ReplayedStep

__all__ = ["BatchSummary", "StepMeans", "compare", "print_summaries"]

# A batch size with a smaller share of the steps gets no row. Such sizes occur while requests come
# and go.
MIN_SHARE = 0.05


class StepMeans(NamedTuple):
    """Means over steps; all but the last three fields are also means over requests."""

    layers: float
    rows: float  # verified, root included
    accept_length: float  # bonus token included
    expected_length: float  # the same by the target's probabilities; nan if not recorded
    draft_tree_reward: float  # see `reward.TreeReward`; nan if not recorded
    plain_share: float  # of the steps
    step_ms: float
    tokens_per_second: float


class BatchSummary(NamedTuple):
    """Recorded and replayed means over all steps of one batch size, or of all batch sizes."""

    batch_size: int  # 0 for all
    steps: int
    recorded: StepMeans
    replayed: StepMeans
    assumed_share: float  # of the replayed accepted drafts
    table_tokens_per_second: float  # replayed, by the uncorrected tables

    @property
    def error(self) -> float:
        """Replayed over measured tokens per second, less 1."""
        return self.replayed.tokens_per_second / self.recorded.tokens_per_second - 1.0

    @property
    def table_error(self) -> float:
        """The same by the uncorrected tables."""
        return self.table_tokens_per_second / self.recorded.tokens_per_second - 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold; nan becomes None."""
        fields = {**self._asdict(), "error": self.error, "table_error": self.table_error}
        for name in ("recorded", "replayed"):
            fields[name] = {key: _finite(value) for key, value in fields[name]._asdict().items()}
        return {name: _finite(value) for name, value in fields.items()}


def compare(trace: Trace, replayed_steps: Sequence[ReplayedStep]) -> list[BatchSummary]:
    """Summarise recorded and replayed steps for each batch size, and for all together.

    Steps without a measured time are left out.

    Args:
        replayed_steps: the replayed steps, one for each step of the trace.

    Raises:
        TraceError: no step of the trace has a measured time.
    """
    batches: dict[int, list[tuple[TracedStep, ReplayedStep]]] = {}
    for step, chosen in zip(trace.steps, replayed_steps, strict=True):
        if step.measured_us is not None:
            batches.setdefault(step.batch_size, []).append((step, chosen))
    if not batches:
        raise TraceError(f"trace {trace.path}: the time of no step was measured")
    topk = trace.header.topk
    least = MIN_SHARE * sum(map(len, batches.values()))
    rows = [
        _summarise(size, pairs, topk)
        for size, pairs in sorted(batches.items())
        if len(pairs) >= least
    ]
    if len(batches) > 1:
        rows.append(_summarise(0, [pair for pairs in batches.values() for pair in pairs], topk))
    return rows


def _summarise(
    batch_size: int, pairs: Sequence[tuple[TracedStep, ReplayedStep]], topk: int
) -> BatchSummary:
    steps = [step for step, _ in pairs]
    replayed_steps = [chosen for _, chosen in pairs]
    rewards = [recorded_reward(step, topk) for step in steps if not step.is_plain]
    known = [reward for reward in rewards if reward is not None]
    sizes = [step.batch_size for step in steps]
    lengths = [
        1.0 + sum(len(request.accepted) for request in step.requests) / step.batch_size
        for step in steps
    ]
    recorded = StepMeans(
        layers=_mean(step.num_layers for step in steps),
        rows=_mean(step.mean_rows for step in steps),
        accept_length=_mean(lengths),
        expected_length=1.0 + _mean(reward.expected for reward in known),
        draft_tree_reward=_mean(reward.draft_tree_reward for reward in known),
        plain_share=_mean(step.is_plain for step in steps),
        step_ms=_mean(step.measured_us or 0.0 for step in steps) / 1e3,
        tokens_per_second=_speed(sizes, lengths, [step.measured_us or 0.0 for step in steps]),
    )
    grown = [chosen.reward for chosen in replayed_steps if chosen.reward is not None]
    lengths = [1.0 + chosen.accepted for chosen in replayed_steps]
    replayed = StepMeans(
        layers=_mean(chosen.choice.num_layers for chosen in replayed_steps),
        rows=_mean(chosen.mean_rows for chosen in replayed_steps),
        accept_length=_mean(lengths),
        expected_length=1.0 + _mean(reward.expected for reward in grown),
        draft_tree_reward=_mean(reward.draft_tree_reward for reward in grown),
        plain_share=_mean(chosen.choice.is_plain for chosen in replayed_steps),
        step_ms=_mean(chosen.time_us for chosen in replayed_steps) / 1e3,
        tokens_per_second=_speed(sizes, lengths, [chosen.time_us for chosen in replayed_steps]),
    )
    accepted = sum(chosen.accepted for chosen in replayed_steps)
    assumed = sum(chosen.assumed_accepted for chosen in replayed_steps)
    return BatchSummary(
        batch_size=batch_size,
        steps=len(steps),
        recorded=recorded,
        replayed=replayed,
        assumed_share=assumed / accepted if accepted else 0.0,
        table_tokens_per_second=_speed(
            sizes, lengths, [chosen.table_us for chosen in replayed_steps]
        ),
    )


def print_summaries(summaries: Sequence[BatchSummary], console: Console) -> None:
    """Print a table with two lines for each batch size, and the meaning of its columns."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    headings = ("batch", "steps", "", "layers", "rows", "accept", "expect", "GTO", "plain", "ms")
    for heading in (*headings, "tok/s"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in summaries:
        batch_size = str(row.batch_size or "all")
        table.add_row(batch_size, str(row.steps), "recorded", *_cells(row.recorded))
        table.add_row("", "", "replayed", *_cells(row.replayed))
    console.print(table)
    console.print(
        "accept: accepted length, bonus token included; expect: by the target's probabilities\n"
        "GTO: the draft-tree reward of the verified nodes (arXiv 2509.22134)\n"
        "ms and tok/s: recorded as measured, replayed as predicted",
        soft_wrap=True,
        highlight=False,
    )


def _cells(means: StepMeans) -> list[str]:
    numbers = [f"{means.layers:.2f}", f"{means.rows:.1f}", f"{means.accept_length:.2f}"]
    for value in (means.expected_length, means.draft_tree_reward):
        numbers.append("" if math.isnan(value) else f"{value:.2f}")
    plain = f"{means.plain_share:.0%}" if means.plain_share else ""
    return [*numbers, plain, f"{means.step_ms:.3g}", f"{means.tokens_per_second:.4g}"]


def _speed(sizes: list[int], lengths: Sequence[float], times_us: Sequence[float]) -> float:
    tokens = sum(size * length for size, length in zip(sizes, lengths, strict=True))
    return tokens / max(sum(times_us), 1e-9) * 1e6


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / len(held) if held else math.nan


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
