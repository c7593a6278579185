"""Lookahead: predicts what one more layer would bring, before its candidates are known.

`Lookahead` compares two trees by their accepted tokens less the price of their time: the tree as it
stands, and the tree with a further layer, each cut to its best number of rows. It does not know the
candidates of that layer. It takes for each node the mean children of recent nodes of its depth, as
drafts get worse with depth.

One layer may be too little to judge by. Where one more row takes long to verify and the rows after
it do not, as at the edge of a tile, one layer does not pay, and two or three do. So if one layer
does not pay, `Lookahead` looks at up to three.
"""

from __future__ import annotations

import numpy as np
import torch

from cast_sglang.ops.compiled import compiled
from cast_sglang.policy.select_count import pooled, select_count

__all__ = ["HALF_LIFE", "KEEP", "Lookahead"]

# A node counts half after this many trees with nodes of its depth, and a step in the price of
# `auto` after as many steps.
HALF_LIFE = 32
KEEP = 0.5 ** (1 / HALF_LIFE)
# Layers looked ahead at most: by true costs, `auto` then reaches 0.99 to 1.04 of the best fixed
# tree on the simulated GPUs of the tests.
MAX_AHEAD = 3


class Lookahead:
    """Keeps the mean children of recent nodes and chooses how wide to expand the growing tree.

    Args:
        max_layers: the most layers of a tree.
        max_nodes: the most nodes that are verified of a tree.
    """

    def __init__(self, max_layers: int, max_nodes: int) -> None:
        # By depth of the parents, 0 for roots: sums of the parents' weights, and of their
        # children's probabilities times these; the means are moved towards those of the depth
        # above, as if one node had had them. The first children tell how many there are.
        self._weights = np.zeros(max_layers + 1)
        self._sums = self._means = np.zeros((max_layers + 1, 0))
        self._max_nodes = max_nodes
        # [B, max_nodes] the best candidates of each request's tree so far, descending.
        self._best = np.zeros((0, max_nodes), np.float32)

    def learn(
        self, depth: int, parent_scores: torch.Tensor | None, child_probs: torch.Tensor
    ) -> None:
        """Count the children of one layer's nodes, which the next tree is grown by.

        Children weigh as much as the score of their parent: what hangs below a node that is hardly
        ever reached does not matter. Those of a root stand for the children of its own children
        until such are known, so they weigh as much as the best of them.

        Args:
            depth: of the nodes, 0 for roots.
            parent_scores: [B, n] float32, path scores of the layer's nodes, of which the first W
                have children; None for roots.
            child_probs: [B * W, K] float32, their children's probabilities given them.

        All on the host.
        """
        probs = child_probs.numpy()
        if not self._sums.size:
            self._sums, self._means = np.zeros((2, len(self._weights), probs.shape[1]))
        scores = probs if parent_scores is None else parent_scores.numpy()
        _add_children(self._sums, self._weights, depth, scores, probs, parent_scores is None)

    def begin_tree(self, batch_size: int) -> None:
        """Drop the candidates of the last tree; the next has this many requests."""
        self._best = np.zeros((batch_size, self._max_nodes), np.float32)
        _fill_means(self._sums, self._weights, self._means)

    def best_width(
        self,
        depth: int,
        scores: np.ndarray,
        verify: np.ndarray,
        growth: np.ndarray,
        price: float,
        max_layers: int,
        shares_out: bool = False,
        standing: np.ndarray | None = None,
    ) -> tuple[int, float]:
        """Add a layer to the tree; return how many of its nodes to expand, and the gain of that.

        Definition: the width is the first k that maximises
            cut(tree and children of the best k nodes of each request) - price * growth[k]
        and the gain is that maximum less cut(tree), where
            cut(nodes) = max over n of (sum of the n best scores) - price * verify[n]
        with the sum of each request's n best, in the mean over requests, or with the nodes of all
        requests ranked together where one budget of rows is shared out (`select_count`). If the
        gain is not positive, it is the most that 2 or 3 layers of one width gain, each of the best
        k children of the one above.

        Args:
            depth: of the layer, 1 for that of the roots' children.
            scores: [B, K] float32, what the layer's best nodes are worth, descending.
            verify: [N] float32, time of verifying 1.. rows per request, root included.
            growth: [>= K] float32, time of one more layer of 1.. nodes.
            price: accepted tokens asked per unit of time.
            max_layers: how many more layers the tree may get.
            shares_out: one budget of verified rows is shared out among the requests.
            standing: [B, n] float32, descending, the best nodes of the tree with this layer and
                with what else is in it; None for the layers alone. `scores` are then what the nodes
                are worth for their children, in any order.
        """
        if standing is not None:
            count = min(standing.shape[1], self._max_nodes)
            self._best[:, :count] = standing[:, :count]
        cut = verify, growth, price, min(MAX_AHEAD, max_layers), shares_out, standing is None
        width, gain = _best_width(self._means[depth:], self._best, scores, *cut)
        return width, gain

    def best_length(
        self,
        scores: np.ndarray,
        verify: np.ndarray,
        growth: float,
        price: float,
        max_layers: int,
        shares_out: bool = False,
    ) -> int:
        """Return how many layers a chain is worth, by the mean children of nodes of each depth.

        Definition: the smallest number of layers that maximises
            cut(the chains' nodes) - price * growth * (layers - 1)
        with `cut` of `best_width`, where a node scores what the one above it does, times the mean
        of the best children of that depth.

        Args:
            scores: [B, 1] float32, what the chains' first nodes are worth.
            growth: time of one more layer.
            max_layers: the most layers that a chain may get.
        """
        most = min(max_layers, self._max_nodes)
        chains = scores * np.append(1.0, self._means[1:, 0])[:most].cumprod().astype(np.float32)
        gains = [
            _best_cut(chains[:, : more + 1], verify, price, shares_out) - price * growth * more
            for more in range(chains.shape[1])
        ]
        return 1 + int(np.argmax(gains))


