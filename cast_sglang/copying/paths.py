"""Copied paths: what a step may copy of each request, without its text, for traces and replays.

A trace holds no text, so it names candidates. Drafted ones have the numbers of `tree.py`, and those
that only copying proposes come behind them. For each node that has a copied child a row says which
candidate that is, and its class. `Lookup` arrays made of these rows take the place of automata: a
state is then 1 + the number of a node, and a token the number of a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cast_sglang.copying.automaton import HEADER, NO_BLOCK, copy_of, descend, longest_match
from cast_sglang.copying.chances import AGREEMENTS, CLASSES_OF_KIND, class_of
from cast_sglang.ops.compiled import compiled

__all__ = ["CopiedPaths", "copied_child", "copied_paths", "go_on", "looked_up", "roots_of"]

# Scores are products that are rounded in another order while serving. A path has at most 64 factors
# in float32, which are off by 64 / 2^24 = 4e-6 together.
_ROUNDING = 1e-4
# Tokens of a text that are looked up in its pool, so that every class of lengths may occur.
_MOST_MATCH = 33


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
    their drafted chance and the best chance of their class, one layer deeper than `max_depth`, and
    the path of copies below the root whatever it is worth.

    Args:
        all: as of `graft`.
    """
    best = np.repeat(chances.reshape(-1, len(AGREEMENTS)).max(axis=1), len(AGREEMENTS))
    least = least_scores * np.float32(1.0 - _ROUNDING)
    num_drafted = scores.shape[1]
    most = (1 + num_drafted) * (max_depth + 1)  # a path of copies below each node
    found = []
    for request, (base, capacity, state, match) in enumerate(roots.tolist()):
        further, copied = np.empty((2, most), np.int64), np.empty((num_drafted + most, 3), np.int64)
        counts = 0, 0
        if base >= 0:
            drafted = tokens[request], scores[request], parents[request]
            first_class = CLASSES_OF_KIND if kinds[request] else 0
            limits = np.array([topk, max_depth, vocab_size, first_class, state, match])
            results = limits, further, copied
            counts = _find(ints[base:], capacity, *drafted, best, least[request], *results)
        paths = further[:, : counts[0]]
        found.append(CopiedPaths(paths[0], paths[1], copied[: counts[1]], match))
    return found


