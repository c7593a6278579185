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

    header          tokens, states, edges so far, the last state
    text            [capacity]
    states          [2 * capacity, 6]: length, link, last end, end before that, count, first edge
    edges           [3 * capacity, 5]: state, token, target, next edge of the state, of the bucket
    buckets         [2 * capacity]: first edge of each bucket of a hash table

which is 120 bytes for each token of its capacity, a power of two. An automaton has at most two
states and three edges for each token. `reference.Text` is the same in plain Python.
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

HEADER = 4  # tokens, states, edges so far, the last state
_TEXT_COLUMNS, _STATE_COLUMNS, _EDGE_COLUMNS, _BUCKETS = 1, 2 * 6, 3 * 5, 2
_INTS_PER_TOKEN = _TEXT_COLUMNS + _STATE_COLUMNS + _EDGE_COLUMNS + _BUCKETS
# So that a short text does not grow its block every few steps; other sizes were not measured.
_LEAST_CAPACITY = 64
# Of a state, and of an edge.
_LENGTH, _LINK, _END, _BEFORE, _COUNT, _FIRST_EDGE = range(6)
_FROM, _TOKEN, _TARGET, _NEXT, _NEXT_IN_BUCKET = range(5)


class SuffixIndex:
    """The automata of all running requests.

    Args:
        max_tokens: capacity of all blocks together, in tokens; a request beyond gets none.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_ints = max_tokens * _INTS_PER_TOKEN
        self._ints = np.empty(0, np.int32)
        self._used = 0  # ints before the first that is free
        # By request: first int and capacity of its block.
        self._blocks: dict[Hashable, tuple[int, int]] = {}

    @property
    def ints(self) -> np.ndarray:
        """[n] int32, what `longest_match` and the others take; another array after `add`."""
        return self._ints

    @property
    def num_bytes(self) -> int:
        """Memory that the automata hold."""
        return self._ints.nbytes

    def __contains__(self, request: Hashable) -> bool:
        return request in self._blocks

    def num_tokens(self, request: Hashable) -> int:
        """Return the tokens of a request's text; 0 for one without a block."""
        return int(self.sizes(self.blocks([request]))[0])

    def capacity(self, request: Hashable) -> int:
        """Return how many tokens a request's block has room for."""
        return self._blocks.get(request, NO_BLOCK)[1]

    def text(self, request: Hashable, first: int = 0) -> np.ndarray:
        """Return [n] int64, the tokens of a request's text from the given one on."""
        at, size = self._blocks.get(request, NO_BLOCK)[0] + HEADER, self.num_tokens(request)
        return self._ints[at + first : at + size].astype(np.int64)

    def sizes(self, blocks: np.ndarray) -> np.ndarray:
        """Return [B] int, the tokens of the texts in blocks [B, 2]; 0 where there is none."""
        bases = blocks[:, 0]
        if not len(self._ints):
            return np.zeros(len(bases), np.int32)
        return np.where(bases < 0, 0, self._ints[np.maximum(bases, 0)])

    def last_tokens(self, blocks: np.ndarray) -> np.ndarray:
        """Return [B] int, the last token of the texts in blocks [B, 2]; -1 where there is none."""
        sizes = self.sizes(blocks)
        if not len(self._ints):
            return np.full(len(sizes), -1, np.int32)
        last = np.maximum(blocks[:, 0] + HEADER + sizes - 1, 0)
        return np.where(sizes == 0, -1, self._ints[last])

    def blocks(self, requests: Sequence[Hashable]) -> np.ndarray:
        """Return [B, 2] int64, first int and capacity of each block; `NO_BLOCK` for none."""
        return np.array([self._blocks.get(request, NO_BLOCK) for request in requests], np.int64)

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
            if not self._make_room(_size(wanted)):
                return False
            base = self._used
            self._used += _size(wanted)
            self._blocks[request] = base, wanted
            _start(self._ints[base : self._used], wanted, before, capacity)
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
        fits = np.zeros(len(requests), np.bool_)
        _extend_all(self._ints, self.blocks(requests), tokens, counts, fits)
        for row in np.flatnonzero(~fits).tolist():
            if requests[row] in self._blocks:
                self.add(requests[row], tokens[row, : counts[row]])

    def drop(self, request: Hashable) -> None:
        """Forget a request's text; its memory serves others."""
        self._blocks.pop(request, None)

    def keep(self, requests: Sequence[Hashable]) -> None:
        """Forget all other requests."""
        for request in self._blocks.keys() - set(requests):
            del self._blocks[request]

    def _make_room(self, size: int) -> bool:
        """Make sure that `size` ints are free behind the used ones."""
        if self._used + size <= len(self._ints):
            return True
        live = sum(_size(capacity) for _, capacity in self._blocks.values())
        if live + size > self._max_ints:
            return False
        # Twice of what is needed, so that copying takes constant time a token.
        ints = np.empty(min(self._max_ints, 2 * (live + size)), np.int32)
        self._used = 0
        for request, (base, capacity) in self._blocks.items():
            end = self._used + _size(capacity)
            ints[self._used : end] = self._ints[base : base + _size(capacity)]
            self._blocks[request], self._used = (self._used, capacity), end
        self._ints = ints
        return True


