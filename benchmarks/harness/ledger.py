"""Results of a benchmark on disk: every run of a directory, the latest one first in sight."""

import csv
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ORIGIN_FIELDS = ("date", "device", "target", "draft", "git_commit")
# What may differ between the parts of a run that was resumed; the run says so.
RESUMED_FIELDS = ("date", "command", "git_commit")


class Ledger:
    """`results.json` and `results.csv` of a directory; runs are added to them and none is lost.

    `results.json` is the latest run, {"provenance", "complete", "rows", "summary"}, and under
    "runs" all of them, the latest last. `results.csv` has a line for each row, with its provenance.

    Args:
        directory: made if need be.
        provenance: of the run to add.
        summarise: from the run's rows to its summary.

    Raises:
        ValueError: what lies there was not written by a ledger of these columns.
    """

    def __init__(
        self,
        directory: Path,
        provenance: Mapping[str, Any],
        summarise: Callable[[Sequence[Row]], list[Row]],
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.csv_path = directory / "results.json", directory / "results.csv"
        self._summarise = summarise
        self._earlier = _read_runs(self.path)
        self._origin = _flat_origin(provenance)
        self._run: dict[str, Any] = {"provenance": dict(provenance), "complete": False}
        self._cells: dict[Hashable, tuple[list[Row], bool]] = {}
        self._columns: list[str] | None = None
        if self.csv_path.exists():
            with open(self.csv_path, newline="") as file:
                self._columns = next(csv.reader(file), None)

    def resume(self, cell_of: Callable[[Row], Hashable]) -> None:
        """Go on with the last run of the directory, if there is one; its rows stay.

        Its provenance lists under "resumed" when, by which command and at which commit.

        Args:
            cell_of: from a row to the cell under which `put` would set it.

        Raises:
            ValueError: that run was made otherwise, and in what.
        """
        if not self._earlier:
            return
        last, ours = self._earlier[-1]["provenance"], self._run["provenance"]
        fields = [name for name in ours if name not in RESUMED_FIELDS]
        if differing := [name for name in fields if last.get(name) != ours[name]]:
            raise ValueError(
                f"--resume: the last run in {self.path} differs in {', '.join(differing)}; leave "
                "--resume out to start another run beside it"
            )
        self._run = self._earlier.pop()
        for row in self._run["rows"]:
            rows, _ = self._cells.setdefault(cell_of(row), ([], False))
            rows.append(row)
        self._run["complete"] = False
        part = {name: ours[name] for name in RESUMED_FIELDS}
        self.describe(resumed=[*last.get("resumed", []), part])
        self._origin = _flat_origin(last)
        self._forget_lines()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The provenance of this run."""
        return self._run["provenance"]

    @property
    def rows(self) -> list[Row]:
        """The rows of this run so far."""
        return [row for rows, _ in self._cells.values() for row in rows]

    def describe(self, **facts: Any) -> None:
        """Add to the provenance what became known since."""
        self._run["provenance"] |= facts

    def check_columns(self, fields: Sequence[str]) -> None:
        """Refuse, before anything is measured, a CSV file of other columns.

        Raises:
            ValueError: names the file.
        """
        expected = [*self._origin, *fields]
        if self._columns is not None and self._columns != expected:
            raise ValueError(
                f"{self.csv_path} has other columns than this version writes; use another directory"
            )

    def put(self, cell: Hashable, rows: Sequence[Row], is_final: bool = True) -> None:
        """Set the rows of a cell, on disk at once.

        Args:
            is_final: no more of the cell will come, so that its lines can be appended.
        """
        self._cells[cell] = (list(rows), is_final)
        self._write_json()
        if is_final:
            self._append_lines(rows)

    def close(self, is_complete: bool) -> None:
        """End the run; what it has of unfinished cells is appended too."""
        if not self._cells:
            return
        self._run["complete"] = is_complete
        self._write_json()
        for rows, is_final in self._cells.values():
            if not is_final:
                self._append_lines(rows)

    def _append_lines(self, rows: Sequence[Row]) -> None:
        lines = [{**self._origin, **{name: _cell(row[name]) for name in row}} for row in rows]
        is_new = not self.csv_path.exists()
        with open(self.csv_path, "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(lines)

    def _forget_lines(self) -> None:
        """Take the lines of this run out of the CSV file; `close` appends those of its cells."""
        if not self.csv_path.exists():
            return
        with open(self.csv_path, newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            ours = self._origin["date"], self._origin["command"]
            kept = [line for line in reader if (line["date"], line["command"]) != ours]
        partial = self.csv_path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, self.csv_path)

    def _write_json(self) -> None:
        rows = self.rows
        run = {**self._run, "rows": rows, "summary": self._summarise(rows)}
        partial = self.path.with_suffix(".partial")
        content = {**run, "runs": [*self._earlier, run]}
        partial.write_text(json.dumps(content, indent=1) + "\n")
        # A run that is killed while it writes leaves the old file.
        os.replace(partial, self.path)


def _read_runs(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        # Before runs were added, a file held one.
        return list(content.get("runs") or [{**content, "complete": True, "summary": []}])
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results: {error}; use another directory") from error


def _flat_origin(provenance: Mapping[str, Any]) -> Row:
    versions = {f"{name}_version": found for name, found in provenance["versions"].items()}
    origin = {name: provenance[name] for name in ORIGIN_FIELDS}
    return {**origin, **versions, "command": provenance["command"]}


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value
