"""Traces: what a server drafted, chose, verified and measured, step by step, as a file.

A trace is a text file of JSON objects, one per line: a `TraceHeader`, then one `TracedStep` for
every decoding step. Numbers that come in arrays are little-endian bytes in base64, so that they are
short and exact. No prompt and no text is stored; tokens of drafted nodes only if asked for.

Candidates are numbered as in `tree.py`. Besides what was verified and accepted, a record says which
candidates the request went on to take (`follows`): the text that follows tells the fate of every
candidate, verified or not, so that other trees can be judged by it.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np

from cast_sglang.costs.schema import CostTables, HostIdentity, Provenance
from cast_sglang.errors import TraceError

__all__ = [
    "TRACE_VERSION",
    "Continuation",
    "Trace",
    "TraceHeader",
    "TraceWriter",
    "TracedChoice",
    "TracedPass",
    "TracedRequest",
    "TracedStep",
    "packed",
    "parents_of",
    "read_trace",
    "tables_digest",
    "unpacked",
]

TRACE_FORMAT = "cast-sglang trace"
TRACE_VERSION = 1
MAX_LINE_BYTES = 64 << 20

logger = logging.getLogger(__name__)


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the records. Unknown fields are ignored: a later minor release may add some."""


class TraceHeader(_Record, frozen=True, kw_only=True, omit_defaults=False):
    """Where and how a trace was recorded."""

    format: str = TRACE_FORMAT
    version: int = TRACE_VERSION
    identity: HostIdentity
    profile: Provenance | None  # of the cost profile in use; None for none
    tables: str  # digest of its tables
    settings: dict[str, str | int | float | bool | list[int] | None]  # `CastConfig`, without paths
    num_steps: int  # envelope: D, layers a tree may have
    topk: int  # envelope: K
    num_draft_tokens: int  # envelope: rows verified per request, root included
    verify_sizes: list[int]
    max_batch_size: int
    max_context: int
    is_ragged: bool  # requests of unequal numbers of rows run as such
    shares_out: bool  # one budget of verified nodes for the batch
    extends_by_outcome: bool  # draft extend runs no more rows than were accepted
    is_full: bool  # every step grew and verified the whole envelope
    has_tokens: bool
    date: str


class TracedPass(_Record, frozen=True, kw_only=True):
    """One timed pass."""

    operation: str  # verify | draft | draft_extend
    batch_size: int
    num_tokens: int  # rows or nodes per request
    predicted_us: float
    measured_us: float


class TracedRequest(_Record, frozen=True, kw_only=True):
    """One request in one step; of a plain step only the number and the context."""

    request: int  # running number
    context: int  # committed tokens
    probs: bytes = b""  # [M] float32, the draft's probability of each candidate given its parent
    chances: bytes = b""  # [M] float32, the same calibrated; empty where calibration is off
    expanded: bytes = b""  # [E] int32, candidates that went through the draft model
    verified: bytes = b""  # [n] int32, ascending
    target_probs: bytes = b""  # [n] float32, the target's probability of each given its parent
    accepted: list[int] = []  # candidates, from the top down
    follows: list[int] = []  # candidates that the text went on with; begins with `accepted`
    is_open: bool = False  # what came after `follows` is not known: the request ended
    weight: float = 1.0  # what its tokens were worth
    tokens: bytes = b""  # [M] int32


class TracedChoice(_Record, frozen=True, kw_only=True):
    """What a policy chose."""

    is_plain: bool = False
    widths: list[int] = []
    num_layers: int = 0
    num_rows: list[int] = []  # rows verified of each request, root included


class TracedStep(_Record, frozen=True, kw_only=True):
    """One decoding step of a batch."""

    step: int
    context: float  # mean over the requests
    widths: list[int]  # nodes expanded per request in each layer below the root
    num_layers: int  # layers that stayed; 0 for a plain step
    num_draft_tokens: int  # N
    extend_rows: float  # rows per request of draft extend
    requests: list[TracedRequest]
    predicted_us: float | None = None
    measured_us: float | None = None  # None after a prefill, whose time is in between
    policy_us: float = 0.0
    price: float | None = None
    answer_tokens: float | None = None  # of the answers that had ended, in the mean
    passes: list[TracedPass] = []  # that became known during the step

    @property
    def batch_size(self) -> int:
        return len(self.requests)

    @property
    def is_plain(self) -> bool:
        return self.num_layers == 0

    @property
    def mean_rows(self) -> float:
        """Rows verified per request, root included."""
        return 1.0 + sum(len(r.verified) for r in self.requests) / 4 / len(self.requests)


