"""The figure of the study of imperfect cost tables: speed relative to the right table."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.variants import RIGHT


class Point(NamedTuple):
    """Speed relative to the right table: median, least and greatest."""

    speed: float
    low: float
    high: float


def draw(rows: Sequence[dict[str, Any]], title: str, paths: Sequence[Path]) -> None:
    """Draw speed against table error, and the speed of the other tables, into files.

    One line for each batch size; bars reach from the least to the greatest ratio of a repeat.
    """
    # Not pyplot: it would ask for a display and keep global state.
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    errors, others = figure.subplots(1, 2, sharey=True)
    labels = list(dict.fromkeys(kind_label(row) for row in rows if not _has_error(row)))
    lines = sorted({(row["batch"], row["task"]) for row in rows})
    for index, (batch, task) in enumerate(lines):
        name = f"batch {batch}" + (f", {task}" if len({task for _, task in lines}) > 1 else "")
        mine = [row for row in rows if (row["batch"], row["task"]) == (batch, task)]
        # Beside each other, so that no bar hides another.
        shift = index - (len(lines) - 1) / 2
        curve = {100 * error + 0.5 * shift: point for error, point in error_points(mine).items()}
        _plot(errors, curve, "o-", f"C{index}", name)
        points = {
            labels.index(kind_label(row)) + 0.15 * shift: _merged([row])
            for row in mine
            if not _has_error(row)
        }
        _plot(others, points, "o", f"C{index}", name)
    for axes in (errors, others):
        axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    errors.set_title("random errors")
    errors.set_xlabel("typical error of a table entry, %")
    errors.set_ylabel("speed relative to the right table")
    errors.legend(fontsize="small")
    others.set_title("other tables")
    others.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize="small")
    figure.suptitle(title)
    for path in paths:
        figure.savefig(path)


def error_points(rows: Sequence[dict[str, Any]]) -> dict[float, Point]:
    """Return the points of one line by nominal error; several draws of one error are merged."""
    by_error: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if _has_error(row) and row["variant"] != RIGHT:
            by_error.setdefault(row["nominal_error"], []).append(row)
    return {error: _merged(by_error[error]) for error in sorted(by_error)}


def kind_label(row: dict[str, Any]) -> str:
    """Name a table on the axis, with the time that measuring it took."""
    seconds = row["profile_seconds"]
    return row["variant"] if seconds is None else f"{row['variant']}\n({seconds:.0f} s)"


def _has_error(row: dict[str, Any]) -> bool:
    """Say whether a row belongs to the axis of errors: the reference does, as its origin."""
    return row["variant"] == RIGHT or (row["nominal_error"] is not None and not row["residuals"])


def _merged(rows: Sequence[dict[str, Any]]) -> Point:
    return Point(
        statistics.median(row["vs_right"] for row in rows),
        min(row["vs_right_min"] for row in rows),
        max(row["vs_right_max"] for row in rows),
    )


def _plot(axes: Any, points: dict[float, Point], style: str, color: str, label: str) -> None:
    speeds = [point.speed for point in points.values()]
    below = [point.speed - point.low for point in points.values()]
    above = [point.high - point.speed for point in points.values()]
    axes.errorbar(
        list(points), speeds, [below, above], fmt=style, color=color, capsize=3, label=label
    )
