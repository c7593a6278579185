"""Schema of a cost profile: the records of its JSON file, and the checks beyond their types.

`profiles/README.md` documents every field with its unit.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from cast_sglang.costs.passes import PASSES, Pass
from cast_sglang.errors import ProfileError

__all__ = [
    "NO_DRAFT",
    "SCHEMA_VERSION",
    "CostProfile",
    "CostTable",
    "CostTables",
    "Heldout",
    "HostIdentity",
    "ModelIdentity",
    "Provenance",
    "ServingRecord",
    "validate_profile",
]

SCHEMA_VERSION = 1
MAX_TIME_US = 1e9
MAX_AXIS_VALUE = 1 << 30
MAX_SAMPLES = 1 << 30


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the records: they are immutable, and an unknown field is an error."""


class CostTable(_Record, frozen=True, kw_only=True):
    """Time of one forward pass over a grid of B batch sizes, C contexts and N token counts.

    Axes are strictly increasing positive integers; the arrays are nested lists [B][C][N].
    """

    batch_sizes: list[int]
    contexts: list[int]
    token_counts: list[int]
    time_us: list[list[list[float]]]
    spread_us: list[list[list[float]]]
    samples: list[list[list[int]]]

    @property
    def is_extrapolated(self) -> list[list[bool]]:
        """[B][C]: whether nothing was measured at a batch size and context, so a model gives times.

        Elsewhere, entries without samples are interpolated between measured token counts.
        """
        return [[not any(row) for row in plane] for plane in self.samples]


class ModelIdentity(_Record, frozen=True, kw_only=True):
    """A target or draft model; `name` is a hub id or the name of a local directory."""

    name: str
    config_hash: str
    architectures: list[str]
    num_parameters: int | None = None


# In the place of the draft where a server runs none.
NO_DRAFT = ModelIdentity(
    name="no draft",
    config_hash=hashlib.sha256(b"no draft").hexdigest(),
    architectures=["none"],
)


class HostIdentity(_Record, frozen=True, kw_only=True):
    """The device, the model pair and the settings that decide how long a forward pass takes."""

    device_name: str
    device_memory_bytes: int
    driver: str
    runtime: str
    target: ModelIdentity
    draft: ModelIdentity
    dtype: str
    tp_size: int
    attention_backend: str
    cuda_graph: bool
    page_size: int
    versions: dict[str, str]
    device_count: int | None = None
    clock_mhz: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None  # as SGLang's flag says it
    overlap: bool | None = None


class Heldout(_Record, frozen=True, kw_only=True):
    """Relative error of the interpolated tables at points measured for this purpose alone."""

    points: int
    median_error: float
    p95_error: float


class Provenance(HostIdentity, frozen=True, kw_only=True):
    """The host that was measured, and how and when it was measured."""

    date: str
    command: str
    seconds: float
    sampling: dict[str, str | int | float | bool] = {}
    estimated: bool = False
    heldout: Heldout | None = None


class ServingRecord(_Record, frozen=True, kw_only=True):
    """What a short real run of the pair showed right after the tables were measured.

    The errors are those of whole steps, predicted by the tables as they are, against measured.
    """

    steps: int
    median_ratio: float  # measured over predicted
    median_error: float
    p95_error: float
    learned: dict[str, Any] = {}  # what a server starts from, see `serving/learned.py`


