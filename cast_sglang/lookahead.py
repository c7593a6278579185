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

__all__ = ["Lookahead"]

# V(v) = m U(v / m), so one table of U serves every price. It stands on a geometric grid of v / m,
# eight places to an octave, from 1, where nothing pays, to 2^12.
_PER_OCTAVE = 8
_LAST = 12 * _PER_OCTAVE
_LEAST_PRICE = 2.0**-12
_SURPLUS = 2.0 ** (np.arange(_LAST + 1) / _PER_OCTAVE) - 1.0
# Nodes read from one layer: enough for a mean, few where the batch is large.
_MAX_NODES = 8
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
        self._worth = np.zeros(_LAST + 1)  # U
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._turn = 0

    @property
    def has_learned(self) -> bool:
        """Whether any node's children are known."""
        return self._parents > 0.0

    def add(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        """Take note of the children of the nodes of one layer; read and counted by `learn`.

        Args:
            parent_scores: [n] float32, path scores of the nodes.
            child_probs: [n, K] float32, their children's probabilities given them.
        """
        stride = -(-len(parent_scores) // _MAX_NODES)
        first = self._turn % stride
        self._turn += 1
        self._seen.append((parent_scores[first::stride], child_probs[first::stride]))

    def learn(self) -> None:
        """Count what was added, and let what was known before count a little less.

        Effects: two small copies to the host where the nodes are on a device.
        """
        if not self._seen:
            return
        weights, probs = (
            torch.cat(part).numpy(force=True) for part in zip(*self._seen, strict=True)
        )
        self._seen.clear()
        # A child between two places is shared by them; one beyond the last counts as there.
        distance = _places(1.0 / np.maximum(probs, 1e-9))
        low = np.minimum(distance.astype(np.int64), _LAST - 1)
        further = weights[:, None] * (distance - low)
        cells = np.concatenate((low.ravel(), low.ravel() + 1))
        counts = np.concatenate(((weights[:, None] - further).ravel(), further.ravel()))
        self._children *= _KEEP
        self._children += np.bincount(cells, counts, _LAST + 1)
        self._parents = _KEEP * self._parents + float(weights.sum())
        # U at place i: a child j places below has the surplus of place i - j.
        worth = np.convolve(self._children, _SURPLUS)[: _LAST + 1]
        self._worth[:] = worth / max(self._parents, 1e-30)

    def worth(self, scores: np.ndarray, row_price: float) -> np.ndarray:
        """Return V of each score, in the shape of `scores`.

        Args:
            scores: path scores times the worth of an accepted token.
            row_price: m >= 0, accepted tokens asked of a verified row.
        """
        row_price = max(row_price, _LEAST_PRICE)
        # The nearest place; few calls, as each is slow when a model has just swept the caches.
        places = np.log2(np.maximum(scores, row_price)) * _PER_OCTAVE
        places += 0.5 - _PER_OCTAVE * math.log2(row_price)
        return row_price * self._worth.take(places.astype(np.int64), mode="clip")


def _places(ratios: np.ndarray) -> np.ndarray:
    """Return how far up the grid each ratio lies, in 0.._LAST."""
    return np.minimum(_PER_OCTAVE * np.log2(np.maximum(ratios, 1.0)), float(_LAST))