def _size(capacity: int) -> int:
    return HEADER + _INTS_PER_TOKEN * capacity if capacity else 0


@compiled("i8(i8, i8)")
def _state_at(capacity: int, state: int) -> int:
    return HEADER + capacity + 6 * state


@compiled("i8(i8, i8)")
def _edge_at(capacity: int, edge: int) -> int:
    return HEADER + 13 * capacity + 5 * edge


@compiled("i8(i8, i8, i8)")
def _bucket_at(capacity: int, state: int, token: int) -> int:
    # Multiplicative hashing: Knuth, "The Art of Computer Programming" 3, section 6.4.
    key = (int(state) * 0x9E3779B1 + int(token)) * 0x9E3779B1
    return HEADER + 28 * capacity + ((key >> 16) & (2 * capacity - 1))


@compiled("i8(i4[::1], i8, i8, i8)")
def _find_edge(block: np.ndarray, capacity: int, state: int, token: int) -> int:
    """Return where the edge of a state by a token stands in the block, -1 for none."""
    edge = block[_bucket_at(capacity, state, token)]
    while edge >= 0:
        at = _edge_at(capacity, edge)
        if block[at + _FROM] == state and block[at + _TOKEN] == token:
            return at
        edge = block[at + _NEXT_IN_BUCKET]
    return -1


@compiled("void(i4[::1], i8, i8)")
def _hash_edge(block: np.ndarray, capacity: int, edge: int) -> None:
    at = _edge_at(capacity, edge)
    bucket = _bucket_at(capacity, block[at + _FROM], block[at + _TOKEN])
    block[at + _NEXT_IN_BUCKET] = block[bucket]
    block[bucket] = edge


@compiled("void(i4[::1], i8, i8, i8, i8)")
def _add_edge(block: np.ndarray, capacity: int, state: int, token: int, target: int) -> None:
    edge = block[2]
    block[2] += 1
    at, first = _edge_at(capacity, edge), _state_at(capacity, state) + _FIRST_EDGE
    block[at + _FROM], block[at + _TOKEN], block[at + _TARGET] = state, token, target
    block[at + _NEXT] = block[first]
    block[first] = edge
    _hash_edge(block, capacity, edge)


@compiled("i8(i4[::1], i8, i8)")
def _add_state(block: np.ndarray, capacity: int, length: int) -> int:
    state = block[1]
    block[1] += 1
    at = _state_at(capacity, state)
    block[at + _LENGTH], block[at + _LINK] = length, -1
    block[at + _END], block[at + _BEFORE], block[at + _COUNT] = length - 1, -1, 1
    block[at + _FIRST_EDGE] = -1
    return state


@compiled("void(i4[::1], i8, i4[::1], i8)")
def _start(block: np.ndarray, capacity: int, before: np.ndarray, old_capacity: int) -> None:
    """Make a block, empty or with the automaton of a smaller one."""
    block[HEADER + 28 * capacity :] = -1
    block[:HEADER] = 0
    if old_capacity == 0:
        _add_state(block, capacity, 0)
        return
    block[:HEADER] = before[:HEADER]
    num_tokens, num_states, num_edges = before[0], before[1], before[2]
    block[HEADER : HEADER + num_tokens] = before[HEADER : HEADER + num_tokens]
    to, at = _state_at(capacity, 0), _state_at(old_capacity, 0)
    block[to : to + 6 * num_states] = before[at : at + 6 * num_states]
    to, at = _edge_at(capacity, 0), _edge_at(old_capacity, 0)
    block[to : to + 5 * num_edges] = before[at : at + 5 * num_edges]
    for edge in range(num_edges):
        _hash_edge(block, capacity, edge)


