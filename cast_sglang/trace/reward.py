"""The expected accepted drafts of a tree by the target's own probabilities, without sampling."""

import math
from typing import NamedTuple

import numpy as np

__all__ = ["TreeReward", "tree_reward"]


class TreeReward(NamedTuple):
    """Expected accepted drafts of one tree, in two forms."""

    expected: float  # exact: sum over nodes of the probability that the target accepts the node
    draft_tree_reward: float  # the reward of GTO, a smooth maximum over paths


def tree_reward(nodes: np.ndarray, parents: np.ndarray, probs: np.ndarray) -> TreeReward:
    """Return the expected accepted drafts and the GTO reward of a tree.

    Definition, with P(v) the product of probs along the path from the root to v:
        expected = sum over nodes v of P(v)
        draft_tree_reward = log of sum over leaves i of exp(L_i), L_i = sum of P(v) over the path
            from the root to leaf i, which is GTO's eta = 1

    `expected` is the mean number of accepted drafts if the target verifies by sampling.
    `draft_tree_reward` is the training objective of GTO; n leaves of probability 0 give log(n).

    Args:
        nodes: [n] int, ascending; a parent comes before its children.
        parents: [n] int, a node of `nodes`, or -1 for the root.
        probs: [n] float, the target's probability of each node given its parent.

    Source: Hu et al., "Bridging Draft Policy Misalignment: Group Tree Optimization for Speculative
    Decoding" (arXiv 2509.22134), equations 3 to 5.
    """
    taken, lengths = {-1: 1.0}, {-1: 0.0}
    inner = set(parents.tolist())
    expected = total = 0.0
    rows = zip(nodes.tolist(), parents.tolist(), probs.tolist(), strict=True)
    for node, parent, prob in rows:
        taken[node] = taken[parent] * prob
        lengths[node] = lengths[parent] + taken[node]
        expected += taken[node]
        if node not in inner:
            total += math.exp(lengths[node])
    return TreeReward(expected, math.log(total) if total else 0.0)
