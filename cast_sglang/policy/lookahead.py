"""Lookahead: predicts what one more layer would bring, before its candidates are known.

`Lookahead` compares two trees by their accepted tokens less the price of their time: the tree as it
stands, and the tree with a further layer. It does not know the candidates of that layer. But it
counts how far the children of recently expanded nodes lay below their parents. From that follows
how many candidates of each score to expect, and so the best number of nodes to verify and the time
that takes.

One layer may be too little to judge by. Where one more row takes long to verify and the rows after
it do not, as at the edge of a tile, one layer does not pay, and two or three do. So if one layer
does not pay, `Lookahead` looks at several.

Children count with the score of their parent, because what hangs below a node that is hardly ever
reached does not matter. They are counted by depth, because drafts get worse with it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cast_sglang.ops.compiled import compiled

__all__ = ["Lookahead"]

# Scores lie on a geometric grid, eight places to an octave, from 1 down to 2^-12.
_PER_OCTAVE = 8
_LAST = 12 * _PER_OCTAVE
_SCORES = 2.0 ** (-np.arange(_LAST + 1) / _PER_OCTAVE)
# Nodes read from one layer: enough for a mean, and few of a large batch.
_MAX_NODES = 8
_ROOT = np.ones((1, 1), np.float32)  # the score of every root
# A node counts half after this many counted trees with nodes of its depth.
HALF_LIFE = 32
_KEEP = 0.5 ** (1 / HALF_LIFE)
# From this many trees on, every second one counts, since counting takes as long as deciding.
_MANY_TREES = 2 * HALF_LIFE
# The mean children of the depth above count like this many nodes of a depth.
_PRIOR = 1.0


class Lookahead:
    """Counts the children of recent nodes and chooses how wide to expand the growing tree.

    On a geometric grid a child of probability p lies the same number of places below its parent
    wherever the parent is. So one histogram of these distances holds all that is needed of the
    nodes seen, and one multiplication makes old ones count less.

    Args:
        max_layers: the most layers of a tree.
    """

    def __init__(self, max_layers: int) -> None:
        # By depth of the parents, 0 for roots: children at each distance, weight of the parents,
        # and children of one parent.
        self._children = np.zeros((max_layers + 1, _LAST + 1))
        self._parents = np.zeros(max_layers + 1)
        self._means = self._children.copy()
        # Candidates of the tree that grows: their number and the sum of their scores, by place.
        self._tree = np.zeros((2, _LAST + 1))
        self._seen: list[tuple[int, torch.Tensor | None, torch.Tensor]] = []
        self._turn = self._num_trees = 0

    @property
    def has_learned(self) -> bool:
        """Whether any node's children are known."""
        return self._turn > 0

    def add(
        self, depth: int, parent_scores: torch.Tensor | None, child_probs: torch.Tensor
    ) -> None:
        """Keep the children of one layer's nodes until `learn` reads and counts them.

        After many trees, every second one is passed over.

        Args:
            depth: of the nodes, 0 for roots.
            parent_scores: [B, n] float32, path scores of the layer's nodes, of which the first W
                have children; None for roots.
            child_probs: [B * W, K] float32, their children's probabilities given them.
        """
        if self._num_trees > _MANY_TREES and self._num_trees % 2:
            return
        self._seen.append((depth, parent_scores, child_probs))

    def learn(self) -> None:
        """Count the children that were added; those counted before count a little less.

        Effects: two small copies to the host for each layer whose nodes are on a device.
        """
        if not self._seen:
            return
        for depth, scores, probs in self._seen:
            weights = _ROOT if scores is None else scores.numpy(force=True)
            known = self._parents, self._children
            _count_children(weights, probs.numpy(force=True), self._turn, depth, *known)
            self._turn += 1
        self._seen.clear()
        _fill_means(self._children, self._parents, self._means)

    def begin_tree(self) -> None:
        """Drop the candidates of the last tree."""
        self._num_trees += 1
        self._tree.fill(0.0)

    def best_width(
        self,
        depth: int,
        scores: np.ndarray,
        token: float,
        verify: np.ndarray,
        growth: np.ndarray,
        price: float,
        max_layers: int,
    ) -> tuple[int, float]:
        """Add a layer to the tree; return how many of its nodes to expand, and the gain of that.

        Definition: the width is the first k that maximises
            cut(tree and children of the best k nodes of each request) - price * growth[k]
        and the gain is that maximum less cut(tree), where
            cut(nodes) = max over n of token * (sum of the n best scores) - price * verify[n]
        in the mean over requests, whose nodes are ranked together. If the gain is not positive, it
        is the most that 2.. layers of this width gain, each of the best k children of the one
        above.

        Args:
            depth: of the layer, 1 for that of the roots' children.
            scores: [B, K] float32, path scores of the layer's best nodes, descending.
            token: worth of an accepted token.
            verify: [N] float32, time of verifying 1.. rows per request, root included.
            growth: [>= K] float32, time of one more layer of 1.. nodes.
            price: accepted tokens asked per unit of time.
            max_layers: how many more layers the tree may get.
        """
        width, gain = _best_width(
            self._means[depth:],
            self._tree,
            scores,
            token,
            verify,
            growth,
            price,
            max_layers,
        )
        return int(width), float(gain)


@compiled("f8(f8)")
def _place(score: float) -> float:
    """Return the place of a score on the grid, not rounded."""
    return min(max(-_PER_OCTAVE * math.log2(max(score, 1e-9)), 0.0), float(_LAST))


