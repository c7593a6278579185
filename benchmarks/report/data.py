"""Result files as the report reads them: runs of today's shape, whatever version wrote them."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.arms import kind_of, parse_arm
from benchmarks.harness.cells import COLD, WARM
from benchmarks.harness.rows import row_fields
from benchmarks.harness.turns import Ratio, extent, quotients

Row = dict[str, Any]
COMPARED = ("vs_plain", "vs_best_static")
MEAN = "all"  # in place of a batch size: the geometric mean over batch sizes


# What tells the results of `bench_serving` from other files of numbers.
FIELDS = ("arm", "task", "temperature", "batch", "tok_s", "tok_s_median")
ORIGIN = ("command", "date", "device", "target", "versions", "git_commit")
# What else benchmarks leave behind, by a field of the file or of its rows.
OTHER_KINDS = {
    "points": "reliability curves of bench_calibration; give them with --reliability",
    "draft_extend": "a cost profile; give it with --profile",
    "paper_gpu": "simulated GPUs of bench_gpus",
    "heads": "draft heads of bench_heads",
    "leaked": "requests under faults of soak",
    "texts": "traces of several texts of bench_text",
}
OTHER_ROWS = {
    "setting": "replays of bench_sweep",
    "machine": "simulated machines of bench_machines",
}


class ReportError(ValueError):
    """A file that the report was given is not what it takes."""


class OtherKindError(ReportError):
    """A file holds something else than results of `bench_serving`; the text says what."""


class Run(NamedTuple):
    """One run of a benchmark: how it was made and what it found."""

    source: Path
    provenance: Mapping[str, Any]
    rows: list[Row]  # of warm servers
    is_complete: bool
    cold: Sequence[Row] = ()  # of the first steps of fresh servers


def read_json(path: Path, key: str) -> dict[str, Any]:
    """Read a JSON object that has a certain key.

    Raises:
        ReportError: names the file and what is wrong.
    """
    content = _read(path)
    if not isinstance(content, dict) or key not in content:
        raise ReportError(f"{path}: no {key!r} in it")
    return content


def load_runs(path: Path) -> list[Run]:
    """Return the runs of a file of `bench_serving`, the latest first.

    Raises:
        OtherKindError: the file holds something else.
        ReportError: the file cannot be read.
    """
    runs = []
    for run in _raw_runs(path):
        phases: dict[str, list[Mapping[str, Any]]] = {WARM: [], COLD: []}
        for row in run["rows"]:
            phases[row.get("phase", WARM)].append(row)  # older files have warm rows only
        warm, cold = (normalised(rows) for rows in phases.values())
        runs.append(Run(path, run["provenance"], warm, run.get("complete", True), cold))
    return runs


def _raw_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file as they are, the latest first, without those that have no row."""
    content = _read(path)
    # Before runs were added, a file held one.
    runs = content.get("runs", [content]) if isinstance(content, dict) else []
    runs = [run for run in reversed(runs) if isinstance(run, dict) and run.get("rows")]
    if not runs or not all(_is_serving(run) for run in runs):
        raise OtherKindError(f"{path}: {_other_kind(content)}")
    return runs


def _is_serving(run: Mapping[str, Any]) -> bool:
    origin = run.get("provenance")
    has_origin = isinstance(origin, dict) and all(name in origin for name in ORIGIN)
    return has_origin and all(
        isinstance(row, dict) and all(name in row for name in FIELDS) for row in run["rows"]
    )


def _other_kind(content: Any) -> str:
    if isinstance(content, dict):
        rows = content.get("rows")
        first = rows[0] if isinstance(rows, list) and rows else ()
        named = [kind for field, kind in OTHER_KINDS.items() if field in content]
        named += [kind for field, kind in OTHER_ROWS.items() if field in first]
        if named:
            return named[0]
    return "no results of bench_serving"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: {error}") from error


def latest(runs: Sequence[Run]) -> Run:
    """Return the latest run that came to its end, or the latest."""
    return next((run for run in runs if run.is_complete), runs[0])


