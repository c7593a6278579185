"""The largest shapes that are measured and run, and how contexts are counted."""

from typing import NamedTuple

__all__ = ["CONTEXT_BUCKET_TOKENS", "Limits", "longest_context"]

CONTEXT_BUCKET_TOKENS = 64


class Limits(NamedTuple):
    """The largest shapes a meter can run."""

    max_batch_size: int
    max_context: int  # tokens of one request, those of the pass included
    max_verify_rows: int  # rows per request in one target pass, root included
    max_width: int  # nodes per request in one draft layer
    max_tokens: int | None = None  # tokens of all requests together; None for no limit
    max_extend_rows: int | None = None  # rows per request of draft extend; None: max_verify_rows


def longest_context(max_context: int, max_verify_rows: int) -> int:
    """Return the longest context before a pass that a profile measures."""
    longest = max(max_context - max_verify_rows, 1)
    # Off a bucket's edge the cost model would round past the last grid point.
    return longest - longest % CONTEXT_BUCKET_TOKENS if longest > CONTEXT_BUCKET_TOKENS else longest