@compiled("void(f8[:, :], f8[:], i8, f4[:, :], f4[:, :], b1)")
def _add_children(
    sums: np.ndarray,
    weights: np.ndarray,
    depth: int,
    scores: np.ndarray,
    probs: np.ndarray,
    are_roots: bool,
) -> None:
    """Do the work of `Lookahead.learn`; the scores of roots are their children's."""
    weights[depth] *= KEEP
    sums[depth] *= KEEP
    requests, width = len(scores), len(probs) // len(scores)
    unit = max(scores[:, 0].sum(), 1e-9) if are_roots else float(requests)
    for request in range(requests):
        for node in range(width):
            weight = scores[request, node] / unit
            weights[depth] += weight
            for k in range(probs.shape[1]):
                sums[depth, k] += weight * probs[request * width + node, k]


@compiled("void(f8[:, :], f8[:], f8[:, :])")
def _fill_means(sums: np.ndarray, weights: np.ndarray, means: np.ndarray) -> None:
    """Fill the mean children of a node of each depth, moved towards those of the depth above."""
    prior = 1e-30  # of the first known depth, which has none above
    for depth in range(len(weights)):
        for k in range(sums.shape[1]):
            above = means[depth - 1, k] if depth else 0.0
            means[depth, k] = (sums[depth, k] + prior * above) / (weights[depth] + prior)
        if weights[depth] > 0.0:
            prior = 1.0


@compiled("b1(f4[:], f4)")
def _insert(best: np.ndarray, score: float) -> bool:
    """Insert a score into a descending list, whose last falls out; False if it is below all."""
    place = len(best) - 1
    if score <= best[place]:
        return False
    while place > 0 and best[place - 1] < score:
        best[place] = best[place - 1]
        place -= 1
    best[place] = score
    return True


@compiled("f8(f4[:, :], f4[:], f8, b1)")
def _best_cut(best: np.ndarray, verify: np.ndarray, price: float, shares_out: bool) -> float:
    """Return what the best number of rows brings beyond the price of verifying them.

    Args:
        best: [B, n] float32, the best candidates of each request, descending.
        verify, price, shares_out: as of `Lookahead.best_width`.
    """
    if shares_out:
        ranked, costs = pooled(best, verify)
        return select_count(ranked, costs, price)[1]
    return select_count(best[:, : len(verify) - 1], verify[1:], price)[1]


@compiled("Tuple((i8, f8))(f8[:, :], f4[:, :], f4[:, :], f4[:], f4[:], f8, i8, b1, b1)")
def _best_width(
    children: np.ndarray,
    tree: np.ndarray,
    scores: np.ndarray,
    verify: np.ndarray,
    growth: np.ndarray,
    price: float,
    ahead: int,
    shares_out: bool,
    is_new: bool,
) -> tuple[int, float]:
    """Do the work of `Lookahead.best_width`, which adds the layer to the tree if it is new there.

    Args:
        children: [.., K], mean children of a node of this layer, of the next, and so on.
        tree: [B, n] float32, the best candidates of each request, descending.
    """
    batch_size, topk = scores.shape
    for request in range(batch_size):
        for k in range(topk if is_new else 0):
            if not _insert(tree[request], scores[request, k]):
                break
    stands = _best_cut(tree, verify, price, shares_out)
    grown, width, most = tree.copy(), 0, -np.inf
    for k in range(topk):
        for request in range(batch_size):
            for child in range(children.shape[1]):
                if not _insert(grown[request], np.float32(scores[request, k] * children[0, child])):
                    break
        gain = _best_cut(grown, verify, price, shares_out) - stands - price * growth[k]
        if gain > most:
            width, most = k + 1, gain
    ahead = min(ahead, len(children))
    if most > 0.0 or ahead < 2:
        return width, most

    # Layers of this width, each of the best children of the one above.
    grown, layer, below = tree.copy(), scores[:, :width].copy(), scores[:, :width].copy()
    for further in range(ahead):
        below[:] = 0.0
        for request in range(batch_size):
            for node in range(width):
                for child in range(children.shape[1]):
                    score = np.float32(layer[request, node] * children[further, child])
                    kept = _insert(below[request], score)
                    if not _insert(grown[request], score) and not kept:
                        break
        layer[:] = below
        if further:
            time = (1 + further) * growth[width - 1]
            gain = _best_cut(grown, verify, price, shares_out) - stands - price * time
            most = max(most, gain)
    return width, most