def normalised(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Give rows all fields of today; ratios that are missing are formed from the repeats.

    `each_vs_plain` is added: the ratios of the repeats. Plain decoding of further groups, which is
    there only to be compared with, is left out.
    """
    fields = row_fields()
    full: list[Row] = [{name: row.get(name) for name in fields} for row in rows]
    for row in full:
        cell = [other for other in full if cell_of(other) == cell_of(row)]
        row["group"] = row["group"] or 1
        plain = next((o for o in cell if is_plain(o) and (o["group"] or 1) == row["group"]), None)
        statics = [other for other in cell if kind_of(other["arm"]) == "static"]
        if row["best_static"] is None and statics:
            row["best_static"] = max(statics, key=lambda other: other["tok_s_median"])["arm"]
        best = next((o for o in statics if o["arm"] == row["best_static"]), None)
        row["each_vs_plain"] = _within(row, plain)
        _fill(row, "vs_plain", row["each_vs_plain"])
        _fill(row, "vs_best_static", _within(row, best))
    return [row for row in full if not (is_plain(row) and row["group"] > 1)]


def cell_of(row: Mapping[str, Any]) -> tuple[str, float, int]:
    """Return the condition under which a row was measured."""
    return row["task"], row["temperature"], row["batch"]


def workloads(rows: Sequence[Row]) -> list[tuple[str, float, list[Row]]]:
    """Group rows by task and temperature, in order."""
    names = list(dict.fromkeys((row["task"], row["temperature"]) for row in rows))
    return [
        (task, heat, [row for row in rows if (row["task"], row["temperature"]) == (task, heat)])
        for task, heat in names
    ]


def is_plain(row: Mapping[str, Any]) -> bool:
    """Say whether a row is plain decoding."""
    return kind_of(row["arm"]) == "plain"


def label_of(arm: str) -> str:
    """Return an arm's name for people."""
    try:
        label = parse_arm(arm, "").label
    except ValueError:
        return arm
    return label.replace("+", " +")


def settings_of(arm: str) -> tuple[str, frozenset[str]]:
    """Split an arm into what it is and the settings added to that."""
    head, *settings = arm.split("+")
    return head, frozenset(settings)


def base_of(arm: str, arms: Sequence[str]) -> str | None:
    """Return the arm that differs from this one only by lacking settings, the nearest such."""
    head, settings = settings_of(arm)
    bases = [
        other
        for other in arms
        if settings_of(other)[0] == head and settings_of(other)[1] < settings
    ]
    counts = [len(settings_of(other)[1]) for other in bases]
    # Of several that are as near, none is the base: then it is one with fewer settings.
    single = [base for base, count in zip(bases, counts, strict=True) if counts.count(count) == 1]
    return max(single, key=lambda other: len(settings_of(other)[1]), default=None)


def ratio_of(row: Mapping[str, Any], name: str) -> Ratio | None:
    """Return a row's ratio of this name with its ends."""
    median = row[name]
    return None if median is None else Ratio(median, row[f"{name}_min"], row[f"{name}_max"])


def speed_ratio(row: Row, base: Row) -> Ratio | None:
    """Return the speed of a row over that of another of its cell, within each repeat.

    Across groups it is the ratio of their ratios to plain decoding, each in its own group.
    """
    name = "tok_s" if row["group"] == base["group"] else "each_vs_plain"
    ours, theirs = row[name] or [], base[name] or []
    if not ours or len(ours) != len(theirs):
        return None
    return extent(quotients(ours, theirs))


def spread(ratio: Ratio | None) -> str:
    """Return a ratio with its ends."""
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None or ratio.low == ratio.high:
        return f"{ratio.median:.2f}x"
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known and len(known) == len(values) else None


def arms_of(runs: Sequence[Run]) -> list[str]:
    """Return the names of all arms, in the order in which they come."""
    return list(dict.fromkeys(row["arm"] for run in runs for row in run.rows))


def _within(row: Row, base: Row | None) -> list[float]:
    if base is None or len(base["tok_s"]) != len(row["tok_s"]):
        return []
    return quotients(row["tok_s"], base["tok_s"])


def _fill(row: Row, name: str, within: Sequence[float]) -> None:
    if within and row[f"{name}_min"] is None:
        row |= zip((name, f"{name}_min", f"{name}_max"), extent(within), strict=True)