@compiled("void(f4[:, :], f4[:, :], i8, i8, f8[:], f8[:, :])")
def _count_children(
    weights: np.ndarray,
    probs: np.ndarray,
    turn: int,
    depth: int,
    parents: np.ndarray,
    children: np.ndarray,
) -> None:
    """Add the children of some nodes to the histogram of their depth, in which older ones fade.

    Args:
        weights: [B, n] float32, path scores, of which the first W of each row are those of the
            nodes; [1, 1] where all nodes weigh the same.
        probs: [B * W, K] float32, the probabilities of the nodes' children given them.
        turn: chooses which nodes count where there are many.
        depth: of the nodes.
        parents: [depths], to which the weight of each node is added.
        children: [depths, places], to which it is added for each child, at the child's distance
            below its parent.
    """
    parents[depth] *= _KEEP
    children[depth] *= _KEEP
    width = len(probs) // len(weights)
    stride = -(-len(probs) // _MAX_NODES)
    for node in range(turn % stride, len(probs), stride):
        weight = float(weights[0, 0] if weights.size == 1 else weights[node // width, node % width])
        parents[depth] += weight
        for child in range(probs.shape[1]):
            distance = _place(float(probs[node, child]))
            # Two places share a child between them; a child beyond the last place counts there.
            low = min(int(distance), _LAST - 1)
            further = weight * (distance - low)
            children[depth, low] += weight - further
            children[depth, low + 1] += further


@compiled("void(f8[:, :], f8[:], f8[:, :])")
def _fill_means(children: np.ndarray, parents: np.ndarray, means: np.ndarray) -> None:
    """Fill the mean children of a node of each depth, moved towards those of the depth above."""
    prior = 1e-30  # of the first known depth, which has none above
    for depth in range(len(parents)):
        for place in range(children.shape[1]):
            above = means[depth - 1, place] if depth else 0.0
            means[depth, place] = (children[depth, place] + prior * above) / (
                parents[depth] + prior
            )
        if parents[depth] > 0.0:
            prior = _PRIOR


@compiled("f8(f8[:, :], f8, f4[:], f8)")
def _best_cut(nodes: np.ndarray, token: float, verify: np.ndarray, price: float) -> float:
    """Return what the best number of nodes brings beyond the price of verifying them.

    Args:
        nodes: [2, places], number of nodes per request and the sum of their scores.
        token, verify, price: as of `Lookahead.best_width`.
    """
    most = -price * verify[0]
    num_nodes, utility, capacity = 0.0, 0.0, len(verify) - 1.0
    for place in range(nodes.shape[1]):
        count = nodes[0, place]
        if count == 0.0:
            continue
        part = min(1.0, (capacity - num_nodes) / count)
        num_nodes += part * count
        utility += part * nodes[1, place]
        whole = min(int(num_nodes), len(verify) - 2)
        time = verify[whole] + (num_nodes - whole) * (verify[whole + 1] - verify[whole])
        most = max(most, token * utility - price * time)
        if part < 1.0:
            break
    return most


@compiled("void(f8[:], f8, f8, f8[:, :])")
def _expand(children: np.ndarray, number: float, score: float, nodes: np.ndarray) -> None:
    """Add the expected children of some nodes that have the same score.

    Args:
        children: [places], children of one node at each distance below it.
        number: how many nodes there are.
        nodes: [2, places], as of `_best_cut`.
    """
    place = int(_place(score) + 0.5)
    for below in range(_LAST - place):
        count = number * children[below]
        nodes[0, place + below] += count
        nodes[1, place + below] += count * score * _SCORES[below]


@compiled("Tuple((i8, f8))(f8[:, :], f8[:, :], f4[:, :], f8, f4[:], f4[:], f8, i8)")
def _best_width(
    children: np.ndarray,
    tree: np.ndarray,
    scores: np.ndarray,
    token: float,
    verify: np.ndarray,
    growth: np.ndarray,
    price: float,
    max_layers: int,
) -> tuple[int, float]:
    """Do the work of `Lookahead.best_width`, which adds the layer to the tree.

    Args:
        children: [>= max_layers, places], children of one node of this layer, of the next, and so
            on.
        tree: [2, places], as of `_best_cut`.
    """
    batch_size, topk = scores.shape
    for request in range(batch_size):
        for k in range(topk):
            place = int(_place(float(scores[request, k])) + 0.5)
            tree[0, place] += 1.0 / batch_size
            tree[1, place] += scores[request, k] / batch_size
    stands = _best_cut(tree, token, verify, price)
    grown, layer, width, most = tree.copy(), np.zeros_like(tree), 0, -np.inf
    for k in range(topk):
        for request in range(batch_size):
            _expand(children[0], 1.0 / batch_size, float(scores[request, k]), grown)
        gain = _best_cut(grown, token, verify, price) - stands - price * growth[k]
        if gain > most:
            layer, width, most = grown - tree, k + 1, gain
    if most > 0.0 or max_layers < 2:
        return width, most

    grown = tree + layer
    for further in range(1, max_layers):
        below, room = np.zeros_like(tree), float(width)
        for place in range(_LAST):
            number = min(layer[0, place], room)
            if number > 0.0:
                _expand(children[further], number, layer[1, place] / layer[0, place], below)
                room -= number
        grown += below
        layer = below
        time = (1 + further) * growth[width - 1]
        gain = _best_cut(grown, token, verify, price) - stands - price * time
        most = max(most, gain)
    return width, most
