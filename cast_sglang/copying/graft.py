"""Grafts: copies of earlier text, hung under the nodes of the trees that a draft model grew.

Each node has a context, the text and the path down to the node, and so at most one copied child:
what followed the longest known end of that context the last time. It is merged with the drafted
child of the same token, or is a further child. The chances of siblings never sum to more than 1;
where a copy is more likely than the draft leaves room for, its siblings share what it leaves.

What is verified of drawn children must not depend on their tokens (docs/sampling.md), so copies
change no score of theirs, and come behind them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cast_sglang.copying.chances import CLASSES_OF_KIND
from cast_sglang.copying.contexts import copied_child, go_on
from cast_sglang.ops.compiled import compiled
from cast_sglang.policy.acceptance import DRAWN, GREEDY

__all__ = ["Grafts", "Seen", "graft"]

_GREEDY, _DRAWN = GREEDY, DRAWN
# Columns of `Seen.rows`.
_STATE, _LENGTH, _END_STATE, _END_LENGTH, _PATH = range(5)
# Places in `chances.AGREEMENTS`.
_LIKELIEST, _PROPOSED, _NOT_PROPOSED, _NOT_ASKED = range(4)


class Grafts(NamedTuple):
    """What is grafted into a step's trees of M drafted candidates: n copied ones at most.

    Copied candidate i has number M + i. Those that a request does not have are children of the root
    with token 0 and score 0.
    """

    scores: np.ndarray  # [B, M] float32, of the drafted candidates, merged with copies
    parents: np.ndarray  # [B, n] int64, candidate numbers, -1 for the root; here and below: copied
    tokens: np.ndarray  # [B, n] int64
    copied_scores: np.ndarray  # [B, n] float32, none above the parent's
    counts: np.ndarray  # [B] int64, copied candidates that a request has
    depth: int  # of the deepest of them
    has_copies: bool  # whether any node of any request has a copied child, merged ones included
    # Of the copied child of the root, of each candidate, and of each copied candidate:
    classes: np.ndarray  # [B, 1 + M + n] int32, as of `class_of`; -1 for a node without one
    child_tokens: np.ndarray  # [B, 1 + M + n] int32
    # What a policy needs to decide about one more layer, where there are copies:
    best: np.ndarray  # [B, n] float32, scores of the best candidates, descending
    left: np.ndarray  # [B, K] float32, part of a node's score that copies leave to drafted children

    def fit(
        self, num_draft_tokens: int, num_rows: np.ndarray | None, is_ragged: bool
    ) -> tuple[int, np.ndarray | None]:
        """Return how many rows are verified of the trees that there are.

        Args:
            num_draft_tokens, num_rows: as of `VerifyRows`.
            is_ragged: requests may have unequal numbers of rows; else those that have fewer nodes
                keep rows of nodes that do not exist.
        """
        most = 1 + self.scores.shape[1] + self.counts
        if not is_ragged or (most >= num_draft_tokens).all():
            return num_draft_tokens, num_rows
        num_rows = np.minimum(most, num_draft_tokens if num_rows is None else num_rows)
        return max(2, int(num_rows.max())), num_rows

    def chains(self, num_draft_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first N - 1 candidates of each request where none was drafted (M = 0).

        Each is then the only child of the one before it, and its row follows that one's.

        Returns:
            top_scores_index, draft_tokens and parent_rows, [B, N - 1] int64, of a `tree.Selection`.
        """
        places = np.arange(num_draft_tokens - 1)
        exists = places < self.counts[:, None]
        return (
            np.where(exists, places, self.tokens.shape[1]),
            np.where(exists, self.tokens[:, : len(places)], 0),
            np.where(exists, places, -1),
        )


