"""SuffixIndex: a suffix automaton of each request's text, which finds what followed it before.

A state of the automaton stands for the contexts (runs of tokens) that end at the same places of the
text; a suffix link leads to the longest shorter context with further places. So the link of the
last state is the longest end of the text that occurred before, and appending a token takes constant
time on average (Blumer et al., "The smallest automaton recognizing the subwords of a text",
Theoretical Computer Science 40, 1985).

Each state knows where its contexts ended last, where before that, and how often. To know this of
all states, a token would have to be noted in every context that it ends, of which text that repeats
one token has as many as tokens. So it is noted in the `MAX_LINKS` longest ones only. What a state
knows is true in any case: for shorter contexts it may be older, and counts lower.

All automata lie in one array of int32, so that one compiled call serves a batch. A request has one
block of it:

    header          tokens, states, the last state
    text            [capacity]
    states          [2 * capacity, 8]: length, link, last end, end before that, count; the token and
                    target of its first edge; its newest further edge
    further edges   [2 * capacity, 4]: state, token, target, next one of the state; a hash table

which is 100 bytes for each token of its capacity, a power of two. An automaton of n tokens has at
most 2 n states and n - 2 more edges than states. All states but the last one have an edge, so at
most n - 1 are further ones. Most states have one edge, and a look-up is then one read of memory.
`reference.Text` is the same in plain Python.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from cast_sglang.ops.compiled import compiled

__all__ = [
    "BETWEEN",
    "HEADER",
    "MAX_LINKS",
    "NO_BLOCK",
    "SuffixIndex",
    "copy_of",
    "descend",
    "longest_match",
]

# Contexts in which a token is noted. Python source has 1.75 such contexts that were said before, in
# the mean, 5 in 99 of 100 places, 7 at most (textwrap, fractions and heapq of Python 3.11, 22,511
# tokens of the tiny pair), so all of them are noted but in text that repeats itself closely.
MAX_LINKS = 32

# In place of a token: what comes before has nothing to do with what comes behind.
BETWEEN = np.iinfo(np.int32).max
NO_BLOCK = -1, 0  # first int and capacity of the block of a request without one

HEADER = 16  # a cache line, by which blocks are aligned, so that no state lies in two
_INTS_PER_TOKEN = 1 + 2 * 8 + 2 * 4
# So that a short text does not grow its block every few steps; other sizes were not measured.
_LEAST_CAPACITY = 64
# Of a state, and of an edge.
_LENGTH, _LINK, _END, _BEFORE, _COUNT, _FIRST, _FIRST_TARGET, _FURTHER = range(8)
_FROM, _TOKEN, _TARGET, _NEXT = range(4)
_NO_TOKEN = np.iinfo(np.int32).min


class SuffixIndex:
    """The automata of all running requests.

    Args:
        max_tokens: capacity of all blocks together, in tokens; a request beyond gets none.
    """

    def __init__(self, max_tokens: int) -> None:
        # The system gives memory page by page, where it is first written.
        ints = np.empty(max_tokens * _INTS_PER_TOKEN + HEADER, np.int32)
        self._ints = ints[-(ints.ctypes.data // ints.itemsize) % HEADER :]
        self._used = 0  # ints before the first that never was in a block
        self._free: dict[int, list[int]] = {}  # first ints of blocks that were dropped, by capacity
        # By request: first int and capacity of its block; and the same of those last asked for.
        self._blocks: dict[Hashable, tuple[int, int]] = {}
        self._asked: tuple[list[Hashable], np.ndarray] | None = None

    @property
    def ints(self) -> np.ndarray:
        """[n] int32, what `longest_match` and the others take; always the same array."""
        return self._ints

    @property
    def num_bytes(self) -> int:
        """Memory that the automata hold."""
        return self._used * self._ints.itemsize

    def __contains__(self, request: Hashable) -> bool:
        return request in self._blocks

    def num_tokens(self, request: Hashable) -> int:
        """Return the tokens of a request's text; 0 for one without a block."""
        base, _ = self._blocks.get(request, NO_BLOCK)
        return 0 if base < 0 else int(self._ints[base])

    def capacity(self, request: Hashable) -> int:
        """Return how many tokens a request's block has room for."""
        return self._blocks.get(request, NO_BLOCK)[1]

    def text(self, request: Hashable, first: int = 0) -> np.ndarray:
        """Return [n] int64, the tokens of a request's text from the given one on."""
        at, size = self._blocks.get(request, NO_BLOCK)[0] + HEADER, self.num_tokens(request)
        return self._ints[at + first : at + size].astype(np.int64)

    def blocks(self, requests: Sequence[Hashable]) -> np.ndarray:
        """Return [B, 2] int64, first int and capacity of each block; `NO_BLOCK` for none.

        The same array while requests and blocks are the same, not to be changed.
        """
        if self._asked is None or self._asked[0] != requests:
            blocks = [self._blocks.get(request, NO_BLOCK) for request in requests]
            self._asked = list(requests), np.array(blocks, np.int64).reshape(-1, 2)
        return self._asked[1]

    def add(self, request: Hashable, tokens: np.ndarray) -> bool:
        """Append tokens to a request's text.

        Args:
            tokens: [n] int64 >= 0.

        Returns:
            False if there is no room for it; the request then has no block any more.
        """
        base, capacity = self._blocks.get(request, NO_BLOCK)
        needed = len(tokens) + (int(self._ints[base]) if capacity else 0)
        if needed > capacity:
            wanted = max(_LEAST_CAPACITY, 1 << (needed - 1).bit_length())
            before = self._ints[base : base + _size(capacity)].copy()
            self.drop(request)
            base = self._place(wanted)
            if base < 0:
                return False
            self._blocks[request], self._asked = (base, wanted), None
            _start(self._ints[base : base + _size(wanted)], wanted, before, capacity)
            capacity = wanted
        _extend(self._ints[base : base + _size(capacity)], capacity, tokens)
        return True

    def add_rows(
        self, requests: Sequence[Hashable], tokens: np.ndarray, counts: np.ndarray
    ) -> None:
        """Append tokens to the texts that there are.

        Args:
            tokens: [B, n] int64 >= 0, those of each request come first.
            counts: [B] int64, how many there are of each.
        """
        for row in _extend_all(self._ints, self.blocks(requests), tokens, counts).tolist():
            self.add(requests[row], tokens[row, : counts[row]])

    def drop(self, request: Hashable) -> None:
        """Forget a request's text; its memory serves others."""
        base, capacity = self._blocks.pop(request, NO_BLOCK)
        if capacity:
            self._free.setdefault(capacity, []).append(base)
            self._asked = None

    def keep(self, requests: Sequence[Hashable]) -> None:
        """Forget all other requests."""
        for request in self._blocks.keys() - set(requests):
            self.drop(request)

    def _place(self, capacity: int) -> int:
        """Return the first int of a free block, -1 where there is no room."""
        if self._free.get(capacity):
            return self._free[capacity].pop()
        if self._used + _size(capacity) > len(self._ints):
            self._close_gaps()
        if self._used + _size(capacity) > len(self._ints):
            return -1
        self._used += _size(capacity)
        return self._used - _size(capacity)

    def _close_gaps(self) -> None:
        self._used, self._asked = 0, None
        self._free.clear()
        for request, (base, capacity) in sorted(self._blocks.items(), key=lambda item: item[1]):
            end = self._used + _size(capacity)
            self._ints[self._used : end] = self._ints[base : base + _size(capacity)]
            self._blocks[request], self._used = (self._used, capacity), end


