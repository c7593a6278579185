"""Limits: the largest shapes that are measured, tabulated and served, and how contexts count."""

from __future__ import annotations

import dataclasses
from typing import Self

from cast_sglang.costs.passes import PASSES, Pass
from cast_sglang.costs.schema import CostTables

__all__ = ["CONTEXT_BUCKET_TOKENS", "Limits", "exceeded"]

CONTEXT_BUCKET_TOKENS = 64
# Limits that are 0 where no draft model is run.
_OF_DRAFTS = tuple(each.limit for each in PASSES if each.model == "draft")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The largest shapes of any pass.

    Raises:
        ValueError: a limit is below 1, or below 0 where a server may lack the pass.
    """

    max_batch_size: int  # requests in a step
    max_context: int  # tokens of one request, those of the pass included
    max_verify_rows: int  # rows per request in one target pass, root included
    max_width: int  # nodes per request in one draft layer; 0 without a draft model
    max_tokens: int | None = None  # tokens of all requests together; None for no limit
    # Rows per request of draft extend; None: max_verify_rows; 0 without a draft model.
    max_extend_rows: int | None = None

    def __post_init__(self) -> None:
        for name, limit in dataclasses.asdict(self).items():
            least = 0 if name in _OF_DRAFTS else 1
            if limit is not None and limit < least:
                raise ValueError(f"{name} is {limit}: it must be at least {least}")

    def most(self, of: Pass) -> int:
        """Return the most tokens per request of a pass."""
        limit: int | None = getattr(self, of.limit)
        return self.max_verify_rows if limit is None else limit

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The kinds of passes that are run."""
        return tuple(each for each in PASSES if self.most(each) > 0)

    @property
    def longest_context(self) -> int:
        """Return the most tokens that a request holds before a pass, as they are tabulated."""
        longest = max(self.max_context - self.max_verify_rows, 1)
        if longest <= CONTEXT_BUCKET_TOKENS:
            return longest
        # Off a bucket's edge the cost model would round past the last grid point.
        return longest - longest % CONTEXT_BUCKET_TOKENS

    @classmethod
    def of_tables(cls, tables: CostTables) -> Self:
        """Return the largest shapes that the tables hold."""
        every = {each.limit: tables.table_of(each) for each in tables.passes}
        longest = max(table.contexts[-1] for table in every.values())
        return cls(
            max_batch_size=max(table.batch_sizes[-1] for table in every.values()),
            max_context=longest + tables.target.token_counts[-1],
            **dict.fromkeys(_OF_DRAFTS, 0)
            | {limit: table.token_counts[-1] for limit, table in every.items()},
        )


def exceeded(tables: CostTables, limits: Limits) -> frozenset[str]:
    """Return the axes on which the limits go beyond the tables, such as "target.batch_sizes"."""
    return frozenset(
        f"{each.table}.{axis}"
        for each in limits.passes
        for axis, limit in (
            ("batch_sizes", limits.max_batch_size),
            ("contexts", limits.longest_context),
            ("token_counts", limits.most(each)),
        )
        if limit > getattr(tables.table_of(each), axis)[-1]
    )
