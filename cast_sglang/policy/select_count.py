"""Algorithm 1 of CAST: how many of the best nodes are worth their cost, at a price.

Breadth, reranking and looking ahead all ask this. `select_count` answers it, and the other
functions bring a question into its form.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from cast_sglang.ops.compiled import compiled

__all__ = ["pooled", "select_count", "select_size", "share_out", "size_costs"]


@compiled("Tuple((i8, f8))(f4[:, :], f4[:], f8)")
def select_count(scores: np.ndarray, costs: np.ndarray, price: float) -> tuple[int, float]:
    """Choose how many of the best nodes are worth their cost.

    Definition: the smallest k in 1..n that maximises
        mean over requests of sum(scores[:, :k]) - price * costs[k - 1]

    The paper extends k while the marginal utility per marginal cost since the last kept point,
    (u_k - u_k0) / (c_k - c_k0), exceeds `price`. If costs increase strictly, this is the same rule,
    u_k - C c_k > u_k0 - C c_k0. The form used here also holds if measured costs are flat or fall.

    Args:
        scores: [B, n] float32, the best nodes of each request, descending.
        costs: [>= n] float32, normalised time of 1.. nodes per request.
        price: accepted tokens asked per unit of cost, >= 0.

    Returns:
        k, and what it maximises.

    Source: CAST, Algorithm 1.
    """
    best, most, utility = 0, -np.inf, 0.0
    for node in range(scores.shape[1]):
        for request in range(len(scores)):
            utility += scores[request, node]
        value = utility / len(scores) - price * costs[node]
        if value > most:
            best, most = node + 1, value
    return best, most


@compiled("Tuple((f4[:, :], f4[:]))(f4[:, :], f4[:])")
def pooled(scores: np.ndarray, verify: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and costs for `select_count` over the nodes of all requests together.

    k nodes of the whole batch of B are k / B per request in the mean, and count as much.

    Args:
        scores: [B, n] float32.
        verify: [N] float32, time of verifying 1.. rows per request, root included.

    Returns:
        [1, B * n] float32, the scores of all nodes over B, descending; [B * n] float32, the time of
        verifying 1.. nodes and all roots. Beyond N rows per request it is the time of N.
    """
    count = scores.size
    ranked, costs = np.empty((1, count), np.float32), np.empty(count, np.float32)
    ascending = np.sort(scores.copy().ravel())
    for place in range(count):
        ranked[0, place] = ascending[count - 1 - place] / len(scores)
        nodes = (place + 1) / len(scores)
        low = min(int(nodes), len(verify) - 1)
        high = min(low + 1, len(verify) - 1)
        costs[place] = verify[low] + (nodes - low) * (verify[high] - verify[low])
    return ranked, costs


@compiled("i8[:](f4[:, :], f4[:], f8)")
def share_out(scores: np.ndarray, verify: np.ndarray, price: float) -> np.ndarray:
    """Rank the nodes of all requests together and keep as many as `select_count` says.

    Args:
        scores, verify: as of `pooled`; each request's scores descending.

    Returns:
        [B] int64, the rows of each request, root included. Of equal scores the first are kept, so
        that a parent comes before its child.
    """
    count = select_count(*pooled(scores, verify), price)[0]
    rows = np.ones(len(scores), np.int64)
    for node in np.argsort(-scores.copy().ravel(), kind="mergesort")[:count]:
        rows[node // scores.shape[1]] += 1
    return rows


def size_costs(verify: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return [largest size] float32: time of 1.. rows in the smallest allowed size that holds them.

    Args:
        verify: [N] float32, time of verifying 1.. rows per request, root included.
        sizes: ascending values allowed for the rows, each >= 2.
    """
    allowed = np.asarray(sizes)
    rows = np.arange(1, sizes[-1] + 1)
    costs: np.ndarray = verify[allowed[np.searchsorted(allowed, rows)] - 1]
    return costs


def select_size(
    scores: np.ndarray, costs: np.ndarray, sizes: Sequence[int], price: float
) -> tuple[int, float]:
    """Choose the allowed size whose nodes bring most beyond the price of its time.

    A size that is paid for is filled, so a number of nodes costs what the size that holds it does.

    Args:
        scores: [B, n] float32, the best nodes of each request, descending.
        costs: `size_costs` of these sizes.

    Returns:
        N, root included, and expected accepted tokens, less the price of the time. Where the
        smallest size has more rows than there are nodes: all nodes, and -inf.
    """
    num_sizes = bisect_right(sizes, scores.shape[1] + 1)
    if not num_sizes:
        return scores.shape[1] + 1, -math.inf
    count, value = select_count(scores[:, : sizes[num_sizes - 1] - 1], costs[1:], price)
    return sizes[bisect_left(sizes, count + 1)], value
