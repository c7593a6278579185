"""Cuts: of ranked nodes, how many are worth the time of verifying them at a price."""

from __future__ import annotations

import numpy as np

from cast_sglang.ops.compiled import compiled

__all__ = ["best_size", "share_out"]


@compiled("f8(f4[:], f8)")
def _between(times: np.ndarray, place: float) -> float:
    """Return the time at a place that need not be whole; the last one beyond the end."""
    low = min(int(place), len(times) - 1)
    high = min(low + 1, len(times) - 1)
    return times[low] + min(place - low, 1.0) * (times[high] - times[low])


@compiled("f8(f4[:], f4[:], i8, f8, f8)")
def _cut_time(
    rows: np.ndarray, extend: np.ndarray, layers: int, nodes: float, utility: float
) -> float:
    """Return the time of verifying so many nodes per request and of extending the draft then.

    Args:
        rows: [N], time of verifying 1.. rows, the root's among them.
        extend: [E], time of extending the draft by 1.. rows.
        layers: of the tree, which no path exceeds; below 0 where the draft is extended by what
            each request accepts, utility in the mean.
    """
    longest = utility if layers < 0 else min(float(layers), nodes)
    # One row more than nodes or drafts, and index 0 is the time of one row.
    return _between(rows, nodes) + _between(extend, longest)


@compiled("i8(f4[:, :], i8[:], f4[:], f4[:], i8, f8)")
def best_size(
    scores: np.ndarray,
    num_nodes: np.ndarray,
    rows: np.ndarray,
    extend: np.ndarray,
    layers: int,
    price: float,
) -> int:
    """Return which number of nodes is best verified.

    Definition: the first i that maximises, with u = mean over requests of the sum of
        scores[:, : num_nodes[i]], u - price * time of num_nodes[i] nodes

    Args:
        scores: [B, n] float32, descending.
        num_nodes: [S], ascending, at most n.
        rows, extend, layers: as of `_cut_time`.
    """
    batch_size = len(scores)
    best, most, utility, choice = 0, -np.inf, 0.0, 0
    for node in range(num_nodes[-1]):
        for request in range(batch_size):
            utility += scores[request, node] / batch_size
        if node + 1 != num_nodes[choice]:
            continue
        gain = utility - price * _cut_time(rows, extend, layers, float(node + 1), utility)
        if gain > most:
            best, most = choice, gain
        choice += 1
    return best


@compiled("i8[:](f4[:, :], f4[:], f4[:], i8, f8)")
def share_out(
    scores: np.ndarray, rows: np.ndarray, extend: np.ndarray, layers: int, price: float
) -> np.ndarray:
    """Return how many rows of each request are best verified, its root among them.

    Definition: with the nodes of all requests in descending order, the first n that maximises
        (sum of the n best scores) / B - price * time of n / B nodes per request

    Args:
        scores: [B, K] float32, descending.
        rows, extend, layers: as of `_cut_time`.
    """
    batch_size, topk = scores.shape
    negated = np.empty(batch_size * topk, np.float32)
    for request in range(batch_size):
        for k in range(topk):
            negated[request * topk + k] = -scores[request, k]
    # Stable, so that a request's parent comes before a child of the same score.
    order = np.argsort(negated, kind="mergesort")
    best, most, utility = 0, -np.inf, 0.0
    for place in range(len(order)):
        utility -= negated[order[place]] / batch_size
        nodes = (place + 1) / batch_size
        gain = utility - price * _cut_time(rows, extend, layers, nodes, utility)
        if gain > most:
            best, most = place, gain
    num_rows = np.ones(batch_size, np.int64)
    for place in range(best + 1):
        num_rows[order[place] // topk] += 1
    return num_rows
