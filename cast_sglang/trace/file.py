"""Write traces to files while serving, and read them back with every step checked."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from cast_sglang.errors import TraceError
from cast_sglang.trace.records import (
    TRACE_FORMAT,
    TRACE_VERSION,
    Trace,
    TracedRequest,
    TracedStep,
    TraceHeader,
    unpacked,
)
from cast_sglang.tree import first_child_of

__all__ = ["TraceWriter", "read_trace"]

MAX_LINE_BYTES = 64 << 20

logger = logging.getLogger(__name__)


def read_trace(path: str | Path) -> Trace:
    """Read a trace.

    Raises:
        TraceError: the file cannot be read, is no trace, is of another version, or is damaged
            before its last line. The message is one line with the path and the reason.
    """
    path = Path(path).expanduser()
    notes: list[str] = []
    try:
        with open(path, "rb") as file:
            header = _read_header(file)
            steps = list(_read_steps(file, header, notes))
    except OSError as error:
        raise TraceError(f"trace {path}: cannot be read: {error.strerror}") from error
    except TraceError as error:
        raise TraceError(f"trace {path}: {error}") from error
    return Trace(path, header, steps, notes)


class _Versioned(msgspec.Struct):
    format: str
    version: int


def _read_header(file: IO[bytes]) -> TraceHeader:
    line = file.readline(MAX_LINE_BYTES)
    try:
        found = msgspec.json.decode(line, type=_Versioned)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError("no trace: its first line is no header") from error
    if found.format != TRACE_FORMAT:
        raise TraceError(f"no trace: its format is {found.format[:40]!r}")
    if found.version != TRACE_VERSION:
        raise TraceError(
            f"of version {found.version}; this release reads version {TRACE_VERSION}: "
            "use the release that recorded it"
        )
    try:
        return msgspec.json.decode(line, type=TraceHeader)
    except msgspec.DecodeError as error:
        raise TraceError(f"header: {error}") from error


def _read_steps(file: IO[bytes], header: TraceHeader, notes: list[str]) -> Iterator[TracedStep]:
    decoder = msgspec.json.Decoder(TracedStep)
    number = 1
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        try:
            step = decoder.decode(line)
            _check_step(step, header.topk)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            # A server that was killed may leave half a line, which is then the last one.
            if not line.endswith(b"\n"):
                notes.append(f"line {number} was cut short and is left out")
                return
            reason = " ".join(str(error).split())
            raise TraceError(f"line {number} is damaged: {reason}") from error
        yield step


def _check_step(step: TracedStep, topk: int) -> None:
    """Raise ValueError where the arrays of a step do not fit together."""
    if not step.requests:
        raise ValueError("a step without requests")
    if step.is_plain:
        return
    num_expanded = sum(step.widths)
    num_candidates = first_child_of(1 + num_expanded, topk)
    if not 1 <= step.num_layers <= len(step.widths) + 1 or max(step.widths, default=1) > topk:
        raise ValueError("layers and widths do not fit")
    for request in step.requests:
        verified = unpacked(request.verified, "int32")
        lengths = (len(request.probs) // 4, len(request.expanded) // 4, len(verified))
        if lengths[:2] != (num_candidates, num_expanded):
            raise ValueError(f"expected {num_candidates} candidates, {num_expanded} expanded")
        if len(request.chances) not in (0, len(request.probs)):
            raise ValueError("as many chances as candidates are needed")
        num_all = num_candidates + len(request.copy_parents) // 4
        for name in ("tokens", "scores"):
            if len(getattr(request, name)) not in (0, 4 * num_all):
                raise ValueError(f"as many {name} as candidates are needed")
        if len(request.target_probs) not in (0, 4 * len(verified)):
            raise ValueError("as many target probabilities as verified nodes are needed")
        named = [*request.accepted, *request.follows, *verified.tolist()]
        named += unpacked(request.expanded, "int32").tolist()
        if named and not 0 <= min(named) <= max(named) < num_all:
            raise ValueError("a candidate that does not exist")
        _check_copies(request, num_candidates, num_all, len(step.copy_chances) // 4)


def _check_copies(
    request: TracedRequest, num_candidates: int, num_all: int, num_classes: int
) -> None:
    """Raise ValueError where what is copied does not fit to the candidates."""
    parents = unpacked(request.copy_parents, "int32")
    if not ((parents >= -1) & (parents < np.arange(num_candidates, num_all))).all():
        raise ValueError("a copied candidate before its parent")
    rows = unpacked(request.copied, "int32")
    if len(rows) % 3:
        raise ValueError("copies have three numbers each")
    nodes, children, classes = rows.reshape(-1, 3).T
    is_fit = (nodes >= -1) & (nodes < children) & (children < num_all)
    # A class is that of the draft's likeliest child; three more say the same of others.
    if not (is_fit & (classes >= 0) & (classes + 3 < num_classes)).all():
        raise ValueError("a copy that does not exist")


class TraceWriter:
    """Writes a trace of bounded size.

    It never raises, because recording must not stop the server: on an error it logs a warning and
    stops recording. Each record is written with one system call, so a server that is killed leaves
    at most half a line. An existing file is renamed to FILE.old.

    Args:
        path: the file; its directory is created.
        max_bytes: largest size of the file; recording stops at the first record that does not fit.
        header: first record of the file.
    """

    def __init__(self, path: Path, max_bytes: int, header: TraceHeader) -> None:
        self._path = path
        self._left = max_bytes
        self._encoder = msgspec.json.Encoder()
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                os.replace(path, path.with_name(f"{path.name}.old"))
            self._file = open(path, "wb", buffering=0)
        except OSError as error:
            self._stop("cannot be written", error)
        self._write(header)

    @property
    def is_open(self) -> bool:
        """Whether records are still written."""
        return self._file is not None

    def write(self, step: TracedStep) -> None:
        """Append a step, or stop recording if it no longer fits."""
        self._write(step)

    def close(self) -> None:
        """Stop recording."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: msgspec.Struct) -> None:
        if self._file is None:
            return
        line = self._encoder.encode(record) + b"\n"
        if len(line) > self._left:
            logger.info("CAST: --cast-trace %s: --cast-trace-mb is reached", self._path)
            self.close()
            return
        try:
            self._left -= self._file.write(line)
        except OSError as error:
            self._stop("cannot be written", error)

    def _stop(self, what: str, error: OSError) -> None:
        logger.warning("CAST: --cast-trace %s: %s: %s", self._path, what, error.strerror)
        self.close()
