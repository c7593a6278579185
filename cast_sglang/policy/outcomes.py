"""Read from a verify pass which nodes the target judged, and which of them it accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import LEAST_LEFT
from cast_sglang.tree import first_child_of, layer_ends, proposer_of

__all__ = ["VerifiedNodes", "verify_outcomes"]


class VerifiedNodes(NamedTuple):
    """The nodes of one verify pass, without the root; [B, N - 1] each."""

    shares: np.ndarray  # float64, the argument x of g; see `policy.acceptance`
    depths: np.ndarray  # int64, 1 for the root's children
    is_tried: np.ndarray  # bool: the parent was accepted, and no earlier sibling was
    accepted: np.ndarray  # bool


def verify_outcomes(
    parent_list: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    probs: np.ndarray,
    widths: Sequence[int],
    topk: int,
) -> VerifiedNodes:
    """Return which nodes the target judged, and which of them it accepted.

    The root is row 0 of the pass; the node at index i of `top_scores_index` is row 1 + i.

    Args:
        parent_list: [B, *] int, `tree.Selection`'s.
        top_scores_index: [B, N - 1] int, `tree.Selection`'s.
        accept_index: [B, *] int, b * N + row of the root and of each accepted node, -1 for none;
            as SGLang's verify returns it.
        probs: [B, N - 1] float32, the draft's probability of each node given its parent; nan for a
            node that calibration must ignore.
        widths: nodes expanded per request in each layer below the root.
        topk: K.
    """
    proposers = proposer_of(top_scores_index, topk)
    shape = top_scores_index.shape
    depths = np.empty(shape, dtype=np.int64)
    shares, is_tried, accepted = np.empty(shape), np.empty(shape, bool), np.empty(shape, bool)
    _read_outcomes(
        parent_list,
        top_scores_index,
        accept_index.astype(np.int64),
        probs,
        layer_ends(widths, topk),
        proposers,
        top_scores_index - first_child_of(proposers, topk),
        shares,
        depths,
        is_tried,
        accepted,
    )
    return VerifiedNodes(shares, depths, is_tried, accepted)


@compiled(
    "void(i8[:, :], i8[:, :], i8[:, :], f4[:, :], i8[:], i8[:, :], i8[:, :], "
    "f8[:, :], i8[:, :], b1[:, :], b1[:, :])"
)
def _read_outcomes(
    parent_list: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    probs: np.ndarray,
    layer_ends: np.ndarray,
    proposers: np.ndarray,
    ranks: np.ndarray,
    shares: np.ndarray,
    depths: np.ndarray,
    is_tried: np.ndarray,
    accepted: np.ndarray,
) -> None:
    """Fill the arrays of `VerifiedNodes`. Arguments are those of `verify_outcomes`, and these.

    Args:
        layer_ends: [layers] int, as `tree.layer_ends`.
        proposers: [B, N - 1] int, the expanded node that proposed each node, 0 for the root.
        ranks: [B, N - 1] int, a node's index among the K candidates of its proposer.
    """
    batch_size, num_nodes = top_scores_index.shape
    is_accepted = np.zeros(batch_size * (num_nodes + 1), dtype=np.bool_)
    for request in range(batch_size):
        for place in range(accept_index.shape[1]):
            if accept_index[request, place] >= 0:
                is_accepted[accept_index[request, place]] = True
        is_accepted[request * (num_nodes + 1)] = True
    for request in range(batch_size):
        numbers, root = top_scores_index[request], request * (num_nodes + 1)
        group, siblings, left, is_open = -1, 0, 1.0, True  # of the node's earlier siblings
        for node in range(num_nodes):
            number, depth, parent_row = numbers[node], 1, 0
            while depth <= len(layer_ends) and number >= layer_ends[depth - 1]:
                depth += 1
            proposer = proposers[request, node]
            if proposer > 0:
                parent = max(parent_list[request, proposer], 0)
                parent_row = 1 + np.searchsorted(numbers, parent)
            if proposer != group:
                group, siblings, left, is_open = proposer, 0, 1.0, True
            # Only if all better siblings were verified is it known that none of them was accepted.
            is_open &= ranks[request, node] == siblings
            prob = float(probs[request, node])
            shares[request, node] = min(prob / max(left, LEAST_LEFT), 1.0)
            depths[request, node] = depth
            is_tried[request, node] = is_open and is_accepted[root + parent_row]
            accepted[request, node] = is_accepted[root + 1 + node]
            siblings, left = siblings + 1, left - prob
            is_open &= not accepted[request, node]
