"""The records of a trace: what a server drafted, chose, verified and measured in each step.

A trace is a text file of JSON objects, one per line: a `TraceHeader`, then one `TracedStep` for
every decoding step. Arrays are stored as little-endian bytes in base64, which is short and exact.
Prompts and generated text are never stored; tokens of drafted nodes only with --cast-trace-tokens.

Drafted candidates are numbered as in `tree.py`. Behind them come those that only copying proposes;
`copying/paths.py` says which. A record lists the verified and the accepted nodes. It also lists the
candidates that the later text went through (`follows`). These show for every candidate, verified or
not, whether the target would have accepted it, so a replay can judge other trees.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from cast_sglang.costs.schema import CostTables, HostIdentity, Provenance
from cast_sglang.tree import parents_of

if TYPE_CHECKING:
    from cast_sglang.copying.graft import Grafts
    from cast_sglang.copying.paths import CopiedPaths

__all__ = [
    "TRACE_VERSION",
    "Continuation",
    "Trace",
    "TraceHeader",
    "TracedChoice",
    "TracedPass",
    "TracedRequest",
    "TracedStep",
    "candidate_parents",
    "copied_fields",
    "packed",
    "tables_digest",
    "unpacked",
]

TRACE_FORMAT = "cast-sglang trace"
TRACE_VERSION = 1
# Earlier releases used these names in traces.
RENAMED_POLICIES = {"optimal": "full-width"}


class _Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of the records. Unknown fields are ignored, since a later minor release may add some."""


class TraceHeader(_Record, frozen=True, kw_only=True, omit_defaults=False):
    """The first record: where, when and with what settings the trace was recorded."""

    format: str = TRACE_FORMAT
    version: int = TRACE_VERSION
    identity: HostIdentity
    profile: Provenance | None  # of the cost profile; None if the server had none
    tables: str  # `tables_digest` of its tables
    settings: dict[str, str | int | float | bool | list[int] | None]  # `CastConfig`, without paths
    num_steps: int  # envelope: D, layers a tree may have
    topk: int  # envelope: K
    num_draft_tokens: int  # envelope: rows verified per request, root included
    verify_sizes: list[int]
    max_batch_size: int
    max_context: int
    is_ragged: bool  # a pass may run unequal numbers of rows per request
    shares_out: bool  # the requests of a batch share one budget of verified nodes
    extends_by_outcome: bool  # draft extend runs only the rows that were accepted
    is_full: bool  # every step grew and verified the whole envelope (--cast-trace-full)
    has_tokens: bool  # requests have `tokens`
    date: str
    # Sizes with a captured graph, by captured batch size; None if passes run without graphs.
    verify_graphs: dict[int, list[int]] | None = None
    width_graphs: dict[int, list[int]] | None = None
    extend_graphs: dict[int, list[int]] | None = None
    plans_chains: bool = False  # the length of a chain was decided before its first layer ran
    max_extend_rows: int = 0  # of draft extend, per request; 0: as many as layers, and one
    # Prices and corrections that the server started from, as `AutoPolicy` and `Residuals` keep
    # them; empty where it had learned nothing before.
    learned: dict[str, Any] = {}

    @property
    def policy(self) -> str:
        """Name of the recording server's policy, in the present spelling."""
        name = str(self.settings["policy"])
        return RENAMED_POLICIES.get(name, name)


class TracedPass(_Record, frozen=True, kw_only=True):
    """The predicted and the measured time of one pass."""

    operation: str  # verify | draft | draft_extend
    batch_size: int
    num_tokens: int  # rows or nodes per request
    predicted_us: float
    measured_us: float


class TracedRequest(_Record, frozen=True, kw_only=True):
    """One request in one step; in a plain step only its number and context are set."""

    request: int  # number of the request within the trace
    context: int  # committed tokens
    probs: bytes = b""  # [M] float32, the draft's probability of each candidate given its parent
    chances: bytes = b""  # [M] float32, the same calibrated; empty where calibration is off
    expanded: bytes = b""  # [E] int32, candidates that the draft model proposed children of
    verified: bytes = b""  # [n] int32, ascending
    target_probs: bytes = b""  # [n] float32, the target's probability of each given its parent
    accepted: list[int] = []  # accepted candidates, from the root down
    follows: list[int] = []  # candidates that the text went through; begins with `accepted`
    is_open: bool = False  # the request ended inside the tree, so `follows` may be incomplete
    weight: float = 1.0  # worth of one of its tokens to the policy
    is_drawn: bool = False  # its drafts were drawn at random
    tokens: bytes = b""  # [M + E] int32
    # Of a server that copies, whose E further candidates are numbered from M on:
    copy_parents: bytes = b""  # [E] int32, candidate numbers, -1 for the root
    copied: bytes = b""  # [n, 3] int32, `copying.paths.CopiedPaths.copied`
    match: int = 0  # length of the longest end of the text that occurred before
    scores: bytes = b""  # [M + E] float32, as ranked; 0 for what was not in the tree


class TracedChoice(_Record, frozen=True, kw_only=True):
    """The decisions of a policy in one step."""

    is_plain: bool = False
    widths: list[int] = []
    num_layers: int = 0
    num_rows: list[int] = []  # rows verified of each request, root included


