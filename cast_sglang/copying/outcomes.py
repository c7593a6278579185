"""Outcomes: which copies the text went on with, read from a verify pass."""

from __future__ import annotations

import numpy as np

from cast_sglang.copying.graft import Grafts
from cast_sglang.ops.compiled import compiled

__all__ = ["judge"]


def judge(
    grafts: Grafts,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    tokens: np.ndarray,
    accept_lens: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return which copies the text went on with.

    Args:
        top_scores_index: [B, N - 1] int64, `tree.Selection`'s.
        accept_index: [B, *] int64, b * N + row of the root and of each accepted node.
        tokens: [B, *] int64, new tokens of each request.
        accept_lens: [B] int64, their number.

    Returns:
        classes [n] int64 of the copies whose parents were accepted; followed [n] bool; and how many
        of the accepted nodes were proposed by copying alone.
    """
    most = int(accept_lens.sum())
    classes, followed = np.empty(most, np.int64), np.empty(most, np.bool_)
    first_copied = grafts.scores.shape[1]
    count, num_copied = _judge(
        *(grafts.classes, grafts.child_tokens, first_copied),
        *(top_scores_index, accept_index, tokens, accept_lens, classes, followed),
    )
    return classes[:count], followed[:count], int(num_copied)


@compiled(
    "Tuple((i8, i8))(i4[:, :], i4[:, :], i8, i8[:, :], i8[:, :], i8[:, :], i8[:], i8[:], b1[:])"
)
def _judge(
    classes: np.ndarray,
    child_tokens: np.ndarray,
    first_copied: int,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    tokens: np.ndarray,
    accept_lens: np.ndarray,
    seen: np.ndarray,
    followed: np.ndarray,
) -> tuple[int, int]:
    """Do the work of `judge`; return how many copies were judged, and accepted as copies."""
    count = num_copied = 0
    num_rows = top_scores_index.shape[1] + 1
    for request in range(len(classes)):
        for place in range(accept_lens[request]):
            row = accept_index[request, place] - request * num_rows
            number = top_scores_index[request, row - 1] if row > 0 else -1
            num_copied += number >= first_copied
            kind = classes[request, number + 1]
            if kind >= 0:
                seen[count] = kind
                followed[count] = child_tokens[request, number + 1] == tokens[request, place]
                count += 1
    return count, num_copied
