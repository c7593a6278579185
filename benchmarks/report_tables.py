"""Tables of the report: one run's rows as people read them."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.arms import kind_of
from benchmarks.report_bounds import Bounds
from benchmarks.report_data import (
    COMPARED,
    Ratio,
    Row,
    Run,
    base_of,
    cell_of,
    geometric_mean,
    is_plain,
    label_of,
    ratio_of,
    speed_ratio,
    workloads,
)
from benchmarks.report_page import Block, Grid, Paragraph
from benchmarks.rows import shown

DEFAULT_STATIC_ARM = "static:5-4-8"
MEAN = "all"  # in place of a batch size: the geometric mean over batch sizes
HEADLINE = ("batch", "arm", "tokens/s", "vs plain", "vs best static", "accept length")
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
    "warmup_tokens": "warm-up tokens per answer",
    "num_groups": "groups of servers",
    "note": "note",
}


def headline(run: Run, is_short: bool = False) -> list[Block]:
    """Return the table of speeds, one for each task and temperature.

    Args:
        is_short: without the static arms that are neither SGLang's default nor the best of a batch
            size, and without arms that differ from another by settings only.
    """
    blocks: list[Block] = []
    for title, rows in _titled(run):
        arms = _arms(rows)
        chosen = [row for row in rows if not is_short or _is_main(row, arms)]
        blocks += title
        fastest = {batch: _fastest(mine) for batch, mine in by_batch(rows)}
        lines = [
            (str(batch), *_headline_cells(row, row["arm"] == fastest[batch]))
            for batch, mine in by_batch(chosen)
            for row in mine
        ]
        everywhere = [arm for arm in _arms(chosen) if len(_of(chosen, arm)) == len(_of(rows, arm))]
        if len(fastest) > 1:
            means = {arm: [_mean(rows, arm, name) for name in COMPARED] for arm in everywhere}
            lines += [
                (MEAN, label_of(arm), "", *(shown(mean, "x") for mean in pair), "")
                for arm, pair in means.items()
            ]
        blocks.append(_grid(HEADLINE, lines))
    return blocks


def latency(run: Run) -> list[Block]:
    """Return the table of latencies; nothing if the run measured none."""
    if all(row["itl_p50_ms"] is None for row in run.rows):
        return []
    blocks: list[Block] = []
    for title, rows in _titled(run):
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


def bounds_table(run: Run, bounds: Bounds, rows: Sequence[Row]) -> Grid:
    """Return measured speed-ups of CAST arms beside what the table allows."""
    lines = []
    for batch, mine in by_batch(rows):
        optimal = next((row for row in mine if row["arm"] == "cast:optimal"), None)
        best = None if optimal is None else bounds.of(run, optimal)
        for row in mine:
            bound = bounds.of(run, row)
            if bound is not None:
                lines.append(
                    (
                        str(batch),
                        label_of(row["arm"]),
                        spread(ratio_of(row, "vs_plain")),
                        shown(bound, "x"),
                        shown(_scaled(row["vs_plain"], 1 / bound)),
                        shown(best, "x"),
                    )
                )
    headings = ("measured vs plain", "bound by the table", "measured / bound")
    return _grid(("batch", "arm", *headings, "bound of `cast:optimal`"), lines)


def ablations(run: Run) -> list[Block]:
    """Return how arms compare to those from which they differ by settings only."""
    blocks: list[Block] = []
    headings = ("batch", "arm", "compared with", "speed", "by the table", "accept length")
    for title, rows in _titled(run):
        arms = _arms(rows)
        lines: list[tuple[str, ...]] = []
        for arm in arms:
            base = base_of(arm, arms)
            if base is None:
                continue
            names = (label_of(arm), label_of(base))
            pairs = list(_paired(rows, arm, base))
            for row, other in pairs:
                lines.append(
                    (
                        str(row["batch"]),
                        *names,
                        spread(speed_ratio(row, other)),
                        shown(_quotient(row["table_rate"], other["table_rate"]), "x"),
                        f"{shown(row['accept_length'])} to {shown(other['accept_length'])}",
                    )
                )
            if len(pairs) > 1:
                speeds = [speed_ratio(row, other) for row, other in pairs]
                rates = [_quotient(row["table_rate"], o["table_rate"]) for row, o in pairs]
                means = (geometric_mean([r and r.median for r in speeds]), geometric_mean(rates))
                lines.append((MEAN, *names, *(shown(mean, "x") for mean in means), ""))
        if lines:
            breaks = frozenset(i for i in range(1, len(lines)) if lines[i][1] != lines[i - 1][1])
            blocks += [*title, Grid(headings, lines, num_words=3, breaks=breaks)]
    return blocks


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
    for name, profile in (origin.get("profiles") or {}).items():
        lines.append((f"profile of `{name}`", f"`{profile}`" if profile else "none"))
    lines.append(("finished", "yes" if run.is_complete else "no: cut short, cells are missing"))
    return Grid(("what", "value"), lines, num_words=2)


def raw_numbers(rows: Sequence[Row]) -> Grid:
    """Return the rows with all their fields."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    texts = [[_raw(row[name]) for name in names] for row in rows]
    return Grid(names, texts, num_words=0)


