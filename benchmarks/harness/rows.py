"""Rows: what an arm did in a cell, compared with the other arms, and the summary of all cells."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.harness.arms import Arm, kind_of, static_shape
from benchmarks.harness.cells import Cell, Group, Result
from benchmarks.harness.counters import FIELDS, step_means
from benchmarks.harness.streams import accept_length, latencies, num_steps
from benchmarks.harness.turns import extent, quotients

Row = dict[str, Any]
ALL = "all"
NOT_COUNTED = dict.fromkeys(FIELDS)


def as_rows(cell: Cell, groups: Sequence[Group]) -> list[Row]:
    """Summarise a cell: one row for each arm, and of plain decoding one for each group."""
    numbered = enumerate(groups, start=1)
    return compared([row for number, group in numbered for row in measured(cell, group, number)])


def measured(cell: Cell, group: Group, number: int) -> list[Row]:
    """Return what each arm of a group did in a cell; its ratios are still None.

    Args:
        number: of the group, from 1.
    """
    rows = []
    for arm in group.arms:
        result = group.results.get(arm.name)
        if result is None:
            continue
        num_same = None
        if group.plain is not None and cell.temperature == 0:
            num_same = num_identical(result, group.plain)
        rows.append(
            {
                "arm": arm.name,
                **cell._asdict(),
                **speeds(result),
                **_compared("vs_plain", []),
                "best_static": None,
                **_compared("vs_best_static", []),
                "accept_length": accept_length(result.answers),
                "identical_to_plain": (
                    None if num_same is None else num_same == len(result.answers)
                ),
                "num_identical": num_same,
                "num_requests": len(result.answers),
                "steps_a_run": round(num_steps(result.answers) / cell.batch / len(result.tok_s), 1),
                **latencies(result.answers),
                **_steps(arm, result),
                "group": number,
            }
        )
    return rows


def _steps(arm: Arm, result: Result) -> Row:
    """Return what is known of an arm's steps: what CAST counts, or a fixed number of rows."""
    if arm.kind == "cast":
        return step_means(result.totals)
    shape = (0, 0, 1) if arm.kind == "plain" else static_shape(arm.name)
    return {**NOT_COUNTED, "mean_verify_rows": None if shape is None else float(shape[2])}


def compared(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of a cell with their ratios.

    Ratios are medians over repeats of the ratio within a repeat, with the least and the greatest.
    The best static arm is that of the greatest median in this very cell: a choice in hindsight,
    which no server could have made before. Arms of different groups ran at different times; what
    they are compared by is their ratio to plain decoding, each in its own group.
    """
    plains = {row["group"]: row for row in rows if kind_of(row["arm"]) == "plain"}
    is_split = len({row["group"] for row in rows}) > 1
    vs_plain = [_within(row, plains.get(row["group"])) for row in rows]

    # Across groups only the ratio to plain decoding says much.
    speeds_of = vs_plain if is_split and any(vs_plain) else [row["tok_s"] for row in rows]
    statics = [i for i, row in enumerate(rows) if kind_of(row["arm"]) == "static" and speeds_of[i]]
    best = max(statics, key=lambda index: statistics.median(speeds_of[index]), default=None)

    def vs_best(index: int) -> list[float]:
        if best is None:
            return []
        is_near = rows[index]["group"] == rows[best]["group"]
        if is_near or not (vs_plain[index] and vs_plain[best]):
            return _within(rows[index], rows[best])
        return quotients(vs_plain[index], vs_plain[best])

    return [
        {
            **row,
            **_compared("vs_plain", vs_plain[index]),
            "best_static": None if best is None else rows[best]["arm"],
            **_compared("vs_best_static", vs_best(index)),
        }
        for index, row in enumerate(rows)
    ]


def _within(row: Row, base: Row | None) -> list[float]:
    return [] if base is None else quotients(row["tok_s"], base["tok_s"])


def cell_of(row: Mapping[str, Any]) -> Cell:
    """Return the cell of a row."""
    return Cell(row["batch"], row["temperature"], row["task"], row["phase"])


def rows_of(rows: Sequence[Row], cell: Cell) -> list[Row]:
    """Return the rows of a cell."""
    return [row for row in rows if cell_of(row) == cell]


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
        # Ratios are formed from these, so that anyone can form them again.
        "tok_s": [round(value, 4) for value in result.tok_s],
    }


def num_identical(result: Result, base: Result) -> int:
    """Return how many answers are those of the other arm, token for token."""
    answers = zip(result.answers, base.answers, strict=True)
    return sum(ours.output_ids == theirs.output_ids for ours, theirs in answers)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each arm's geometric mean over batches, per task and temperature, and over all cells.

    Cold and warm apart. None where a cell has no such ratio.
    """
    summary = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        ours = [row for row in rows if row["phase"] == phase]
        groups = list(dict.fromkeys((row["task"], row["temperature"]) for row in ours))
        arms = list(dict.fromkeys(row["arm"] for row in ours))
        wanted = [*groups, (ALL, None)] if len(groups) > 1 else groups
        for (task, temperature), arm in itertools.product(wanted, arms):
            cells = [
                row
                for row in ours
                if row["arm"] == arm
                and (task == ALL or (row["task"], row["temperature"]) == (task, temperature))
            ]
            if cells:
                means = {
                    name: _geometric_mean([row[name] for row in cells])
                    for name in ("vs_plain", "vs_best_static")
                }
                named = {"task": task, "temperature": temperature, "phase": phase, "arm": arm}
                summary.append({**named, **means})
    return summary


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Show the rows to a person."""
    table = Table(title="Steady decoding, tokens/s: median (min to max) of the repeats")
    for heading in ("task", "T", "batch", "phase", "arm"):
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
            row["phase"],
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
    table = Table("task", "T", "phase", "arm", title="Speed-ups: geometric mean over batch sizes")
    for heading in ("vs plain", "vs best static"):
        table.add_column(heading, justify="right")
    for row in summary:
        table.add_row(
            row["task"],
            shown(row["temperature"], digits=1),
            row["phase"],
            row["arm"],
            *(shown(row[key], "x") for key in ("vs_plain", "vs_best_static")),
        )
    return table


def shown(value: float | None, unit: str = "", digits: int = 2) -> str:
    """Return a number for people; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _compared(name: str, within: Sequence[float]) -> dict[str, float | None]:
    """Return the fields of a ratio, from its values within the repeats."""
    fields = name, f"{name}_min", f"{name}_max"
    return dict(zip(fields, extent(within), strict=True)) if within else dict.fromkeys(fields)


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return round(statistics.geometric_mean(known), 4)