class Seen:
    """What was found below the nodes of a step's trees, kept while these grow.

    Args:
        batch_size: requests.
        num_candidates: M, the most drafted candidates of a tree.
        max_depth: the most that `graft` is asked for.
    """

    def __init__(self, batch_size: int, num_candidates: int, max_depth: int) -> None:
        nodes = batch_size, 1 + num_candidates  # the root first
        # How many nodes of its path of copies are known, -1 for nothing.
        self.known = np.full(nodes, -1, np.int32)
        # State and length of its context, and of the last one of its path; then of each node of the
        # path, down to one that copies nothing, token and class.
        self.rows = np.empty((*nodes, _PATH + 2 * max_depth + 2), np.int32)

    def holds(self, batch_size: int, num_candidates: int, max_depth: int) -> bool:
        """Return whether there is room for trees of so many candidates."""
        size, nodes, columns = self.rows.shape
        most = (columns - _PATH) // 2 - 1
        return size == batch_size and nodes > num_candidates and most >= max_depth

    def forget(self) -> None:
        """Begin another step."""
        self.known[:] = -1


def graft(
    ints: np.ndarray,
    roots: np.ndarray,
    tokens: np.ndarray,
    scores: np.ndarray,
    parents: np.ndarray,
    topk: int,
    chances: np.ndarray,
    kinds: np.ndarray,
    *,
    num_nodes: int,
    max_depth: int,
    least_scores: np.ndarray,
    vocab_size: int,
    nodes: np.ndarray | None = None,
    seen: Seen | None = None,
    is_bound: bool = False,
) -> Grafts:
    """Find the copied children of all nodes that may be verified, and their copied descendants.

    Definition: from the root down, for each node x above the floor, which is `least_scores` or, if
        it is higher, the score of the n-th best drafted candidate:
            c = chance of the class of x's copied child, of token t
            is t drafted below x: its chance becomes max(its own, c); else t is a new child, with c
            if the chances of x's children sum to more than 1, all but that of t are scaled to fit
        and below each new child its own copied child, and so on, while scores are above the floor.
        Where children are drawn, the floor is `least_scores`, no chance is changed, and t is a new
        child too where it was drawn and is not above the floor.

    Args:
        ints, roots: of `SuffixIndex` and `contexts.roots_of`, or of `contexts.looked_up`; a request
            whose first int is -1 gets no copies.
        tokens: [B, M] int64, drafted candidates, numbered as in `tree.py`.
        scores: [B, M] float32 in [0, 1], none above the parent's.
        parents: [B, M] int64, candidate numbers, -1 for the root.
        topk: K, candidates of each expanded node.
        chances: [classes] float32, `Chances.table()`.
        kinds: [B] int64, of `policy.acceptance`.
        num_nodes: n, the most nodes that are verified of a tree, and that are grafted.
        max_depth: of a copied node, 1 for the root's children.
        least_scores: [B] float32 >= 0, of a node that is worth to be copied.
        vocab_size: tokens beyond, as those of images, are not copied.
        nodes: [B, K] int64, the newest layer's best nodes; None where no layer is decided about.
        seen: of the step, where its trees were grafted before they had all of their layers; None
            for what is grafted once.
        is_bound: no chance is lowered, and the path of copies below the root goes on whatever it is
            worth (`paths.copied_paths`).
    """
    if seen is None:
        seen = Seen(len(scores), scores.shape[1], max_depth)
    nodes = np.empty((len(scores), 0), np.int64) if nodes is None else nodes
    limits = topk, num_nodes, max_depth, vocab_size, int(is_bound)
    how = chances, kinds, least_scores, limits, nodes
    merged, copied, copied_scores, children, counts, view, depth, has_copies = _graft(
        ints, roots, tokens, scores, parents, *how, seen.known, seen.rows
    )
    return Grafts(
        scores=merged,
        parents=copied[0],
        tokens=copied[1],
        copied_scores=copied_scores,
        counts=counts,
        depth=int(depth),
        has_copies=bool(has_copies),
        classes=children[0],
        child_tokens=children[1],
        best=view[0],
        left=view[1],
    )


@compiled("f4(f4[:], i8, f4)")
def _nth_best(scores: np.ndarray, n: int, least: float) -> np.float32:
    """Return the n-th largest score, `least` where fewer are above that."""
    count = 0
    for score in scores:
        count += score > least
    if count < n:
        return np.float32(least)
    best: np.float32 = np.partition(scores, len(scores) - n)[len(scores) - n]
    return best


