"""Lookahead: what it will bring to expand a node, before its children are known.

A child of draft probability p below a node of path score v brings v p, if that exceeds what the
verified row it takes has to bring, the row price m. So expanding the node is worth

    V(v) = E over children p of the sum over j of max(0, v p_j - m)

The expectation runs over the children of nodes that were expanded lately, each node weighted by its
own score: what hangs below a node that is hardly ever reached does not matter.

One layer ahead is far enough. V is convex with V(0) = 0, so V(v p) <= p V(v), and probabilities of
siblings sum to at most 1: the children of a layer together never promise more than the layer did. A
layer that does not pay is not redeemed by those below it, nor is a node: the stopping problem is
monotone.

Source: Chow, Robbins, "A martingale system theorem and applications" (1961), the monotone case.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cast_sglang.compiled import compiled

__all__ = ["Lookahead"]

# V(v) = m U(v / m), so one table of U serves every price. It stands on a geometric grid of v / m,
# eight places to an octave, from 1, where nothing pays, to 2^12.
_PER_OCTAVE = 8
_LAST = 12 * _PER_OCTAVE
_LEAST_PRICE = 2.0**-12
_SURPLUS = 2.0 ** (np.arange(_LAST + 1) / _PER_OCTAVE) - 1.0
# Nodes read from one layer: enough for a mean, few where the batch is large.
_MAX_NODES = 8
_ROOT = np.ones((1, 1), np.float32)  # the score of every root
# Steps after which a node counts half.
HALF_LIFE = 32
_KEEP = 0.5 ** (1 / HALF_LIFE)


class Lookahead:
    """Recent children, and the worth of expansion that they promise.

    On a geometric grid a child of probability p lies a fixed number of places below its parent,
    wherever that is. So all that V needs of the nodes seen is one histogram, how many children lie
    how far below, in place of a buffer of vectors; and it forgets by one multiplication.
    """

    def __init__(self) -> None:
        self._children = np.zeros(_LAST + 1)
        self._parents = 0.0
        self._surplus = np.zeros(_LAST + 1)  # U
        self._seen: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        self._turn = 0

    @property
    def has_learned(self) -> bool:
        """Whether any node's children are known."""
        return self._parents > 0.0

    def add(self, parent_scores: torch.Tensor | None, child_probs: torch.Tensor) -> None:
        """Take note of the children of the nodes of one layer; read and counted by `learn`.

        Args:
            parent_scores: [B, n] float32, path scores of the layer's nodes, of which the first W
                have children; None for roots.
            child_probs: [B * W, K] float32, their children's probabilities given them.
        """
        self._seen.append((parent_scores, child_probs))

    def learn(self) -> None:
        """Count what was added, and let what was known before count a little less.

        Effects: two small copies to the host for each layer whose nodes are on a device.
        """
        if not self._seen:
            return
        self._children *= _KEEP
        self._parents *= _KEEP
        for scores, probs in self._seen:
            weights = _ROOT if scores is None else scores.numpy(force=True)
            self._parents += _count_children(
                weights, probs.numpy(force=True), self._turn, self._children
            )
            self._turn += 1
        self._seen.clear()
        _promise(self._children, self._parents, self._surplus)

    def best_width(
        self, scores: np.ndarray, token: float, row_price: float, growth: np.ndarray, price: float
    ) -> tuple[int, float]:
        """Return how many of a layer's nodes are best expanded, and their gain beyond the price.

        Definition: the first k that maximises
            sum over requests, sum over s <= k of V(token * scores[:, s]) - B * price * growth[k]

        Args:
            scores: [B, K] float32, path scores of the layer's best nodes, descending.
            token: worth of an accepted token.
            row_price: m >= 0, accepted tokens asked of a verified row.
            growth: [>= K] float32, time of one more layer of 1.. nodes.
            price: accepted tokens asked per unit of time.
        """
        width, gain = _best_width(self._surplus, scores, token, row_price, growth, price)
        return int(width), float(gain)


@compiled("f8(f8[:], f8, f8)")
def _value(surplus: np.ndarray, score: float, row_price: float) -> float:
    """Return V(score) = m U(score / m), at the nearest place of the table.

    Args:
        surplus: the table of U.
        score: v, a path score times the worth of an accepted token.
        row_price: m >= 0.
    """
    least = max(row_price, _LEAST_PRICE)
    if score <= least:
        return 0.0
    place = int(_PER_OCTAVE * math.log2(score / least) + 0.5)
    return least * surplus[min(place, _LAST)]


@compiled("f8(f4[:, :], f4[:, :], i8, f8[:])")
def _count_children(
    weights: np.ndarray, probs: np.ndarray, turn: int, children: np.ndarray
) -> float:
    """Add the children of some nodes to the histogram; return the weight of the nodes.

    Args:
        weights: [B, n] float32, path scores, the first W of each row those of the nodes; [1, 1]
            for all alike.
        probs: [B * W, K] float32, the nodes' children's probabilities given them.
        turn: of many nodes, chooses which ones count.
        children: [places], gets weight for each child at its distance below its parent.
    """
    total, width = 0.0, len(probs) // len(weights)
    stride = -(-len(probs) // _MAX_NODES)
    for node in range(turn % stride, len(probs), stride):
        weight = float(weights[0, 0] if weights.size == 1 else weights[node // width, node % width])
        total += weight
        for child in range(probs.shape[1]):
            distance = -_PER_OCTAVE * math.log2(max(float(probs[node, child]), 1e-9))
            distance = min(max(distance, 0.0), float(_LAST))
            # A child between two places is shared by them; one beyond the last counts as there.
            low = min(int(distance), _LAST - 1)
            further = weight * (distance - low)
            children[low] += weight - further
            children[low + 1] += further
    return total


@compiled("void(f8[:], f8, f8[:])")
def _promise(children: np.ndarray, parents: float, surplus: np.ndarray) -> None:
    """Fill the table of U: at place i, a child j places below brings the surplus of place i - j."""
    for place in range(len(surplus)):
        total = 0.0
        for below in range(place):
            total += children[below] * _SURPLUS[place - below]
        surplus[place] = total / max(parents, 1e-30)


@compiled("Tuple((i8, f8))(f8[:], f4[:, :], f8, f8, f4[:], f8)")
def _best_width(
    surplus: np.ndarray,
    scores: np.ndarray,
    token: float,
    row_price: float,
    growth: np.ndarray,
    price: float,
) -> tuple[int, float]:
    batch_size, topk = scores.shape
    gain, best, most = 0.0, 0, -np.inf
    for k in range(topk):
        for request in range(batch_size):
            gain += _value(surplus, token * scores[request, k], row_price)
        net = gain - batch_size * price * growth[k]
        if net > most:
            best, most = k, net
    return best + 1, most
