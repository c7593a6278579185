"""Read from a verify pass which nodes the target judged, and which of them it accepted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import LEAST_LEFT

__all__ = ["VerifiedNodes", "verify_outcomes"]


class VerifiedNodes(NamedTuple):
    """The nodes of one verify pass, without the root; [B, N - 1] each."""

    shares: np.ndarray  # float64, the argument x of g; see `policy.acceptance`
    depths: np.ndarray  # int64, 1 for the root's children
    is_tried: np.ndarray  # bool: the parent was accepted, and no earlier sibling was
    accepted: np.ndarray  # bool


def verify_outcomes(
    parent_rows: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    probs: np.ndarray,
    topk: int,
) -> VerifiedNodes:
    """Return which nodes the target judged, and which of them it accepted.

    The root is row 0 of the pass; the node at index i of `top_scores_index` is row 1 + i.

    Args:
        parent_rows, top_scores_index: [B, N - 1] int64, `tree.Selection`'s.
        accept_index: [B, *] int, b * N + row of the root and of each accepted node, -1 for none;
            as SGLang's verify returns it.
        probs: [B, M] float32, the draft's probability of each candidate given its parent; nan for
            one that calibration must ignore, as it ignores those that are not among the M.
        topk: K.
    """
    paths = accept_index.astype(np.int64)
    return VerifiedNodes(*_outcomes(parent_rows, top_scores_index, paths, probs, topk))


@compiled(
    "Tuple((f8[:, :], i8[:, :], b1[:, :], b1[:, :]))(i8[:, :], i8[:, :], i8[:, :], f4[:, :], i8)"
)
def _outcomes(
    parent_rows: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    probs: np.ndarray,
    topk: int,
) -> tuple[np.ndarray, ...]:
    """Return the arrays of `VerifiedNodes`; the arguments are those of `verify_outcomes`."""
    batch_size, num_nodes = parent_rows.shape
    shares, depths = np.empty(parent_rows.shape), np.empty_like(parent_rows)
    is_tried = np.empty(parent_rows.shape, np.bool_)
    accepted = np.empty_like(is_tried)
    is_accepted = np.zeros(batch_size * (num_nodes + 1), dtype=np.bool_)
    for request in range(batch_size):
        for place in range(accept_index.shape[1]):
            if accept_index[request, place] >= 0:
                is_accepted[accept_index[request, place]] = True
        is_accepted[request * (num_nodes + 1)] = True
    for request in range(batch_size):
        root = request * (num_nodes + 1)
        group, siblings, left, is_open = -2, 0, 1.0, True  # of the node's earlier siblings
        for node in range(num_nodes):
            parent = parent_rows[request, node]
            if parent != group:
                group, siblings, left, is_open = parent, 0, 1.0, True
            # Only if all better siblings were verified is it known that none of them was accepted.
            candidate = top_scores_index[request, node]
            is_open &= candidate % topk == siblings  # its rank there
            prob = float(probs[request, candidate]) if candidate < probs.shape[1] else np.nan
            shares[request, node] = min(prob / max(left, LEAST_LEFT), 1.0)
            depths[request, node] = 1 if parent < 1 else depths[request, parent - 1] + 1
            is_tried[request, node] = is_open and parent >= 0 and is_accepted[root + parent]
            accepted[request, node] = is_accepted[root + 1 + node]
            siblings, left = siblings + 1, left - prob
            is_open &= not accepted[request, node]
    return shares, depths, is_tried, accepted
