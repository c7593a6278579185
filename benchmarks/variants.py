"""Cost profiles made wrong on purpose, and how wrong they are.

Each kind of damage is a pure function from one valid profile to another. The provenance stays, so
that a server takes the result for a profile of its own device and pair.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cast_sglang.cost import CONTEXT_BUCKET_TOKENS, CostModel
from cast_sglang.profile_schema import CostProfile, CostTable

RIGHT = "right"
RESIDUALS = "+residuals"
DEFAULT_VARIANTS = (
    "error-5",
    "error-10",
    "error-20",
    "error-50",
    "same",
    "one-context",
    "ends-only",
    "nearest",
    "wrong-rows",
    f"wrong-rows{RESIDUALS}",
    f"{RIGHT}{RESIDUALS}",
)
# What decides on the trees; `plain` and the overhead only enter predictions.
PASSES = ("target", "draft", "draft_extend")
TABLES = (*PASSES, "plain")
AXES = ("batch_sizes", "contexts", "token_counts")
CELLS = ("time_us", "spread_us", "samples")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One cost table to serve, as a change of the right one, and how the server reads it."""

    name: str
    change: Callable[[CostProfile], CostProfile] | None = None  # None: the right table itself
    lookup: str = "linear"
    residuals: bool = False
    nominal_error: float | None = None  # typical relative error of an entry, where that was chosen

    @property
    def table(self) -> str:
        """The name of its table, which it may share with a variant that corrects it online."""
        return self.name.removesuffix(RESIDUALS)

    @property
    def env(self) -> dict[str, str]:
        """The settings of its server."""
        return {
            "CAST_LOOKUP": self.lookup,
            "CAST_RESIDUALS": "on" if self.residuals else "off",
        }


def parse_variant(text: str, wrong_rows: tuple[int, int] = (5, 16)) -> Variant:
    """Read a variant.

    Args:
        text: `error-X` or `error-X@SEED` (X in percent), `one-context`, `ends-only`, `wrong-rows`,
            `nearest`, `same` (the right table once more: the noise of the study) or `right`;
            each with `+residuals` for the online correction.
        wrong_rows: first and last token count that `wrong-rows` makes wrong.

    Raises:
        ValueError: the text is none of these.
    """
    name = text.removesuffix(RESIDUALS)
    variant = functools.partial(Variant, text, residuals=name != text)
    if found := re.fullmatch(r"error-(\d+(?:\.\d+)?)(?:@(\d+))?", name):
        error, seed = float(found[1]) / 100, int(found[2] or 0)
        change = functools.partial(with_errors, error=error, seed=seed)
        return variant(change=change, nominal_error=error)
    if name == "wrong-rows":
        return variant(change=functools.partial(with_wrong_rows, first_and_last=wrong_rows))
    if name == "same":
        return variant(nominal_error=0.0)
    if name == "nearest":
        return variant(lookup="nearest")
    if name in (changes := {"one-context": one_context, "ends-only": ends_only}):
        return variant(change=changes[name])
    if text == f"{RIGHT}{RESIDUALS}":
        return variant()
    raise ValueError(
        f"{text!r} is no variant; use error-X[@SEED], one-context, ends-only, wrong-rows, nearest "
        f"or same, each also with {RESIDUALS}, or {RIGHT}{RESIDUALS}"
    )


def with_errors(profile: CostProfile, error: float, seed: int = 0) -> CostProfile:
    """Multiply every time of the passes by a random factor of its own.

    The factors are log-normal with median 1; the standard deviation of their logarithm is
    log(1 + error). One seed gives the same draws at every `error`, only farther from 1.
    """
    random = np.random.default_rng(seed)

    def erroneous(table: CostTable) -> CostTable:
        time_us = np.asarray(table.time_us)
        factors = np.exp(math.log1p(error) * random.standard_normal(time_us.shape))
        spread_us = np.asarray(table.spread_us) * factors
        return msgspec.structs.replace(
            table, time_us=(time_us * factors).tolist(), spread_us=spread_us.tolist()
        )

    passes = {name: erroneous(getattr(profile, name)) for name in PASSES}
    return msgspec.structs.replace(profile, **passes)


def with_wrong_rows(profile: CostProfile, first_and_last: tuple[int, int]) -> CostProfile:
    """Double the target's times at the token counts from the first to the last.

    Raises:
        ValueError: the table has no such token count, or none but such.
    """
    first, last = first_and_last
    counts = np.asarray(profile.target.token_counts)
    wrong = (first <= counts) & (counts <= last)
    if not wrong.any() or wrong.all():
        raise ValueError(f"rows {first}-{last} must be some, not all, of {counts.tolist()}")
    time_us = np.asarray(profile.target.time_us) * np.where(wrong, 2.0, 1.0)
    target = msgspec.structs.replace(profile.target, time_us=time_us.tolist())
    return msgspec.structs.replace(profile, target=target)


