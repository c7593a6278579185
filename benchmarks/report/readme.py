"""The tables of results in README.md and docs/results.md, written from the files they show."""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness.arms import kind_of
from benchmarks.harness.rows import shown
from benchmarks.harness.turns import Ratio
from benchmarks.report import tables
from benchmarks.report.data import (
    ReportError,
    Row,
    Run,
    base_of,
    is_plain,
    label_of,
    latest,
    load_runs,
    ratio_of,
    spread,
    workloads,
)
from benchmarks.report.page import Block, Grid, Paragraph, markdown_of

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COMMAND = "python -m benchmarks.report"
OPTION = "--update-docs"
README, RESULTS = Path("README.md"), Path("docs/results.md")
LEGEND = (
    "Numbers behind EAGLE-3 are its steps, topk and verified tokens, those behind CAST `fixed` C1, "
    "C2 and C3."
)
DEFAULT_STATIC_ARM = "static:5-4-8"
AUTO_ARM = "cast:auto"
HINDSIGHT = "best fixed tree in hindsight"


def update_docs(root: Path, results: Sequence[Path]) -> None:
    """Rewrite what stands between the markers of README.md and docs/results.md.

    Args:
        root: folder of README.md.

    Raises:
        ReportError: a document has not exactly one pair of markers, or a file holds no results.
            Nothing is written then.
    """
    texts = {}
    for name, block in blocks_of(root, results).items():
        before, _, after = _split((root / name).read_text(), str(root / name))
        texts[root / name] = before + block + after
    for path, text in texts.items():
        path.write_text(text)


def marked(document: Path) -> str:
    """Return what stands between the markers, with them.

    Raises:
        ReportError: there is not exactly one pair.
    """
    return _split(document.read_text(), str(document))[1]


def results_shown(document: Path, root: Path) -> list[Path]:
    """Return the files that a document's table was written from, by the command that it names.

    Raises:
        ReportError: the table names none.
    """
    found = re.search(rf"<!-- {re.escape(COMMAND)} (.*) {OPTION}", marked(document))
    if found is None:
        raise ReportError(f"{document}: its table does not say how it was written")
    return [root / word for word in shlex.split(found[1])]


def blocks_of(root: Path, results: Sequence[Path]) -> dict[Path, str]:
    """Return, for each document, the markers with what belongs between them.

    docs/results.md shows the latest run of each file, README.md four rows of the first file.
    """
    runs = [latest(load_runs(path)) for path in results]
    links = [_relative(path, (root / RESULTS).parent) for path in results]
    full: list[Block] = []
    for run, link in zip(runs, links, strict=True):
        full += [Paragraph(_origin(run, link)), *overview(run)]
    words = shlex.join(_relative(path, root) for path in results)
    command = f"<!-- {COMMAND} {words} {OPTION} . -->"
    return {
        document: f"{BEGIN}\n{command}\n\n{markdown_of(blocks)}\n{END}"
        for document, blocks in ((README, in_four_rows(runs[0])), (RESULTS, full))
    }


def in_four_rows(run: Run) -> list[Block]:
    """Return the speeds of the run's first task: plain, two fixed trees and `auto`."""
    task, temperature, rows = workloads(run.rows)[0]
    lines = {
        "plain decoding": [row for row in rows if is_plain(row)],
        "EAGLE-3, 5-4-8": tables.rows_of(rows, DEFAULT_STATIC_ARM),
        f"EAGLE-3, {HINDSIGHT}": _best_static(rows),
        "**CAST, `auto`**": tables.rows_of(rows, AUTO_ARM),
    }
    sizes = [batch for batch, _ in tables.by_batch(rows)]
    cells = {
        name: {row["batch"]: _speed_and_ratio(row) for row in mine} for name, mine in lines.items()
    }
    grid = Grid(
        ["tokens/s", *(f"batch {size}" for size in sizes)],
        [[name, *(found.get(size, "") for size in sizes)] for name, found in cells.items()],
    )
    origin = run.provenance
    how = (
        f"{origin['device']}; {tables.workload_title(task, temperature)}; medians of "
        f"{origin['repeats']} repeats, in brackets the speed-up over plain decoding; "
        f"{origin['date'][:10]}, commit {origin['git_commit']}."
    )
    return [grid, Paragraph(how)]