def _size(capacity: int) -> int:
    return HEADER + _INTS_PER_TOKEN * capacity if capacity else 0


@compiled("i8(i8, i8)")
def _state_at(capacity: int, state: int) -> int:
    return HEADER + capacity + 8 * state


@compiled("i8(i4[::1], i8, i8, i8)")
def _slot(block: np.ndarray, capacity: int, state: int, token: int) -> int:
    """Return where a further edge stands in the block, or where it is to be put."""
    # Multiplicative hashing: Knuth, "The Art of Computer Programming" 3, section 6.4.
    slot = ((int(state) * 0x9E3779B1 + int(token)) * 0x9E3779B1) >> 16
    while True:
        at = HEADER + 17 * capacity + 4 * (slot & (2 * capacity - 1))
        if block[at + _FROM] < 0 or (block[at + _FROM] == state and block[at + _TOKEN] == token):
            return at
        slot += 1


@compiled("i8(i4[::1], i8, i8, i8)")
def _find_edge(block: np.ndarray, capacity: int, state: int, token: int) -> int:
    """Return where the target of a state's edge by a token stands in the block, -1 for none."""
    at = _state_at(capacity, state)
    if block[at + _FIRST] == token:
        return at + _FIRST_TARGET
    if block[at + _FURTHER] < 0:
        return -1
    at = _slot(block, capacity, state, token)
    return at + _TARGET if block[at + _FROM] >= 0 else -1