def study(rows: Sequence[Row]) -> Grid:
    """Return the speeds with imperfect tables."""
    headings = ("batch", "task", "table", "speed vs right", "by the right table")
    lines = [
        (
            str(row["batch"]),
            row["task"],
            row["variant"],
            spread(ratio_of(row, "vs_right")),
            shown(row.get("vs_right_by_table"), "x"),
            shown(row["accept_length"]),
            shown(_scaled(row.get("table_error"), 100.0), "%", 0),
        )
        for row in sorted(rows, key=lambda row: (row["task"], row["batch"]))
    ]
    return Grid((*headings, "accept length", "table error"), lines, num_words=3)


def by_batch(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Group rows by batch size, from the smallest."""
    sizes = sorted({row["batch"] for row in rows})
    return [(size, [row for row in rows if row["batch"] == size]) for size in sizes]


def spread(ratio: Ratio | None) -> str:
    """Return a ratio with its ends."""
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None or ratio.low == ratio.high:
        return f"{ratio.median:.2f}x"
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def workload_title(task: str, temperature: float) -> str:
    """Name a task at a temperature."""
    return f"{task}, " + ("greedy" if temperature == 0 else f"temperature {temperature:g}")


def _titled(run: Run) -> Iterator[tuple[list[Block], list[Row]]]:
    """Yield the rows of each task and temperature with its name, if there are several."""
    groups = workloads(run.rows)
    for task, temperature, rows in groups:
        name = workload_title(task, temperature)
        yield ([Paragraph(f"**{name}**")] if len(groups) > 1 else []), rows


def _grid(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Grid:
    """Return a table by batch size and arm, with a line above each batch size."""
    breaks = frozenset(i for i in range(1, len(lines)) if lines[i][0] != lines[i - 1][0])
    return Grid(headings, lines, num_words=2, breaks=breaks)


def _headline_cells(row: Row, is_fastest: bool) -> tuple[str, ...]:
    name = label_of(row["arm"])
    if row["arm"] == row["best_static"]:
        name += " (best static)"
    digits = 0 if row["tok_s_median"] >= 100 else 1
    low, middle, high = (shown(row[f"tok_s_{x}"], digits=digits) for x in ("min", "median", "max"))
    speed = f"**{middle}**" if is_fastest else middle
    return (
        name,
        f"{speed} ({low} to {high})",
        *(spread(ratio_of(row, compared)) for compared in COMPARED),
        "" if is_plain(row) else shown(row["accept_length"]),
    )


def _fastest(rows: Sequence[Row]) -> str:
    def speed(row: Row) -> float:
        # Arms of different groups ran at different times.
        return float(row["vs_plain"] or 0.0) if len(groups) > 1 else float(row["tok_s_median"])

    groups = {row["group"] for row in rows}
    return str(max(rows, key=speed)["arm"])


def _is_main(row: Row, arms: Sequence[str]) -> bool:
    if kind_of(row["arm"]) == "static":
        return row["arm"] in (row["best_static"], DEFAULT_STATIC_ARM)
    return base_of(row["arm"], arms) is None


def _paired(rows: Sequence[Row], arm: str, base: str) -> Iterator[tuple[Row, Row]]:
    others = {cell_of(row): row for row in _of(rows, base)}
    for _, mine in by_batch(_of(rows, arm)):
        yield from ((row, others[cell_of(row)]) for row in mine if cell_of(row) in others)


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _of(rows: Sequence[Row], arm: str) -> list[Row]:
    return [row for row in rows if row["arm"] == arm]


def _mean(rows: Sequence[Row], arm: str, name: str) -> float | None:
    return geometric_mean([row[name] for row in _of(rows, arm)])


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _quotient(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _raw(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_raw(one) for one in value)
    return "" if value is None else str(value)
