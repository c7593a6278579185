"""What a verify pass showed of its nodes: which could be accepted, and which were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import LEAST_LEFT

__all__ = ["Outcomes", "verify_outcomes"]


class Outcomes(NamedTuple):
    """What a verify pass showed of its nodes; [B, N - 1] each, the root left out."""

    shares: np.ndarray  # float64, x of g: the draft's probability given parent and siblings before
    depths: np.ndarray  # int64, the root's children at 1
    is_tried: np.ndarray  # bool, whether the parent was accepted and no sibling before it
    accepted: np.ndarray  # bool


def verify_outcomes(
    parent_list: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    probs: np.ndarray,
    widths: Sequence[int],
    topk: int,
) -> Outcomes:
    """Read from a verify pass which nodes were tried, and which of them accepted.

    Candidate g is a child of expanded node g // K, and stands in verified row 1 + its place in the
    ascending `top_scores_index`; row 0 is the root.

    Args:
        parent_list: [B, *] int, `tree.Selection`'s.
        top_scores_index: [B, N - 1] int, `tree.Selection`'s.
        accept_index: [B, *] int, rows of the accepted nodes and the root counted through the batch
            (b * N + row), -1 for none; as SGLang's verify returns it.
        probs: [B, N - 1] float32, the draft's probability of each node given its parent; nan for
            nodes that teach nothing.
        widths: nodes expanded per request in each layer below the root.
        topk: K.
    """
    layer_starts = topk * np.cumsum([1, *widths])
    shape = top_scores_index.shape
    depths = np.empty(shape, dtype=np.int64)
    shares, is_tried, accepted = np.empty(shape), np.empty(shape, bool), np.empty(shape, bool)
    _read_outcomes(
        parent_list,
        top_scores_index,
        accept_index.astype(np.int64),
        probs,
        layer_starts,
        topk,
        shares,
        depths,
        is_tried,
        accepted,
    )
    return Outcomes(shares, depths, is_tried, accepted)


@compiled(
    "void(i8[:, :], i8[:, :], i8[:, :], f4[:, :], i8[:], i8, "
    "f8[:, :], i8[:, :], b1[:, :], b1[:, :])"
)
def _read_outcomes(
    parent_list: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    probs: np.ndarray,
    layer_starts: np.ndarray,
    topk: int,
    shares: np.ndarray,
    depths: np.ndarray,
    is_tried: np.ndarray,
    accepted: np.ndarray,
) -> None:
    """Write the outcomes; arguments as for `verify_outcomes`, but for `layer_starts`.

    Args:
        layer_starts: [layers] int, the number of candidates in all layers up to each.
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
        group, siblings, left, is_open = -1, 0, 1.0, True  # of the node's siblings before it
        for node in range(num_nodes):
            number, depth, parent_row = numbers[node], 1, 0
            while depth <= len(layer_starts) and number >= layer_starts[depth - 1]:
                depth += 1
            if number >= topk:
                parent = max(parent_list[request, number // topk], 0)
                parent_row = 1 + np.searchsorted(numbers, parent)
            if number // topk != group:
                group, siblings, left, is_open = number // topk, 0, 1.0, True
            # A node whose better siblings were not all verified may have been passed over for them.
            is_open &= number % topk == siblings
            prob = float(probs[request, node])
            shares[request, node] = min(prob / max(left, LEAST_LEFT), 1.0)
            depths[request, node] = depth
            is_tried[request, node] = is_open and is_accepted[root + parent_row]
            accepted[request, node] = is_accepted[root + 1 + node]
            siblings, left = siblings + 1, left - prob
            is_open &= not accepted[request, node]