@compiled("void(i4[::1], i8, i8, i8, i8)")
def _add_edge(block: np.ndarray, capacity: int, state: int, token: int, target: int) -> None:
    at = _state_at(capacity, state)
    if block[at + _FIRST] == _NO_TOKEN:
        block[at + _FIRST], block[at + _FIRST_TARGET] = token, target
        return
    slot = _slot(block, capacity, state, token)
    block[slot + _FROM], block[slot + _TOKEN], block[slot + _TARGET] = state, token, target
    block[slot + _NEXT] = block[at + _FURTHER]
    block[at + _FURTHER] = slot


@compiled("void(i4[::1], i8, i8, i4[::1], i8)")
def _add_further(
    block: np.ndarray, capacity: int, state: int, source: np.ndarray, edge: int
) -> None:
    """Give a state the further edges that another one has in a block, from one of them on."""
    while edge >= 0:
        _add_edge(block, capacity, state, source[edge + _TOKEN], source[edge + _TARGET])
        edge = source[edge + _NEXT]


@compiled("i8(i4[::1], i8, i8)")
def _add_state(block: np.ndarray, capacity: int, length: int) -> int:
    state = block[1]
    block[1] += 1
    at = _state_at(capacity, state)
    block[at + _LENGTH], block[at + _LINK] = length, -1
    block[at + _END], block[at + _BEFORE], block[at + _COUNT] = length - 1, -1, 1
    block[at + _FIRST], block[at + _FURTHER] = _NO_TOKEN, -1
    return state


@compiled("void(i4[::1], i8, i4[::1], i8)")
def _start(block: np.ndarray, capacity: int, before: np.ndarray, old_capacity: int) -> None:
    """Make a block, empty or with the automaton of a smaller one."""
    block[HEADER + 17 * capacity :] = -1
    block[:HEADER] = 0
    if old_capacity == 0:
        _add_state(block, capacity, 0)
        return
    block[: HEADER + old_capacity] = before[: HEADER + old_capacity]
    size, to, at = 8 * before[1], _state_at(capacity, 0), _state_at(old_capacity, 0)
    block[to : to + size] = before[at : at + size]
    for state in range(before[1]):
        at = _state_at(capacity, state) + _FURTHER
        edge, block[at] = block[at], -1
        _add_further(block, capacity, state, before, edge)


@compiled("i8(i4[::1], i8, i8, i8, i8, i8)")
def _split(block: np.ndarray, capacity: int, at: int, token: int, whole: int, length: int) -> int:
    """Give the contexts of a state up to a length a state of their own, and return it."""
    part = _add_state(block, capacity, length)
    to, source = _state_at(capacity, part), _state_at(capacity, whole)
    for column in (_LINK, _END, _BEFORE, _COUNT, _FIRST, _FIRST_TARGET):
        block[to + column] = block[source + column]
    block[source + _LINK] = part
    _add_further(block, capacity, part, block, block[source + _FURTHER])
    while at >= 0:
        found = _find_edge(block, capacity, at, token)
        if found < 0 or block[found] != whole:
            break
        block[found] = part
        at = block[_state_at(capacity, at) + _LINK]
    return part