def one_context(profile: CostProfile) -> CostProfile:
    """Keep the shortest context of each table only."""
    return _thinned(profile, ["contexts"], lambda axis: axis[:1])


def ends_only(profile: CostProfile) -> CostProfile:
    """Keep the first and the last batch size, context and token count of each table only."""
    return _thinned(profile, AXES, lambda axis: sorted({axis[0], axis[-1]}))


def table_error(
    profile: CostProfile,
    right: CostProfile,
    *,
    batch: int,
    contexts: tuple[int, int],
    lookup: str = "linear",
) -> float:
    """Return the typical relative error of a profile's costs where they were used.

    Definition: exp(sqrt(mean of log(ours / right)^2)) - 1, over the passes, the token counts of
    the right tables, and the contexts from the first to the last in steps of the cost model. The
    online correction is not part of it. Beyond the measured contexts both go on with their slope.
    """
    ours, theirs = (
        _times(tables, right, batch, contexts, how)
        for tables, how in ((profile, lookup), (right, "linear"))
    )
    logs = np.log(ours) - np.log(theirs)
    return float(np.expm1(np.sqrt(np.mean(np.square(logs)))))


def tabulated_rate(right: CostProfile, row: Mapping[str, Any], topk: int = 8) -> float | None:
    """Return the tokens per microsecond and request of a row's mean tree, by the right tables.

    What the chosen trees are worth, without the noise of a measured speed: tokens of a step over
    the time of its passes at the mean width, rows and accepted length. None where nothing was
    counted.
    """
    layers, nodes, rows = (
        row.get(name) for name in ("mean_layers", "mean_nodes_drafted", "mean_verify_rows")
    )
    accepted = row["accept_length"]
    if layers is None or nodes is None or rows is None or accepted is None:
        return None
    times_us = _times(right, right, row["batch"], tuple(row["contexts"]), "linear").mean(axis=0)
    ends = (right.target.token_counts[-1], right.draft.token_counts[-1])
    verify, draft, extend = np.split(times_us, np.cumsum(ends))
    num_grown = layers - 1
    width = (nodes / topk - 1) / num_grown if num_grown > 0 else 1.0

    def at(curve: np.ndarray, count: float) -> float:
        return float(np.interp(count, np.arange(1, len(curve) + 1), curve))

    time_us = at(verify, rows) + num_grown * at(draft, width) + at(extend, accepted)
    return float(accepted / time_us)


def groups(variants: Sequence[Any], at_once: int) -> list[list[Any]]:
    """Split the variants so that each group and the right table are at most `at_once` servers.

    Raises:
        ValueError: there is no room for a variant beside the right table.
    """
    if at_once < 2:
        raise ValueError("--at-once: a variant and the right table are 2 servers")
    size = at_once - 1
    return [list(variants[start : start + size]) for start in range(0, len(variants), size)]


def _thinned(
    profile: CostProfile, axes: Sequence[str], pick: Callable[[list[int]], list[int]]
) -> CostProfile:
    """Keep the picked values of some axes in every table, and what belongs to them."""

    def kept(table: CostTable, axis: str) -> list[int]:
        values = getattr(table, axis)
        return [values.index(value) for value in (pick(values) if axis in axes else values)]

    changes: dict[str, Any] = {}
    for name in TABLES:
        table = getattr(profile, name)
        if table is not None:
            indexes = {axis: kept(table, axis) for axis in AXES}
            grid = np.ix_(*indexes.values())
            parts = {cell: np.asarray(getattr(table, cell))[grid].tolist() for cell in CELLS}
            for axis in AXES:
                parts[axis] = [getattr(table, axis)[index] for index in indexes[axis]]
            changes[name] = CostTable(**parts)
    if profile.step_overhead_us is not None:
        changes["step_overhead_us"] = [
            profile.step_overhead_us[index] for index in kept(profile.target, "batch_sizes")
        ]
    return msgspec.structs.replace(profile, **changes)


def _times(
    profile: CostProfile, right: CostProfile, batch: int, contexts: tuple[int, int], lookup: str
) -> np.ndarray:
    """Return the microseconds of all passes, [contexts, rows + nodes + rows]."""
    model = CostModel(
        profile,
        max_batch_size=batch,
        max_context=1,  # not a limit of what may be asked, only of what is warned of
        max_verify_tokens=right.target.token_counts[-1],
        max_width=right.draft.token_counts[-1],
        max_extend_rows=right.draft_extend.token_counts[-1],
        lookup=lookup,
    )
    first, last = (math.ceil(context / CONTEXT_BUCKET_TOKENS) for context in contexts)
    rows = []
    for bucket in range(first, last + 1):
        costs = model.step_costs(batch, bucket * CONTEXT_BUCKET_TOKENS)
        units = np.concatenate([costs.verify, costs.draft, costs.draft_extend])
        rows.append(units.astype(np.float64) * costs.unit_us)
    return np.stack(rows)