@compiled("i8(i4[::1], i8, i8, i8, i8, i8)")
def _split(block: np.ndarray, capacity: int, at: int, token: int, whole: int, length: int) -> int:
    """Give the contexts of a state up to a length a state of their own, and return it."""
    part = _add_state(block, capacity, length)
    to, source = _state_at(capacity, part), _state_at(capacity, whole)
    for column in (_LINK, _END, _BEFORE, _COUNT):
        block[to + column] = block[source + column]
    block[source + _LINK] = part
    edge = block[source + _FIRST_EDGE]
    while edge >= 0:
        old = _edge_at(capacity, edge)
        _add_edge(block, capacity, part, block[old + _TOKEN], block[old + _TARGET])
        edge = block[old + _NEXT]
    while at >= 0:
        found = _find_edge(block, capacity, at, token)
        if found < 0 or block[found + _TARGET] != whole:
            break
        block[found + _TARGET] = part
        at = block[_state_at(capacity, at) + _LINK]
    return part


@compiled("void(i4[::1], i8, i8[:])")
def _extend(block: np.ndarray, capacity: int, tokens: np.ndarray) -> None:
    """Append tokens to the text of a block that has room for them."""
    for token in tokens:
        place = block[0]
        block[HEADER + place] = token
        block[0] += 1
        new, at = _add_state(block, capacity, place + 1), block[3]
        while at >= 0 and _find_edge(block, capacity, at, token) < 0:
            _add_edge(block, capacity, at, token, new)
            at = block[_state_at(capacity, at) + _LINK]
        link = 0
        if at >= 0:
            link = block[_find_edge(block, capacity, at, token) + _TARGET]
            length = block[_state_at(capacity, at) + _LENGTH] + 1
            if block[_state_at(capacity, link) + _LENGTH] != length:
                link = _split(block, capacity, at, token, link, length)
        block[_state_at(capacity, new) + _LINK] = link
        block[3] = new
        for _ in range(MAX_LINKS):
            if link <= 0:
                break
            state = _state_at(capacity, link)
            block[state + _BEFORE] = block[state + _END]
            block[state + _END] = place
            block[state + _COUNT] += 1
            link = block[state + _LINK]


@compiled("void(i4[::1], i8[:, :], i8[:, :], i8[:], b1[:])")
def _extend_all(
    ints: np.ndarray, blocks: np.ndarray, tokens: np.ndarray, counts: np.ndarray, fits: np.ndarray
) -> None:
    """Append tokens to the texts of those blocks that have room for them, and mark these."""
    for row in range(len(blocks)):
        base, capacity = blocks[row]
        if base >= 0 and ints[base] + counts[row] <= capacity:
            _extend(ints[base:], capacity, tokens[row, : counts[row]])
            fits[row] = True


@compiled("Tuple((i8, i8))(i4[::1], i8)")
def longest_match(block: np.ndarray, capacity: int) -> tuple[int, int]:
    """Return state and length of the longest end of the text that occurred before; 0, 0 for none.

    Args:
        block: [n] int32, `SuffixIndex.ints` from the first int of a request's block; also below.
        capacity: of the block; also below.
    """
    if block[0] == 0:
        return 0, 0
    state = block[_state_at(capacity, block[3]) + _LINK]
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
    while found < 0 and state > 0:
        state = block[_state_at(capacity, state) + _LINK]
        length = block[_state_at(capacity, state) + _LENGTH]
        found = _find_edge(block, capacity, state, token)
    if found < 0:
        return 0, 0
    return block[found + _TARGET], length + 1


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
            found = block[_find_edge(block, capacity, state, token) + _TARGET]
            same = block[_state_at(capacity, found) + _COUNT]
            return token, length, found, max(count, same), same
        state = block[at + _LINK]
        length = block[_state_at(capacity, state) + _LENGTH]
    return -1, 0, 0, 0, 0