def looked_up(
    copied: Sequence[np.ndarray], num_candidates: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return `ints` and `roots` for `graft`, which make it go by rows in place of texts.

    The tokens of `graft` are then candidate numbers, -1 for a candidate that the rows do not know.

    Args:
        copied: [n, 3] int of each request, as of `CopiedPaths`.
        num_candidates: M + E of each request.
    """
    parts, roots, used = [np.empty(0, np.int32)], [], 0
    for rows, count in zip(copied, num_candidates, strict=True):
        if not len(rows):
            roots.append((*NO_BLOCK, 0, 0))
            continue
        table = np.full((2, 1 + count), -1, np.int32)
        table[:, rows[:, 0] + 1] = rows[:, 1:].T
        parts.append(table.ravel())
        roots.append((used, -(1 + count), 0, 0))  # a negative capacity: no automaton
        used += table.size
    return np.concatenate(parts), np.array(roots, np.int64)


def roots_of(ints: np.ndarray, blocks: np.ndarray, pools: np.ndarray | None = None) -> np.ndarray:
    """Return [B, 4] int64: where each request copies from, and its root's context there.

    That is the text in which the longer end of the request's own occurs, its own or the pool's:
    first int and capacity of the block, state and length as of `longest_match`.

    Args:
        ints, blocks: of `SuffixIndex`.
        pools: [B, 2] int64, blocks of the requests' pools; None where no one has a pool.
    """
    roots = np.zeros((len(blocks), 4), np.int64)
    roots[:, :2] = blocks
    _find_roots(ints, np.full_like(blocks, -1) if pools is None else pools, _MOST_MATCH, roots)
    return roots


@compiled("void(i4[::1], i8[:, :], i8, i8[:, :])")
def _find_roots(ints: np.ndarray, pools: np.ndarray, most: int, roots: np.ndarray) -> None:
    """Write the columns of `roots_of` behind the first two, and those where a pool is taken."""
    for request in range(len(roots)):
        base, capacity = roots[request, 0], roots[request, 1]
        if base < 0:
            continue
        block, pool, room = ints[base:], pools[request, 0], pools[request, 1]
        roots[request, 2], roots[request, 3] = longest_match(block, capacity)
        if pool < 0:
            continue
        state, length = 0, 0
        for back in range(min(most, block[0]) - 1, -1, -1):
            token = block[HEADER + block[0] - 1 - back]
            state, length = descend(ints[pool:], room, state, length, token)
        if length > roots[request, 3]:
            roots[request, 0], roots[request, 1] = pool, room
            roots[request, 2], roots[request, 3] = state, length


@compiled("Tuple((i8, i8))(i4[::1], i8, i8, i8, i8)")
def go_on(block: np.ndarray, capacity: int, state: int, length: int, token: int) -> tuple[int, int]:
    """Return state and length of a context and one more token, as `descend`.

    Args:
        block, capacity: of an automaton, or of `looked_up`; also below.
    """
    if capacity < 0:
        return (token + 1 if 0 <= token < -capacity - 1 else -1), 0
    return descend(block, capacity, state, length, token)


@compiled("Tuple((i8, i8, i8, i8))(i4[::1], i8, i8, i8, i8)")
def copied_child(
    block: np.ndarray, capacity: int, state: int, length: int, first_class: int
) -> tuple[int, int, int, int]:
    """Return what followed a context: token, -1 for none; length and state with it; its class.

    The class is that of the first of `AGREEMENTS`.

    Args:
        first_class: of the requests of a kind; rows know it by themselves.
    """
    if capacity < 0:
        token = block[state] if state >= 0 else -1
        kind = block[state - capacity] if token >= 0 else -1
        return token, 0, token + 1, kind
    token, known, at, count, same = copy_of(block, capacity, state, length)
    kind = first_class + class_of(known, count, same, 0) if token >= 0 else -1
    return token, known + 1, at, kind


@compiled("Tuple((i8, i8))(i4[::1], i8, i8[:], f4[:], i8[:], f4[:], f4, i8[:], i8[:, :], i8[:, :])")
def _find(
    block: np.ndarray,
    capacity: int,
    tokens: np.ndarray,
    scores: np.ndarray,
    parents: np.ndarray,
    best: np.ndarray,
    least: float,
    limits: np.ndarray,
    further: np.ndarray,
    copied: np.ndarray,
) -> tuple[int, int]:
    """Do the work of `copied_paths` for one request; return E and the number of rows.

    Arrays of nodes have the root first.
    """
    topk, max_depth, vocab_size, first_class, first_state, match = limits
    num_drafted = len(scores)
    state, length = np.zeros(num_drafted + 1, np.int64), np.zeros(num_drafted + 1, np.int64)
    depth, bound = np.zeros(num_drafted + 1, np.int64), np.zeros(num_drafted + 1, np.float32)
    raised = np.zeros(num_drafted + 1, np.float32)  # best chance of a copy; 0 for no copied child
    is_on_path = np.zeros(num_drafted + 1, np.bool_)  # of copies below the root
    first_child = np.full(num_drafted + 1, -1)
    for group in range(num_drafted // topk):
        first_child[parents[group * topk] + 1] = group * topk
    state[0], length[0] = first_state, match
    bound[0], is_on_path[0] = 1.0, True
    num_further = num_copied = 0
    for node in range(num_drafted + 1):
        if node:
            above = parents[node - 1] + 1
            top = scores[above - 1] if above else np.float32(1.0)
            share = scores[node - 1] / top if top > 0.0 else np.float32(0.0)
            bound[node] = bound[above] * max(share, raised[node])
            depth[node] = depth[above] + 1
            if bound[node] <= least and not is_on_path[node]:
                continue
            state[node], length[node] = descend(
                block, capacity, state[above], length[above], tokens[node - 1]
            )
        at, known, level, number, worth = (
            state[node],
            length[node],
            depth[node],
            node - 1,
            bound[node],
        )
        first = first_child[node]
        while level <= max_depth and (worth > least or is_on_path[node]):
            token, known, at, kind = copied_child(block, capacity, at, known, first_class)
            if token < 0 or token >= vocab_size:
                break
            place = -1
            for child in range(topk if first >= 0 else 0):
                if tokens[first + child] == token:
                    place = child
                    break
            child = first + place if place >= 0 else num_drafted + num_further
            copied[num_copied, 0], copied[num_copied, 1] = number, child
            copied[num_copied, 2] = kind
            num_copied += 1
            if place >= 0:
                raised[child + 1], is_on_path[child + 1] = best[kind], is_on_path[node]
                break
            further[0, num_further], further[1, num_further] = number, token
            num_further += 1
            level, number, first, worth = level + 1, child, -1, worth * best[kind]
    return num_further, num_copied