def overview(run: Run) -> list[Block]:
    """Return a table for each task and temperature: a column for each batch size.

    Of the static arms it has SGLang's default and the best of each batch size, of the others those
    that do not differ from another by settings only.
    """
    blocks: list[Block] = []
    for title, rows in tables.titled(run.rows):
        arms = {arm: tables.rows_of(rows, arm) for arm in _main_arms(rows)}
        if len({row["arm"] for row in rows if kind_of(row["arm"]) == "static"}) > 1:
            arms = _with_best(arms, rows)
        sizes = [batch for batch, _ in tables.by_batch(rows)]
        lines: list[list[str]] = []
        breaks = set()
        for heading, cell in CELLS.items():
            breaks.add(len(lines))
            for arm, mine in arms.items():
                found = {row["batch"]: cell(row) for row in mine}
                if any(found.values()):
                    label = arm if arm == BEST else label_of(arm)
                    lines.append([heading, label, *(found.get(size, "") for size in sizes)])
        headings = ["", "arm", *(f"batch {size}" for size in sizes)]
        blocks += [*title, Grid(headings, lines, num_words=2, breaks=frozenset(breaks - {0}))]
    return blocks


def _ratio_cell(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        # What a ratio is formed against needs no line of its own.
        is_one = ratio_of(row, name) == Ratio(1.0, 1.0, 1.0)
        return "" if row[name] is None or is_one else spread(ratio_of(row, name))

    return cell


def _length_cell(row: Row) -> str:
    return "" if is_plain(row) else shown(row["accept_length"])


BEST = "EAGLE-3, best of the grid"
CELLS: dict[str, Callable[[Row], str]] = {
    "tokens/s": tables.speed_of,
    "vs plain": _ratio_cell("vs_plain"),
    "vs best static": _ratio_cell("vs_best_static"),
    "accept length": _length_cell,
}


def _main_arms(rows: Sequence[Row]) -> list[str]:
    arms = tables.arms_in(rows)
    statics = [arm for arm in arms if kind_of(arm) == "static"]
    shown_static = DEFAULT_STATIC_ARM if DEFAULT_STATIC_ARM in statics else next(iter(statics), "")
    return [
        arm
        for arm in arms
        if arm == shown_static or (kind_of(arm) != "static" and base_of(arm, arms) is None)
    ]


def _with_best(arms: Mapping[str, list[Row]], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Add, after the static arm, the row of each batch size that is its best static arm."""
    best = _best_static(rows)
    added: dict[str, list[Row]] = {}
    for arm, mine in arms.items():
        added[arm] = mine
        if kind_of(arm) == "static":
            added[BEST] = best
    return added


def _best_static(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["arm"] == row["best_static"]]


def _speed_and_ratio(row: Row) -> str:
    speed = shown(row["tok_s_median"], digits=0 if row["tok_s_median"] >= 100 else 1)
    return speed if is_plain(row) else f"{speed} ({shown(row['vs_plain'])}x)"


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start.resolve())).as_posix()


def _origin(run: Run, name: str) -> str:
    origin = run.provenance
    sglang = origin["versions"].get("sglang", "unknown")
    tasks = "; ".join(tables.workload_title(task, heat) for task, heat, _ in workloads(run.rows))
    return (
        f"{origin['device']}, {origin['target']}, {tasks}; SGLang {sglang}, {origin['date'][:10]}, "
        f"commit {origin['git_commit']}; medians of {origin['repeats']} repeats with the least and "
        f"the greatest. {LEGEND} [All numbers and their command]({name})."
    )


def _split(text: str, name: str) -> tuple[str, str, str]:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ReportError(f"{name}: must hold the lines {BEGIN} and {END}, once and in this order")
    start, end = text.index(BEGIN), text.index(END) + len(END)
    return text[:start], text[start:end], text[end:]
