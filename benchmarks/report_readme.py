"""The README's table of results, written from the files that it shows."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report_tables as tables
from benchmarks.report_data import ReportError, Run, latest, load_runs
from benchmarks.report_page import Block, Paragraph, markdown_of

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COMMAND = "python -m benchmarks.report"


def update_readme(readme: Path, results: Sequence[Path]) -> None:
    """Rewrite what stands between the markers.

    Raises:
        ReportError: the README has not exactly one pair of markers, or a file holds no results.
    """
    text = readme.read_text()
    before, _, after = _split(text, str(readme))
    readme.write_text(before + readme_block(readme, results) + after)


def is_marked(text: str) -> bool:
    """Say whether a README has the markers."""
    return BEGIN in text and END in text


def marked(text: str) -> str:
    """Return what stands between the markers, with them.

    Raises:
        ReportError: there is not exactly one pair.
    """
    return _split(text, "README")[1]


def results_shown(readme: Path) -> list[Path]:
    """Return the files that the README's table was written from, by the command that it names.

    Raises:
        ReportError: the table names none.
    """
    found = re.search(
        rf"<!-- {re.escape(COMMAND)} (.*) --update-readme", marked(readme.read_text())
    )
    if found is None:
        raise ReportError(f"{readme}: its table does not say how it was written")
    return [readme.parent / word for word in shlex.split(found[1])]


def readme_block(readme: Path, results: Sequence[Path]) -> str:
    """Return the markers with the table between them: the latest run of each file."""
    names = [Path(os.path.relpath(path, readme.resolve().parent)).as_posix() for path in results]
    command = f"{COMMAND} {shlex.join(names)} --update-readme {readme.name}"
    blocks: list[Block] = []
    for path, name in zip(results, names, strict=True):
        run = latest(load_runs(path))
        blocks += [Paragraph(_origin(run, name)), *tables.headline(run, is_short=True)]
    return f"{BEGIN}\n<!-- {command} -->\n\n{markdown_of(blocks)}\n{END}"


def _origin(run: Run, name: str) -> str:
    origin = run.provenance
    sglang = origin["versions"].get("sglang", "unknown")
    return (
        f"{origin['device']}, {origin['target']}, SGLang {sglang}, {origin['date'][:10]}, commit "
        f"{origin['git_commit']}; medians of {origin['repeats']} repeats with the least and the "
        f"greatest. [All numbers]({name})."
    )


def _split(text: str, name: str) -> tuple[str, str, str]:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ReportError(f"{name}: must hold the lines {BEGIN} and {END}, once and in this order")
    start, end = text.index(BEGIN), text.index(END) + len(END)
    return text[:start], text[start:end], text[end:]