class TracedStep(_Record, frozen=True, kw_only=True):
    """One decoding step of a batch."""

    step: int
    context: float  # mean over the requests
    widths: list[int]  # nodes expanded per request in each layer below the root
    num_layers: int  # layers kept; 0 for a plain step
    num_draft_tokens: int  # N
    extend_rows: float  # rows per request of draft extend
    requests: list[TracedRequest]
    predicted_us: float | None = None
    measured_us: float | None = None  # None behind a prefill, or a step of the other kind
    policy_us: float = 0.0
    price: float | None = None
    expected_us: float | None = None  # by the corrected tables, with catching up after plain steps
    max_layers: int | None = None  # limit by the room in the requests; None for the envelope
    max_rows: int | None = None  # the same for rows per request
    max_nodes: int | None = None  # the same for nodes that the draft runs per request
    prompt_rows: float = 0.0  # of a prompt, that the draft may leave out; a mean
    answer_tokens: float = 1.0  # that a request may generate; a mean
    prompt_row_us: float | None = None  # what the draft takes for a row of a prompt, as measured
    num_left_out: int = 0  # requests that get no drafts only as their prompts are left out
    reuse: float = 0.0  # share of the last prompts' tokens that were found in the cache
    passes: list[TracedPass] = []  # passes whose times became known during the step
    copy_chances: bytes = b""  # [classes] float32, `Chances.table()`; empty where none were copied
    copy_depth: int = 0  # limit of copied nodes by the room in the requests

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
    """A trace that was read from a file."""

    path: Path
    header: TraceHeader
    steps: list[TracedStep]
    notes: list[str]  # warnings about the file, for people


def packed(values: np.ndarray, dtype: str) -> bytes:
    """Return the bytes that a record stores for an array; `dtype` is float32 or int32."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()


def unpacked(data: bytes, dtype: str) -> np.ndarray:
    """Return the array of `dtype` that `packed` turned into `data`."""
    return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)


def tables_digest(tables: CostTables) -> str:
    """Return a digest that is equal for two profiles only if their tables are equal."""
    names = ("target", "draft", "draft_extend", "plain", "step_overhead_us")
    encoded = msgspec.json.encode([getattr(tables, name) for name in names])
    return hashlib.sha256(encoded).hexdigest()


def candidate_parents(request: TracedRequest, topk: int) -> np.ndarray:
    """Return [M + E] int, the candidate number of each candidate's parent, -1 for the root."""
    drafted = parents_of(unpacked(request.expanded, "int32"), topk)
    return np.concatenate([drafted, unpacked(request.copy_parents, "int32")])


def copied_fields(
    copied: "tuple[Grafts, CopiedPaths] | None", request: int, num_drafted: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Return what is recorded of a request's copies, and the number of each candidate of its tree.

    Args:
        copied: into the step's trees, and what else might have been for this request; None for a
            server that copies nothing.
        request: its place in the batch.
        num_drafted: M.

    Returns:
        fields of `TracedRequest`; [M + n + 1] numbers, -1 for what the request does not have and
        for what comes behind all; [E] parents and tokens of the further candidates.
    """
    if copied is None:
        nothing = np.empty(0, np.int64)
        return {}, np.append(np.arange(num_drafted), -1), nothing, nothing
    grafts, paths = copied
    numbers = paths.numbers_of(grafts.parents[request, : grafts.counts[request]], num_drafted)
    scores = np.append(grafts.scores[request], np.zeros(len(paths.parents), np.float32))
    scores[numbers] = grafts.copied_scores[request, : len(numbers)]
    fields = {
        "copy_parents": packed(paths.parents, "int32"),
        "copied": packed(paths.copied, "int32"),
        "match": int(paths.match),
        "scores": packed(scores, "float32"),
    }
    number_of = np.concatenate([np.arange(num_drafted), numbers, [-1]])
    return fields, number_of, paths.parents, paths.tokens


class Continuation:
    """Finds the candidates of a tree that the later text goes through.

    The target chooses each token of the text on its own, whatever the tree. So a candidate would
    have been accepted if the text goes through it.

    Args:
        tokens: [M + E] int, token of each candidate.
        parents: [M + E] int, number of each candidate's parent, -1 for the root.
    """

    def __init__(self, tokens: np.ndarray, parents: np.ndarray) -> None:
        self.follows: list[int] = []
        self.is_closed = False  # the text has left the tree, or ended
        self.is_open = False  # the text ended inside the tree
        self._tokens, self._parents = tokens, parents

    def go_on(self, tokens: list[int]) -> None:
        """Follow the next tokens of the text down the tree."""
        for token in tokens:
            if self.is_closed:
                return
            is_child = self._parents == (self.follows[-1] if self.follows else -1)
            [found] = np.nonzero(is_child & (self._tokens == token))
            if len(found):
                self.follows.append(int(found[0]))
            self.is_closed = not len(found) or not (self._parents == self.follows[-1]).any()

    def end(self) -> None:
        """Record that the text ends here; candidates below are then unknown."""
        if not self.is_closed:
            self.is_open = self.is_closed = True