@compiled("void(f4[:], f4[:], f4[:])")
def _sort(first: np.ndarray, second: np.ndarray, best: np.ndarray) -> None:
    """Write the best of two arrays of scores, descending, in place of zeros.

    The copies come first: they are mostly sorted, and better than what is to be sorted in.
    """
    size, last = 0, len(best) - 1
    for scores in (first, second):
        for score in scores:
            place = min(size, last)
            if score > best[place]:
                while place > 0 and best[place - 1] < score:
                    best[place] = best[place - 1]
                    place -= 1
                best[place] = score
                size += 1


@compiled("void(f4[:], f4, i8, i8, i8, f4, b1, f4[:], f4[:])")
def _make_room(
    scores: np.ndarray,
    parent_score: float,
    first: int,
    topk: int,
    match: int,
    chance: float,
    is_bound: bool,
    own_factor: np.ndarray,
    raised: np.ndarray,
) -> None:
    """Merge a copy with a node's drafted children, and scale the others where it needs room.

    Args:
        first: number of the first child.
        match: place of the child of the same token, -1 for none.
        is_bound: as of `graft`.
        own_factor, raised: as of `_graft`, written for the children.
    """
    if parent_score <= 0.0:
        return
    others = np.float32(0.0)
    for child in range(topk):
        share = scores[first + child] / parent_score
        if child == match:
            chance = max(chance, share)
            if chance > share:
                raised[first + child + 1] = chance
        else:
            others += share
    if others + chance > 1.0 and not is_bound:
        for child in range(topk):
            if child != match:
                own_factor[first + child + 1] = (np.float32(1.0) - chance) / others


