"""Copied paths: what a step may copy of each request, without its text, for traces and replays.

A trace holds no text, so it names candidates. Drafted ones have the numbers of `tree.py`, and those
that only copying proposes come behind them. For each node that has a copied child a row says which
candidate that is, and its class. `contexts.looked_up` puts these rows in the place of automata.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cast_sglang.copying.chances import AGREEMENTS
from cast_sglang.copying.graft import Grafts, graft
from cast_sglang.policy.acceptance import GREEDY, SAMPLED

__all__ = ["CopiedPaths", "copied_paths"]

# Scores are products that are rounded in another order while serving. Each factor in float32 is off
# by 2^-24, so that holds for paths of 1,600 nodes.
_ROUNDING = 1e-4


class CopiedPaths(NamedTuple):
    """What may be copied for one request, M drafted candidates and E that only copying proposes."""

    parents: np.ndarray  # [E] int64, candidate numbers of those E, -1 for the root
    tokens: np.ndarray  # [E] int64
    # [n, 3] int64: a node (-1 for the root), its copied child, and the class of the copy as if it
    # were the first of `AGREEMENTS`.
    copied: np.ndarray
    match: int  # length of the longest end of the text that occurred before

    def numbers_of(self, grafted: np.ndarray, num_drafted: int) -> np.ndarray:
        """Return [n] int64, the candidates here that grafted ones are; -1 for none.

        Args:
            grafted: [n] int64, parents of the copied candidates that a request has (`Grafts`).
            num_drafted: M.
        """
        child_of = dict(self.copied[:, :2].tolist())
        numbers: list[int] = []
        for parent in grafted.tolist():
            known = numbers[parent - num_drafted] if parent >= num_drafted else parent
            numbers.append(child_of.get(known, -1))
        return np.array(numbers, np.int64)


def copied_paths(
    ints: np.ndarray,
    roots: np.ndarray,
    tokens: np.ndarray,
    scores: np.ndarray,
    parents: np.ndarray,
    topk: int,
    chances: np.ndarray,
    kinds: np.ndarray,
    *,
    max_depth: int,
    least_scores: np.ndarray,
    vocab_size: int,
) -> list[CopiedPaths]:
    """Return all that `graft` may have found for these trees while they grew, and more.

    That is every node whose score would be above `least_scores` if its tokens had the higher of
    their drafted chance and the best chance of their class, and the path of copies below the root
    whatever it is worth; and of each of these nodes the copied child, one layer deeper.

    Args:
        all: as of `graft`.
    """
    best = np.repeat(chances.reshape(-1, len(AGREEMENTS)).max(axis=1), len(AGREEMENTS))
    grafts = graft(
        *(ints, roots, tokens, scores, parents, topk, best),
        np.where(kinds == GREEDY, GREEDY, SAMPLED),
        num_nodes=(1 + scores.shape[1]) * max_depth,  # a path of copies below each node
        max_depth=max_depth,
        least_scores=least_scores * np.float32(1.0 - _ROUNDING),
        vocab_size=vocab_size,
        is_bound=True,
    )
    return [
        _paths(grafts, request, tokens[request], parents[request], match)
        for request, match in enumerate(roots[:, 3].tolist())
    ]


def _paths(
    grafts: Grafts, request: int, tokens: np.ndarray, parents: np.ndarray, match: int
) -> CopiedPaths:
    """Return what was grafted for one request, and the copied child of each of its nodes."""
    num_drafted, count = len(tokens), grafts.counts[request]
    all_parents = [*parents.tolist(), *grafts.parents[request, :count].tolist()]
    all_tokens = [*tokens.tolist(), *grafts.tokens[request, :count].tolist()]
    # The first of siblings with the same token, as `graft` merges them.
    places = range(len(all_tokens) - 1, -1, -1)
    number_of = {(all_parents[number], all_tokens[number]): number for number in places}
    nodes = np.flatnonzero(grafts.classes[request] >= 0)
    children = []
    for node, token in zip(nodes - 1, grafts.child_tokens[request, nodes], strict=True):
        if (node, token) not in number_of:  # not worth a row, and known all the same
            number_of[node, token] = len(all_tokens)
            all_parents.append(node)
            all_tokens.append(token)
        children.append(number_of[node, token])
    classes = grafts.classes[request, nodes]
    copied = np.stack([nodes - 1, children, classes - classes % len(AGREEMENTS)], axis=1)
    further = np.array([all_parents, all_tokens], np.int64)[:, num_drafted:]
    return CopiedPaths(further[0], further[1], copied.astype(np.int64), match)
