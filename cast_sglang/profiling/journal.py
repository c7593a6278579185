"""Journal of a running profile: it writes each measurement at once, so that a killed run resumes.

The first line holds the settings of the run, each further line one visit to one point. The journal
drops a last line that a kill cut short. Anything else unexpected is an error, because a table mixed
from two settings would look like a good one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from cast_sglang.errors import ProfileError

__all__ = ["STEP_OVERHEAD", "Journal", "Point", "Visit", "journal_path"]


# What a step spends outside of its passes, measured like a pass of one token.
STEP_OVERHEAD = "step_overhead"


class Point(NamedTuple):
    """One forward pass that can be measured."""

    operation: str  # the name of a pass, or STEP_OVERHEAD
    batch_size: int
    context: int
    num_tokens: int  # rows or nodes per request


class Visit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A few consecutive timings of one point."""

    point: Point
    times_us: list[float]
    before_us: list[float]  # of the reference passes just before the visit
    after_us: list[float]  # of those just after it
    seconds: float  # wall time of the visit, warm-up and references included


def journal_path(output: str | Path) -> Path:
    """Return the path of the journal, which lies beside the profile that it leads to."""
    output = Path(output).expanduser()
    return output.with_name(f"{output.name}.partial.jsonl")


class Journal:
    """Append-only file of visits; a context manager, open for appending inside `with`.

    Args:
        path: the file; entering the context creates it if it is missing.
        settings: what JSON can hold; a journal begun with other settings is refused.

    Raises:
        ProfileError: the file is damaged, belongs to other settings, or cannot be opened.

    Attributes:
        visits: of earlier runs, in order.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise self._failed(error) from error
        self._complete_bytes = data.rfind(b"\n") + 1
        self.visits = list(self._parse(data[: self._complete_bytes].splitlines()))

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")
            self._file.truncate(self._complete_bytes)
        except OSError as error:
            raise self._failed(error) from error
        if self._complete_bytes == 0:
            self._write(json.dumps(self._settings).encode())
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, visit: Visit) -> None:
        """Write one visit, which from then on survives a kill of this process."""
        self._write(msgspec.json.encode(visit))

    def _write(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._file.flush()

    def _failed(self, error: OSError) -> ProfileError:
        return ProfileError(f"journal {self.path}: cannot be opened: {error.strerror}")

    def _parse(self, lines: list[bytes]) -> Iterator[Visit]:
        if not lines:
            return
        number = 1
        try:
            found = json.loads(lines[0])
            if found != self._settings:
                raise ProfileError(
                    f"journal {self.path}: begun with other settings "
                    f"({_changes(found, self._settings)}); delete it or choose another --output"
                )
            for line in lines[1:]:
                number += 1
                yield msgspec.json.decode(line, type=Visit)
        except (msgspec.MsgspecError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ProfileError(
                f"journal {self.path}: line {number} is damaged; delete the file to start again"
            ) from error


def _changes(found: Any, expected: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "no settings in its first line"
    changed = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
    return ", ".join(changed)
