"""Contexts: where a node's context stands in what may be copied from, and what followed it.

That is an automaton, or where a trace is replayed, which holds no text, rows of `CopiedPaths`: a
state is then 1 + the number of a node, and a token the number of a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cast_sglang.copying.automaton import HEADER, NO_BLOCK, copy_of, descend, longest_match
from cast_sglang.copying.chances import class_of
from cast_sglang.ops.compiled import compiled

__all__ = ["copied_child", "go_on", "looked_up", "roots_of"]

# Tokens of a text that are looked up in its pool, so that every class of lengths may occur.
_MOST_MATCH = 33


def looked_up(
    copied: Sequence[np.ndarray], num_candidates: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return `ints` and `roots` for `graft`, which make it go by rows in place of texts.

    The tokens of `graft` are then candidate numbers, -1 for a candidate that the rows do not know.

    Args:
        copied: [n, 3] int of each request, as of `paths.CopiedPaths`.
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


def roots_of(
    ints: np.ndarray,
    blocks: np.ndarray,
    pools: np.ndarray | None = None,
    ends: np.ndarray | None = None,
) -> np.ndarray:
    """Return [B, 4] int64: where each request copies from, and its root's context there.

    That is the text in which the longer end of the request's own occurs, its own or the pool's:
    first int and capacity of the block, state and length as of `longest_match`.

    Args:
        ints, blocks: of `SuffixIndex`.
        pools: [B, 2] int64, blocks of the requests' pools; None where no one has a pool.
        ends: [B, 2] int64, how many tokens each text must have, and its last; a request with
            another text gets `NO_BLOCK`. None where all are right.
    """
    roots = np.zeros((len(blocks), 4), np.int64)
    pools, ends = (blocks[:0] if array is None else array for array in (pools, ends))
    _find_roots(ints, blocks, pools, ends, _MOST_MATCH, roots)
    return roots


@compiled("void(i4[::1], i8[:, :], i8[:, :], i8[:, :], i8, i8[:, :])")
def _find_roots(
    ints: np.ndarray,
    blocks: np.ndarray,
    pools: np.ndarray,
    ends: np.ndarray,
    most: int,
    roots: np.ndarray,
) -> None:
    for request in range(len(roots)):
        base, capacity = blocks[request]
        if base >= 0 and len(ends):
            size, last = ends[request]
            if ints[base] != size or ints[base + HEADER + size - 1] != last:
                base, capacity = NO_BLOCK
        roots[request, 0], roots[request, 1] = base, capacity
        if base < 0:
            continue
        block = ints[base:]
        roots[request, 2], roots[request, 3] = longest_match(block, capacity)
        if len(pools) == 0 or pools[request, 0] < 0:
            continue
        pool, room = pools[request]
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
