"""Traces: what a server drafted, chose, verified and measured, step by step, as a file.

A trace is a text file of JSON objects, one per line: a `TraceHeader`, then one `TracedStep` for
every decoding step. Numbers that come in arrays are little-endian bytes in base64, so that they are
short and exact. No prompt and no text is stored; tokens of drafted nodes only if asked for.

Candidates are numbered as in `tree.py`. Besides what was verified and accepted, a record says which
candidates the request went on to take (`follows`): the text that follows tells the fate of every
candidate, verified or not, so that other trees can be judged by it.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from cast_sglang.costs.schema import CostTables, HostIdentity, Provenance
from cast_sglang.tree import first_child_of

__all__ = [
    "TRACE_VERSION",
    "Continuation",
    "Trace",
    "TraceHeader",
    "TracedChoice",
    "TracedPass",
    "TracedRequest",
    "TracedStep",
    "packed",
    "tables_digest",
    "unpacked",
]

TRACE_FORMAT = "cast-sglang trace"
TRACE_VERSION = 1
# Earlier releases served full-width, as optimal.
RENAMED_POLICIES = {"optimal": "full-width"}


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
    # Sizes that have a captured graph, by captured batch size; None where passes run without.
    verify_graphs: dict[int, list[int]] | None = None
    width_graphs: dict[int, list[int]] | None = None
    extend_graphs: dict[int, list[int]] | None = None

    @property
    def policy(self) -> str:
        """Return the policy that recorded, by its present name."""
        name = str(self.settings["policy"])
        return RENAMED_POLICIES.get(name, name)


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
    expected_us: float | None = None  # by the corrected tables, catching up included
    is_timed: bool = True  # its passes were timed, so that another size could be tried
    max_layers: int | None = None  # room that the requests left; None for the envelope
    max_rows: int | None = None
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
        self._first_child = {
            node: first_child_of(proposer, topk)
            for proposer, node in enumerate(expanded.tolist(), start=1)
        }

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