@compiled("void(i4[::1], i8, i8[:])")
def _extend(block: np.ndarray, capacity: int, tokens: np.ndarray) -> None:
    """Append tokens to the text of a block that has room for them."""
    for token in tokens:
        place = block[0]
        block[HEADER + place] = token
        block[0] += 1
        new, at, found = _add_state(block, capacity, place + 1), block[2], -1
        while at >= 0:
            found = _find_edge(block, capacity, at, token)
            if found >= 0:
                break
            _add_edge(block, capacity, at, token, new)
            at = block[_state_at(capacity, at) + _LINK]
        link = 0
        if at >= 0:
            link = block[found]
            length = block[_state_at(capacity, at) + _LENGTH] + 1
            if block[_state_at(capacity, link) + _LENGTH] != length:
                link = _split(block, capacity, at, token, link, length)
        block[_state_at(capacity, new) + _LINK] = link
        block[2] = new
        for _ in range(MAX_LINKS):
            if link <= 0:
                break
            state = _state_at(capacity, link)
            block[state + _BEFORE] = block[state + _END]
            block[state + _END] = place
            block[state + _COUNT] += 1
            link = block[state + _LINK]


@compiled("i8[::1](i4[::1], i8[:, :], i8[:, :], i8[:])")
def _extend_all(
    ints: np.ndarray, blocks: np.ndarray, tokens: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Append tokens to the texts that there are; return the rows whose blocks have no room."""
    full, num_full = np.empty(len(blocks), np.int64), 0
    for row in range(len(blocks)):
        base, capacity = blocks[row]
        if base >= 0 and ints[base] + counts[row] <= capacity:
            _extend(ints[base:], capacity, tokens[row, : counts[row]])
        elif base >= 0:
            full[num_full] = row
            num_full += 1
    return full[:num_full]


@compiled("Tuple((i8, i8))(i4[::1], i8)")
def longest_match(block: np.ndarray, capacity: int) -> tuple[int, int]:
    """Return state and length of the longest end of the text that occurred before; 0, 0 for none.

    Args:
        block: [n] int32, `SuffixIndex.ints` from the first int of a request's block; also below.
        capacity: of the block; also below.
    """
    if block[0] == 0:
        return 0, 0
    state = block[_state_at(capacity, block[2]) + _LINK]
    return state, block[_state_at(capacity, state) + _LENGTH]


@compiled("Tuple((i8, i8))(i4[::1], i8, i8, i8, i8)")
def descend(
    block: np.ndarray, capacity: int, state: int, length: int, token: int
) -> tuple[int, int]:
    """Return state and length of the longest known end of a context and one more token.

    Args:
        state, length: of the context, as of `longest_match`.
    """
    found = _find_edge(block, capacity, state, token)
    if found < 0 and _find_edge(block, capacity, 0, token) < 0:
        return 0, 0  # as of most tokens that a draft proposes: they were never said
    while found < 0:
        state = block[_state_at(capacity, state) + _LINK]
        length = block[_state_at(capacity, state) + _LENGTH]
        found = _find_edge(block, capacity, state, token)
    return block[found], length + 1


@compiled("Tuple((i8, i8, i8, i8, i8))(i4[::1], i8, i8, i8)")
def copy_of(
    block: np.ndarray, capacity: int, state: int, length: int
) -> tuple[int, int, int, int, int]:
    """Return what followed a context the last time, and how sure that is.

    Where a context ended at the very end of the text alone, or before `BETWEEN`, nothing is known
    to follow it, and a shorter one takes its place.

    Args:
        state, length: of the context, as of `longest_match`.

    Returns:
        token, -1 for none; the length of the context that it followed; the state of that context
        and the token; how often the context was followed by anything, and by this token.
    """
    last = block[0] - 1
    while state > 0:
        at = _state_at(capacity, state)
        end, count = block[at + _END], block[at + _COUNT]
        if end == last or block[HEADER + end + 1] == BETWEEN:
            end, count = block[at + _BEFORE], count - 1
        if end >= 0 and block[HEADER + end + 1] != BETWEEN:
            token = block[HEADER + end + 1]
            found = block[_find_edge(block, capacity, state, token)]
            same = block[_state_at(capacity, found) + _COUNT]
            return token, length, found, max(count, same), same
        state = block[at + _LINK]
        length = block[_state_at(capacity, state) + _LENGTH]
    return -1, 0, 0, 0, 0
