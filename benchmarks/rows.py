"""Rows: what an arm did in a cell, compared with the other arms, and the summary of all cells."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.arms import Arm
from benchmarks.cells import Cell, Group, Result
from benchmarks.counters import FIELDS, step_means
from benchmarks.streams import accept_length, latencies

ALL = "all"
# What a CAST arm is without its counters: an arm of another kind.
NOT_COUNTED = dict.fromkeys(FIELDS)


def as_rows(cell: Cell, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Summarise a cell: one row for each arm, and of plain decoding one for each group.

    Ratios are medians over repeats of the ratio within a repeat, with the least and the greatest.
    The best static arm is that of the greatest median in this very cell: a choice in hindsight,
    which no server could have made before. Arms of different groups ran at different times; what
    they are compared by is their ratio to plain decoding, each in its own group.
    """
    home, best = _best_static(groups)
    rows = []
    for number, group in enumerate(groups, start=1):
        plain = group.plain
        for arm in group.arms:
            result = group.results[arm.name]
            num_same = None
            if plain is not None and cell.temperature == 0:
                num_same = num_identical(result, plain)
            vs_plain = [] if plain is None else ratios(result, plain)
            rows.append(
                {
                    "arm": arm.name,
                    **cell._asdict(),
                    **speeds(result),
                    **_compared("vs_plain", vs_plain),
                    "best_static": best,
                    **_compared("vs_best_static", _vs_best(group, arm.name, home, best)),
                    "accept_length": accept_length(result.answers),
                    "identical_to_plain": (
                        None if num_same is None else num_same == len(result.answers)
                    ),
                    "num_identical": num_same,
                    "num_requests": len(result.answers),
                    **latencies(result.answers),
                    **(step_means(result.totals) if arm.kind == "cast" else NOT_COUNTED),
                    "group": number,
                }
            )
    return rows


def _best_static(groups: Sequence[Group]) -> tuple[Group | None, str | None]:
    """Return the group and the name of the fastest static arm."""
    candidates = [
        (_speed(group, arm.name, len(groups) > 1), group, arm.name)
        for group in groups
        for arm in group.arms
        if arm.kind == "static"
    ]
    if not candidates:
        return None, None
    _, group, name = max(candidates, key=lambda candidate: candidate[0])
    return group, name


def _speed(group: Group, name: str, by_plain: bool) -> float:
    """Return what arms are ranked by: across groups only the ratio to plain decoding says much."""
    result = group.results[name]
    if by_plain and group.plain is not None:
        return statistics.median(ratios(result, group.plain))
    return statistics.median(result.tok_s)


def _vs_best(group: Group, name: str, home: Group | None, best: str | None) -> list[float]:
    """Return the ratio to the best static arm within each repeat; none if there is no such arm."""
    if home is None or best is None:
        return []
    result, base = group.results[name], home.results[best]
    if home is group or group.plain is None or home.plain is None:
        return ratios(result, base)
    ours, theirs = ratios(result, group.plain), ratios(base, home.plain)
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def row_fields() -> list[str]:
    """Return the names of a row's fields, in order."""
    group = Group([Arm("plain", "plain")], {"plain": Result([1.0])})
    return list(as_rows(Cell(1, 0.0, ""), [group])[0])


def speeds(result: Result) -> dict[str, Any]:
    """Return the tokens per second of an arm as fields of a row."""
    return {
        "tok_s_median": round(statistics.median(result.tok_s), 2),
        "tok_s_min": round(min(result.tok_s), 2),
        "tok_s_max": round(max(result.tok_s), 2),
        "tok_s": [round(value, 2) for value in result.tok_s],
    }


def num_identical(result: Result, base: Result) -> int:
    """Return how many answers are those of the other arm, token for token."""
    answers = zip(result.answers, base.answers, strict=True)
    return sum(ours.output_ids == theirs.output_ids for ours, theirs in answers)


def ratios(result: Result, base: Result) -> list[float]:
    """Return the ratio within each repeat."""
    return [ours / theirs for ours, theirs in zip(result.tok_s, base.tok_s, strict=True)]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each arm's geometric mean over batches, per task and temperature, and over all cells.

    None where a cell has no such ratio.
    """
    groups = list(dict.fromkeys((row["task"], row["temperature"]) for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    wanted = [*groups, (ALL, None)] if len(groups) > 1 else groups
    summary = []
    for (task, temperature), arm in itertools.product(wanted, arms):
        cells = [
            row
            for row in rows
            if row["arm"] == arm
            and (task == ALL or (row["task"], row["temperature"]) == (task, temperature))
        ]
        if cells:
            means = {
                name: _geometric_mean([row[name] for row in cells])
                for name in ("vs_plain", "vs_best_static")
            }
            summary.append({"task": task, "temperature": temperature, "arm": arm, **means})
    return summary


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the rows to a person."""
    table = Table(title="Steady decoding, tokens/s: median (min to max) of the repeats")
    for heading in ("task", "T", "batch", "arm"):
        table.add_column(heading)
    headings = ("tokens/s", "vs plain", "vs best static", "accept length", "same as plain")
    for heading in (*headings, "TTFT p50, p99 ms", "gap p50, p99 ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        same = row["num_identical"]
        name = row["arm"] + (" (best static)" if row["arm"] == row["best_static"] else "")
        table.add_row(
            row["task"],
            f"{row['temperature']:g}",
            str(row["batch"]),
            name,
            f"{row['tok_s_median']:.1f} ({row['tok_s_min']:.1f} to {row['tok_s_max']:.1f})",
            *(shown(row[key], "x") for key in ("vs_plain", "vs_best_static")),
            shown(row["accept_length"]),
            "-" if same is None else f"{same} of {row['num_requests']}",
            *(
                ", ".join(shown(row[f"{kind}_{quantile}_ms"], digits=1) for quantile in quantiles)
                for kind, quantiles in (("ttft", ("p50", "p99")), ("itl", ("p50", "p99")))
            ),
        )
    return table


def summary_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    """Show the summary to a person."""
    table = Table("task", "T", "arm", title="Speed-ups: geometric mean over batch sizes")
    for heading in ("vs plain", "vs best static"):
        table.add_column(heading, justify="right")
    for row in summary:
        table.add_row(
            row["task"],
            shown(row["temperature"], digits=1),
            row["arm"],
            *(shown(row[key], "x") for key in ("vs_plain", "vs_best_static")),
        )
    return table


def shown(value: float | None, unit: str = "", digits: int = 2) -> str:
    """Return a number for people; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _compared(name: str, within: Sequence[float]) -> dict[str, float | None]:
    """Return the fields of a ratio, from its values within the repeats."""
    return {
        name: round(statistics.median(within), 4) if within else None,
        f"{name}_min": round(min(within), 4) if within else None,
        f"{name}_max": round(max(within), 4) if within else None,
    }


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return round(statistics.geometric_mean(known), 4)
