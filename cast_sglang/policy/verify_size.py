"""How many of the ranked nodes to verify, given the price of time: compiled searches."""

from __future__ import annotations

import numpy as np

from cast_sglang.ops.compiled import compiled

__all__ = ["best_verify_size", "split_budget"]


@compiled("f8(f4[:], f8)")
def _between(times: np.ndarray, place: float) -> float:
    """Return the time at a place that need not be whole; beyond the end, the last time."""
    low = min(int(place), len(times) - 1)
    high = min(low + 1, len(times) - 1)
    return times[low] + min(place - low, 1.0) * (times[high] - times[low])


@compiled("f8(f4[:], f4[:], i8, b1, f8, f8)")
def _verify_time(
    rows: np.ndarray,
    extend: np.ndarray,
    layers: int,
    extends_by_accepted: bool,
    nodes: float,
    utility: float,
) -> float:
    """Return the time of a verify pass and of the draft extend after it.

    Args:
        rows: [N], time of verifying 1.. rows per request, root included.
        extend: [E], time of draft extend of 1.. rows per request.
        layers: depth of the tree, which no accepted path exceeds.
        extends_by_accepted: draft extend runs the rows that each request accepts; else as many rows
            as the longest path of the tree has.
        nodes: verified nodes per request, root not included.
        utility: expected accepted nodes per request.
    """
    longest = utility if extends_by_accepted else min(float(layers), nodes)
    # k nodes are k + 1 rows, and the time of one row stands at index 0.
    return _between(rows, nodes) + _between(extend, longest)


@compiled("i8(f4[:, :], i8[:], f4[:], f4[:], i8, b1, f8)")
def best_verify_size(
    scores: np.ndarray,
    num_nodes: np.ndarray,
    rows: np.ndarray,
    extend: np.ndarray,
    layers: int,
    extends_by_accepted: bool,
    price: float,
) -> int:
    """Return the index of the number of nodes that brings most beyond the price of its time.

    Definition: the first i that maximises, with u = mean over requests of the sum of
        scores[:, : num_nodes[i]], u - price * time of num_nodes[i] nodes

    Args:
        scores: [B, n] float32, descending.
        num_nodes: [S], ascending, at most n.
        rows, extend, layers, extends_by_accepted: as of `_verify_time`.
        price: accepted tokens asked per unit of time.
    """
    batch_size = len(scores)
    best, most, utility, choice = 0, -np.inf, 0.0, 0
    for node in range(num_nodes[-1]):
        for request in range(batch_size):
            utility += scores[request, node] / batch_size
        if node + 1 != num_nodes[choice]:
            continue
        time = _verify_time(rows, extend, layers, extends_by_accepted, float(node + 1), utility)
        gain = utility - price * time
        if gain > most:
            best, most = choice, gain
        choice += 1
    return best


@compiled("i8[:](f4[:, :], f4[:], f4[:], i8, b1, f8)")
def split_budget(
    scores: np.ndarray,
    rows: np.ndarray,
    extend: np.ndarray,
    layers: int,
    extends_by_accepted: bool,
    price: float,
) -> np.ndarray:
    """Return [B], the rows of each request, root included, that bring most beyond their price.

    Definition: with the nodes of all requests in descending order, the first n that maximises
        (sum of the n best scores) / B - price * time of n / B nodes per request

    Args:
        scores: [B, K] float32, descending.
        rows, extend, layers, extends_by_accepted: as of `_verify_time`.
        price: accepted tokens asked per unit of time.
    """
    batch_size, topk = scores.shape
    negated = np.empty(batch_size * topk, np.float32)
    for request in range(batch_size):
        for k in range(topk):
            negated[request * topk + k] = -scores[request, k]
    # Stable, so that a parent comes before a child of the same score.
    order = np.argsort(negated, kind="mergesort")
    best, most, utility = 0, -np.inf, 0.0
    for place in range(len(order)):
        utility -= negated[order[place]] / batch_size
        nodes = (place + 1) / batch_size
        time = _verify_time(rows, extend, layers, extends_by_accepted, nodes, utility)
        gain = utility - price * time
        if gain > most:
            best, most = place, gain
    num_rows = np.ones(batch_size, np.int64)
    for place in range(best + 1):
        num_rows[order[place] // topk] += 1
    return num_rows