@compiled(
    "Tuple((f4[:, ::1], i8[:, :, ::1], f4[:, ::1], i4[:, :, ::1], i8[::1], "
    "UniTuple(f4[:, ::1], 2), i8, b1))(i4[::1], i8[:, :], i8[:, :], f4[:, :], i8[:, :], f4[:], "
    "i8[:], f4[:], UniTuple(i8, 5), i8[:, :], i4[:, :], i4[:, :, :])"
)
def _graft(
    ints: np.ndarray,
    roots: np.ndarray,
    tokens: np.ndarray,
    scores: np.ndarray,
    parents: np.ndarray,
    chances: np.ndarray,
    kinds: np.ndarray,
    least_scores: np.ndarray,
    limits: tuple[int, int, int, int, int],
    nodes: np.ndarray,
    all_known: np.ndarray,
    seen: np.ndarray,
) -> tuple[Any, ...]:
    """Do the work of `graft`; return scores, parents and tokens, and what else `Grafts` holds.

    What the texts say is asked once for each node and place of its path, and kept (`Seen`): a hash
    table that has left the caches takes longer than all that is done with its answers. Arrays of
    nodes have the root first, so that candidate c is at c + 1.
    """
    topk, num_nodes, max_depth, vocab_size, is_bound = limits
    batch_size, num_drafted = scores.shape
    merged, counts = scores.copy(), np.zeros(batch_size, np.int64)
    copied_scores = np.zeros((batch_size, num_nodes), np.float32)
    copied = np.zeros((2, batch_size, num_nodes), np.int64)  # parents, tokens
    copied[0] = -1
    children = np.empty((2, batch_size, 1 + num_drafted + num_nodes), np.int32)  # classes, tokens
    children[:] = -1
    depth = np.zeros(num_drafted + 1, np.int64)
    first_child = np.empty(num_drafted + 1, np.int64)
    # What a candidate's score is multiplied with, because of its ancestors, and of its siblings.
    factor = np.ones(num_drafted + 1, np.float32)
    own_factor = np.ones(num_drafted + 1, np.float32)
    raised = np.empty(num_drafted + 1, np.float32)  # chance of a merged child, -1 for others
    goes_on = np.empty(num_drafted + 1, np.bool_)  # whatever it is worth
    deepest, has_copies = 0, False
    for request in range(batch_size):
        base, capacity, root_state, root_length = roots[request]
        if base < 0:
            continue
        block, known, ours = ints[base:], all_known[request], seen[request]
        if known[0] < 0:
            ours[0, _STATE], ours[0, _LENGTH] = root_state, root_length
        is_drawn, floor = kinds[request] == _DRAWN, least_scores[request]
        if not is_drawn:
            floor = _nth_best(scores[request], num_nodes, floor)
        first_class = 0 if kinds[request] == _GREEDY else CLASSES_OF_KIND
        first_child[:] = -1
        for group in range(num_drafted // topk):
            first_child[parents[request, group * topk] + 1] = group * topk
        own_factor[:], raised[:], goes_on[:] = 1.0, -1.0, False
        goes_on[0] = is_bound
        for node in range(num_drafted + 1):
            score = np.float32(1.0)
            if node:
                above = parents[request, node - 1] + 1
                before = scores[request, node - 1]
                top = np.float32(1.0) if above == 0 else merged[request, above - 1]
                factor[node] = factor[above] * own_factor[node]
                score = min(before * factor[node], top)
                if raised[node] >= 0.0:
                    score = top * raised[node]
                    factor[node] = score / before if before > 0.0 else np.float32(0.0)
                merged[request, node - 1] = score
                depth[node] = depth[above] + 1
                if score <= floor and not goes_on[node]:
                    continue
                if known[node] < 0:
                    state, length = ours[above, _STATE], ours[above, _LENGTH]
                    ours[node, _STATE], ours[node, _LENGTH] = go_on(
                        block, capacity, state, length, tokens[request, node - 1]
                    )
            if known[node] < 0:
                known[node] = 0
                ours[node, _END_STATE] = ours[node, _STATE]
                ours[node, _END_LENGTH] = ours[node, _LENGTH]
            level, number, place, is_drafted = depth[node], node - 1, 0, True
            while True:
                at = _PATH + 2 * place
                if place == known[node]:
                    state, length = ours[node, _END_STATE], ours[node, _END_LENGTH]
                    ours[node, at], ours[node, _END_LENGTH], ours[node, _END_STATE], kind = (
                        copied_child(block, capacity, state, length, first_class)
                    )
                    ours[node, at + 1] = kind
                    known[node] += 1
                token, kind = ours[node, at], ours[node, at + 1]
                place += 1
                if token < 0 or token >= vocab_size:
                    break
                first, match = first_child[node] if is_drafted else -1, -1
                agreement = _NOT_ASKED if first < 0 else _NOT_PROPOSED
                for child in range(topk if first >= 0 else 0):
                    if tokens[request, first + child] == token and not (
                        is_drawn and scores[request, first + child] <= floor
                    ):
                        match, agreement = child, _PROPOSED if child else _LIKELIEST
                        break
                kind, has_copies = kind + agreement, True
                children[0, request, number + 1], children[1, request, number + 1] = kind, token
                chance = chances[kind]
                if first >= 0 and not is_drawn:
                    _make_room(
                        scores[request],
                        np.float32(1.0) if node == 0 else scores[request, node - 1],
                        first,
                        topk,
                        match,
                        chance,
                        is_bound,
                        own_factor,
                        raised,
                    )
                if match >= 0:
                    goes_on[first + match + 1] = goes_on[node]
                    break
                score *= chance
                new, is_worth_it = counts[request], score > floor or goes_on[node]
                if level >= max_depth or new == num_nodes or not is_worth_it:
                    break
                copied[0, request, new], copied[1, request, new] = number, token
                copied_scores[request, new] = score
                counts[request] += 1
                level, number, is_drafted = level + 1, num_drafted + new, False
                deepest = max(deepest, level)
    best, left = np.zeros_like(copied_scores), np.empty(nodes.shape, np.float32)
    for request in range(batch_size if has_copies and nodes.shape[1] else 0):
        _sort(copied_scores[request, : counts[request]], merged[request], best[request])
        for place in range(nodes.shape[1]):
            node = nodes[request, place]
            kind = children[0, request, node + 1]
            taken = chances[kind] if kind >= 0 else np.float32(0.0)
            left[request, place] = merged[request, node] * (np.float32(1.0) - taken)
    return merged, copied, copied_scores, children, counts, (best, left), deepest, has_copies