class Trace(NamedTuple):
    """A trace as read from a file."""

    path: Path
    header: TraceHeader
    steps: list[TracedStep]
    notes: list[str]  # what is odd about the file, for people


def packed(values: np.ndarray, dtype: str) -> bytes:
    """Return an array as the bytes of a record; `dtype` is float32 or int32."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()


def unpacked(data: bytes, dtype: str) -> np.ndarray:
    """Return the array that `packed` made bytes of."""
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)


def parents_of(expanded: np.ndarray, topk: int) -> np.ndarray:
    """Return [M] int64, the parent of each candidate; -1 for the root.

    Args:
        expanded: [E] int, candidates in the order in which they were expanded.
    """
    return np.repeat(np.concatenate(([-1], expanded)), topk)


def tables_digest(tables: CostTables) -> str:
    """Return what tells the tables of one profile from those of another."""
    names = ("target", "draft", "draft_extend", "plain", "step_overhead_us")
    encoded = msgspec.json.encode([getattr(tables, name) for name in names])
    return hashlib.sha256(encoded).hexdigest()


class Continuation:
    """Which candidates of a tree the text goes on with, as its tokens become known.

    Each token that a target emits is its own choice, whatever the tree, so a candidate would have
    been accepted if the text goes through it.

    Args:
        tokens: [M] int, of the candidates.
        expanded: [E] int, candidates in the order in which they were expanded.
    """

    def __init__(self, tokens: np.ndarray, expanded: np.ndarray, topk: int) -> None:
        self.follows: list[int] = []
        self.is_closed = False  # the text has left the tree, or ended
        self.is_open = False  # it ended before it left the tree
        self._tokens = tokens
        self._topk = topk
        self._first_child = {int(node): topk * (1 + i) for i, node in enumerate(expanded)}

    def go_on(self, tokens: list[int]) -> None:
        """Follow the next tokens of the text."""
        for token in tokens:
            if self.is_closed:
                return
            first = self._first_child[self.follows[-1]] if self.follows else 0
            [found] = np.nonzero(self._tokens[first : first + self._topk] == token)
            if len(found):
                self.follows.append(first + int(found[0]))
            self.is_closed = not len(found) or self.follows[-1] not in self._first_child

    def end(self) -> None:
        """Take note that no more of the text will be known."""
        self.is_open = not self.is_closed
        self.is_closed = True


def read_trace(path: str | Path) -> Trace:
    """Read a trace.

    Raises:
        TraceError: the file cannot be read, is no trace, is of another version, or is damaged
            before its last line; one line with the path and the reason.
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
            # A server that was killed leaves half a line; nothing can stand behind it.
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
    num_candidates = topk * (1 + num_expanded)
    if not 1 <= step.num_layers <= len(step.widths) + 1 or max(step.widths, default=1) > topk:
        raise ValueError("layers and widths do not fit")
    for request in step.requests:
        verified = unpacked(request.verified, "int32")
        lengths = (len(request.probs) // 4, len(request.expanded) // 4, len(verified))
        if lengths[:2] != (num_candidates, num_expanded):
            raise ValueError(f"expected {num_candidates} candidates, {num_expanded} expanded")
        if len(request.chances) not in (0, len(request.probs)):
            raise ValueError("as many chances as candidates are needed")
        if len(request.tokens) not in (0, len(request.probs)):
            raise ValueError("as many tokens as candidates are needed")
        if len(request.target_probs) not in (0, 4 * len(verified)):
            raise ValueError("as many target probabilities as verified nodes are needed")
        named = [*request.accepted, *request.follows, *verified.tolist()]
        named += unpacked(request.expanded, "int32").tolist()
        if named and not 0 <= min(named) <= max(named) < num_candidates:
            raise ValueError("a candidate that does not exist")


class TraceWriter:
    """Writes a trace of bounded size, and never raises: a server that records goes on serving.

    Each record goes to the operating system in one piece, so a server that is killed leaves at most
    half a line. A file that exists is kept as FILE.old.

    Args:
        path: the file; its directory is made.
        max_bytes: bound of the file. What does not fit is not recorded.
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
        """Append a step, or stop recording where it no longer fits."""
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
