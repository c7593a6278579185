"""Tables of the report: one run's rows as people read them."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.harness.arms import kind_of
from benchmarks.harness.cells import COLD
from benchmarks.harness.rows import shown
from benchmarks.report.data import (
    COMPARED,
    MEAN,
    Row,
    Run,
    base_of,
    cell_of,
    geometric_mean,
    is_plain,
    label_of,
    ratio_of,
    spread,
    workloads,
)
from benchmarks.report.page import Block, Grid, Paragraph

HEADLINE = ("batch", "arm", "tokens/s", "vs plain", "vs best static", "accept length")
COLD_HEADINGS = (
    *("batch", "arm", "tokens/s, cold", "vs plain, cold", "vs plain, warm"),
    *("vs best static, cold", "vs best static, warm", "steps"),
)
LATENCY = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
LATENCY_HEADINGS = ("TTFT p50, ms", "TTFT p99, ms", "inter-token p50, ms", "inter-token p99, ms")
TREE_HEADINGS = (
    "layers",
    "nodes drafted",
    "rows verified",
    "accept length",
    "predicted step, ms",
    "measured step, ms",
    "predicted / measured",
    "policy share",
    "plain steps",
)
FACTS = {
    "command": "command",
    "date": "date",
    "device": "device",
    "target": "target",
    "draft": "draft",
    "git_commit": "commit",
    "server_flags": "flags of every server",
    "tokens": "tokens per answer",
    "requests": "requests a run, at least",
    "repeats": "repeats",
    "cold": "starts for each cold cell",
    "warmup_tokens": "warm-up tokens per answer",
    "num_groups": "groups of servers",
    "note": "note",
}


def in_short(run: Run) -> list[str]:
    """Say in a sentence for each task and temperature how fast each CAST policy was."""
    texts = []
    for task, temperature, rows in workloads(run.rows):
        parts = []
        for arm in arms_in(rows):
            mine = rows_of(rows, arm)
            if kind_of(arm) != "cast" or base_of(arm, arms_in(rows)) is not None:
                continue
            ranges = [_range([row[name] for row in mine]) for name in COMPARED]
            if all(ranges):
                parts.append(f"**{label_of(arm)}** {ranges[0]} ({ranges[1]})")
        if parts:
            sizes = [str(size) for size, _ in by_batch(rows)]
            where = f"batch {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
            texts.append(
                f"{workload_title(task, temperature)}, {where}: speed-up over plain decoding (over "
                f"the best static tree of each batch size): {'; '.join(parts)}."
            )
    return texts


def headline(run: Run) -> list[Block]:
    """Return the table of speeds, one for each task and temperature."""
    blocks: list[Block] = []
    for title, rows in titled(run.rows):
        fastest = {batch: _fastest(mine) for batch, mine in by_batch(rows)}
        lines = [
            (str(batch), *_headline_cells(row, row["arm"] == fastest[batch]))
            for batch, mine in by_batch(rows)
            for row in mine
        ]
        if len(fastest) > 1:
            # Means over other batch sizes could not be compared.
            everywhere = [a for a in arms_in(rows) if len(rows_of(rows, a)) == len(fastest)]
            for arm in everywhere:
                plain, best = (shown(mean_of(rows, arm, name), "x") for name in COMPARED)
                lines.append((MEAN, label_of(arm), "", plain, best, ""))
        blocks += [*title, _grid(HEADLINE, lines)]
    return blocks


def cold(run: Run) -> list[Block]:
    """Return the table of fresh servers beside warm ones; nothing if the run has no cold cell."""
    blocks: list[Block] = []
    warm = {(row["arm"], cell_of(row)): row for row in run.rows}
    for title, rows in titled(run.cold):
        lines = []
        for batch, mine in by_batch(rows):
            for row in mine:
                both = row, warm.get((row["arm"], cell_of(row)))
                ratios = (
                    "-" if one is None else spread(ratio_of(one, name))
                    for name in COMPARED
                    for one in both
                )
                steps = shown(row["steps_a_run"], digits=0)
                lines.append((str(batch), _name(row), speed_of(row), *ratios, steps))
        blocks += [*title, _grid(COLD_HEADINGS, lines)]
    return blocks


def latency(run: Run) -> list[Block]:
    """Return the table of latencies; nothing if the run measured none."""
    if all(row["itl_p50_ms"] is None for row in run.rows):
        return []
    blocks: list[Block] = []
    for title, rows in titled(run.rows):
        lines = [
            (str(batch), label_of(row["arm"]), *(shown(row[name], digits=1) for name in LATENCY))
            for batch, mine in by_batch(rows)
            for row in mine
        ]
        blocks += [*title, _grid(("batch", "arm", *LATENCY_HEADINGS), lines)]
    return blocks


def trees(rows: Sequence[Row]) -> Grid:
    """Return what the trees of one task and temperature looked like."""
    lines = []
    for batch, mine in by_batch(rows):
        for row in mine:
            if row["mean_layers"] is None:
                continue
            steps_us = (row["mean_predicted_us"], row["mean_measured_us"])
            lines.append(
                (
                    str(batch),
                    label_of(row["arm"]),
                    shown(row["mean_layers"]),
                    shown(row["mean_nodes_drafted"], digits=1),
                    shown(row["mean_verify_rows"], digits=1),
                    shown(row["accept_length"]),
                    *(shown(_scaled(us, 1e-3), digits=1) for us in steps_us),
                    shown(row["predicted_to_measured"]),
                    shown(_scaled(row["policy_share"], 100.0), "%", 1),
                    shown(_scaled(row["plain_share"], 100.0), "%", 0),
                )
            )
    return _grid(("batch", "arm", *TREE_HEADINGS), lines)


def how_measured(run: Run) -> Grid:
    """Return where and how a run was measured."""
    origin = run.provenance
    lines = [
        (label, f"`{origin[name]}`" if name in ("command", "server_flags") else str(origin[name]))
        for name, label in FACTS.items()
        if origin.get(name) not in (None, "")
    ]
    versions = ", ".join(f"{name} {found}" for name, found in origin["versions"].items())
    lines.append(("versions", versions))
    lines += [(f"task `{name}`", str(note)) for name, note in origin.get("tasks", {}).items()]
    for field, when in (("profiles", ""), ("cold_profiles", ", cold")):
        for name, profile in (origin.get(field) or {}).items():
            lines.append((f"profile of `{name}`{when}", f"`{profile}`" if profile else "none"))
    for part in origin.get("resumed", ()):
        commit = f"{part['date']}, commit {part['git_commit']}"
        lines.append(("resumed", f"{commit}: `{part['command']}`"))
    for lost in origin.get("failures", ()):
        cell = f"{workload_title(lost['task'], lost['temperature'])}, batch {lost['batch']}"
        cell += ", cold" if lost.get("phase") == COLD else ""
        lines.append((f"failed: `{lost['arm']}`", f"{cell}: {lost['error']}"))
    lines.append(("finished", "yes" if run.is_complete else "no: cells or arms are missing"))
    return Grid(("what", "value"), lines, num_words=2)


def raw_numbers(rows: Sequence[Row]) -> Grid:
    """Return the rows with all their fields."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    texts = [[_raw(row[name]) for name in names] for row in rows]
    return Grid(names, texts, num_words=0)