class CostTables(_Record, frozen=True, kw_only=True):
    """The tables S_T and S_D, and the other costs of a step.

    Without a draft model there are none of its passes.
    """

    target: CostTable
    draft: CostTable | None = None
    draft_extend: CostTable | None = None
    plain: CostTable | None = None  # in profiles of earlier releases; not used any more
    step_overhead_us: list[float] | None = None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The kinds of passes that there is a table of."""
        return tuple(each for each in PASSES if getattr(self, each.table) is not None)

    def table_of(self, kind: Pass) -> CostTable:
        """Return the table of a kind of pass."""
        table: CostTable = getattr(self, kind.table)
        return table


class CostProfile(CostTables, frozen=True, kw_only=True):
    """The tables of one host and pair, with their provenance."""

    provenance: Provenance
    schema_version: int = SCHEMA_VERSION
    serving: ServingRecord | None = None

    @property
    def quotable_contexts(self) -> list[int]:
        """The target's contexts up to the longest that was measured at every batch size.

        Beyond it entries are extrapolated, so no summary quotes them. All contexts of an estimate.
        """
        ends = []
        for each in self.passes:
            table = self.table_of(each)
            columns = zip(table.contexts, *table.is_extrapolated, strict=True)
            ends.append(max((c for c, *missing in columns if not any(missing)), default=0))
        contexts = self.target.contexts
        return [context for context in contexts if context <= min(ends)] or contexts


def validate_profile(profile: CostProfile) -> None:
    """Check what types cannot express: axes, shapes, ranges and agreement between tables.

    Raises:
        ProfileError: a check failed; the message names the field and the fault.
    """
    tables = {each.table: profile.table_of(each) for each in profile.passes}
    lacking = [each.table for each in PASSES if each.table not in tables]
    if lacking and (len(tables) > 1 or profile.provenance.draft != NO_DRAFT):
        raise ProfileError(f"{lacking[0]} is missing; only a server without a draft has no such")
    if profile.plain is not None:
        tables["plain"] = profile.plain
    for name, table in tables.items():
        _validate_table(name, table, profile.provenance.estimated)
    if profile.target.token_counts[0] != 1:
        raise ProfileError("target.token_counts must start at 1, the unit of all costs")
    overhead = profile.step_overhead_us
    if overhead is not None:
        if len(overhead) != len(profile.target.batch_sizes):
            raise ProfileError("step_overhead_us must have one value per target.batch_sizes")
        _require_range("step_overhead_us", overhead, 0.0, MAX_TIME_US)
    if (serving := profile.serving) is not None:
        _require_range("serving.steps", [serving.steps], 1, MAX_SAMPLES)
        _require_range("serving.median_ratio", [serving.median_ratio], math.ulp(0.0), MAX_TIME_US)
        errors = [serving.median_error, serving.p95_error]
        _require_range("serving", errors, 0.0, MAX_TIME_US)
    _validate_provenance(profile.provenance)


def _validate_table(name: str, table: CostTable, estimated: bool) -> None:
    shape: list[int] = []
    for axis in ("batch_sizes", "contexts", "token_counts"):
        values = getattr(table, axis)
        if not values:
            raise ProfileError(f"{name}.{axis} is empty")
        _require_range(f"{name}.{axis}", values, 1, MAX_AXIS_VALUE)
        if any(low >= high for low, high in pairwise(values)):
            raise ProfileError(f"{name}.{axis} must be strictly increasing")
        shape.append(len(values))
    tiniest = math.ulp(0.0)
    limits = {"time_us": (tiniest, MAX_TIME_US), "spread_us": (0.0, MAX_TIME_US)}
    for field, (low, high) in {**limits, "samples": (0, MAX_SAMPLES)}.items():
        cube = getattr(table, field)
        square = len(cube) == shape[0] and all(len(plane) == shape[1] for plane in cube)
        if not square or any(len(row) != shape[2] for plane in cube for row in plane):
            raise ProfileError(f"{name}.{field} must have the shape of its axes, {shape}")
        for plane in cube:
            for row in plane:
                _require_range(f"{name}.{field}", row, low, high)
    # A point that exceeds the device's memory has no samples, and its time is extrapolated.
    if not estimated and table.samples[0][0][0] == 0:
        raise ProfileError(f"{name}.samples: the first point was never measured")


def _validate_provenance(provenance: Provenance) -> None:
    for role in ("target", "draft"):
        if not re.fullmatch(r"[0-9a-f]{64}", getattr(provenance, role).config_hash):
            raise ProfileError(f"provenance.{role}.config_hash must be 64 hexadecimal digits")
    for field in ("device_memory_bytes", "tp_size", "page_size"):
        _require_range(f"provenance.{field}", [getattr(provenance, field)], 1, 1 << 60)
    _require_range("provenance.seconds", [provenance.seconds], 0.0, MAX_TIME_US)
    if provenance.heldout is not None:
        errors = [provenance.heldout.median_error, provenance.heldout.p95_error]
        _require_range("provenance.heldout", errors, 0.0, MAX_TIME_US)


def _require_range(name: str, values: Sequence[float], low: float, high: float) -> None:
    for value in values:
        # Written so that a NaN fails too.
        if not low <= value <= high:
            bound = "positive" if low == math.ulp(0.0) else f"at least {low:g}"
            raise ProfileError(f"{name} holds {value!r}: must be {bound} and at most {high:g}")
