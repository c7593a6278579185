"""Limits: the largest shapes that are measured, tabulated and served, and how contexts count."""

from __future__ import annotations

import dataclasses
from typing import Self

from cast_sglang.costs.schema import CostTables

__all__ = ["CONTEXT_BUCKET_TOKENS", "Limits", "exceeded", "longest_context"]

CONTEXT_BUCKET_TOKENS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The largest shapes of any pass.

    Raises:
        ValueError: a limit is below 1.
    """

    max_batch_size: int  # requests in a step
    max_context: int  # tokens of one request, those of the pass included
    max_verify_rows: int  # rows per request in one target pass, root included
    max_width: int  # nodes per request in one draft layer
    max_tokens: int | None = None  # tokens of all requests together; None for no limit
    max_extend_rows: int | None = None  # rows per request of draft extend; None: max_verify_rows

    def __post_init__(self) -> None:
        for name, limit in dataclasses.asdict(self).items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}: every limit must be at least 1")

    @property
    def extend_rows(self) -> int:
        """Return the most rows per request of draft extend."""
        return self.max_verify_rows if self.max_extend_rows is None else self.max_extend_rows

    @property
    def longest_context(self) -> int:
        """Return the most tokens that a request holds before a pass."""
        return longest_context(self.max_context, self.max_verify_rows)

    @classmethod
    def of_tables(cls, tables: CostTables) -> Self:
        """Return the largest shapes that the tables hold."""
        every = (tables.target, tables.draft, tables.draft_extend)
        max_verify_rows = tables.target.token_counts[-1]
        return cls(
            max_batch_size=max(table.batch_sizes[-1] for table in every),
            max_context=max(table.contexts[-1] for table in every) + max_verify_rows,
            max_verify_rows=max_verify_rows,
            max_width=tables.draft.token_counts[-1],
            max_extend_rows=tables.draft_extend.token_counts[-1],
        )


def longest_context(max_context: int, max_verify_rows: int) -> int:
    """Return the longest context before a pass that a profile measures."""
    longest = max(max_context - max_verify_rows, 1)
    # Off a bucket's edge the cost model would round past the last grid point.
    return longest - longest % CONTEXT_BUCKET_TOKENS if longest > CONTEXT_BUCKET_TOKENS else longest


def exceeded(tables: CostTables, limits: Limits) -> frozenset[str]:
    """Return the axes on which the limits go beyond the tables, such as "target.batch_sizes"."""
    counts = {
        "target": limits.max_verify_rows,
        "draft": limits.max_width,
        "draft_extend": limits.extend_rows,
    }
    return frozenset(
        f"{name}.{axis}"
        for name, num_counts in counts.items()
        for axis, limit in (
            ("batch_sizes", limits.max_batch_size),
            ("contexts", limits.longest_context),
            ("token_counts", num_counts),
        )
        if limit > getattr(getattr(tables, name), axis)[-1]
    )