def by_batch(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Group rows by batch size, from the smallest."""
    sizes = sorted({row["batch"] for row in rows})
    return [(size, [row for row in rows if row["batch"] == size]) for size in sizes]


def speed_of(row: Row, is_bold: bool = False) -> str:
    """Return the tokens per second of a row with the least and the greatest repeat."""
    digits = 0 if row["tok_s_median"] >= 100 else 1
    low, middle, high = (shown(row[f"tok_s_{x}"], digits=digits) for x in ("min", "median", "max"))
    return f"{f'**{middle}**' if is_bold else middle} ({low} to {high})"


def arms_in(rows: Sequence[Row]) -> list[str]:
    """Return the arms of rows, in order."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def rows_of(rows: Sequence[Row], arm: str) -> list[Row]:
    """Return the rows of an arm."""
    return [row for row in rows if row["arm"] == arm]


def mean_of(rows: Sequence[Row], arm: str, name: str) -> float | None:
    """Return the geometric mean over batch sizes of a field of an arm."""
    return geometric_mean([row[name] for row in rows_of(rows, arm)])


def workload_title(task: str, temperature: float) -> str:
    """Name a task at a temperature."""
    return f"{task}, " + ("greedy" if temperature == 0 else f"temperature {temperature:g}")


def titled(rows: Sequence[Row]) -> Iterator[tuple[list[Block], list[Row]]]:
    """Yield the rows of each task and temperature with its name, if there are several."""
    groups = workloads(rows)
    for task, temperature, rows in groups:
        name = workload_title(task, temperature)
        yield ([Paragraph(f"**{name}**")] if len(groups) > 1 else []), rows


def _grid(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Grid:
    """Return a table by batch size and arm, with a line above each batch size."""
    breaks = frozenset(i for i in range(1, len(lines)) if lines[i][0] != lines[i - 1][0])
    return Grid(headings, lines, num_words=2, breaks=breaks)


def _name(row: Row) -> str:
    is_best = row["arm"] == row["best_static"]
    return label_of(row["arm"]) + (" (best static)" if is_best else "")


def _headline_cells(row: Row, is_fastest: bool) -> tuple[str, ...]:
    return (
        _name(row),
        speed_of(row, is_fastest),
        spread(ratio_of(row, "vs_plain")),
        spread(ratio_of(row, "vs_best_static")),
        "" if is_plain(row) else shown(row["accept_length"]),
    )


def _fastest(rows: Sequence[Row]) -> str:
    def speed(row: Row) -> float:
        # Arms of different groups ran at different times.
        return float(row["vs_plain"] or 0.0) if len(groups) > 1 else float(row["tok_s_median"])

    groups = {row["group"] for row in rows}
    return str(max(rows, key=speed)["arm"])


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):.2f}x", f"{max(known):.2f}x"
    return low if low == high else f"{low} to {high}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _raw(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_raw(one) for one in value)
    return "" if value is None else str(value)
