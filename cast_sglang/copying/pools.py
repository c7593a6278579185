"""Pools: what requests that belong together have answered, for all of them to copy from.

A client names a pool in each of its requests, as for several answers to one question, or for one
answer after another. Requests that do not name a pool, or name another one, never see its text.

A pool is one text in the `SuffixIndex` of the requests. Each request of it adds what it has
answered piece by piece, so that those that run together copy from each other. A piece begins with
the end of the one before, so that a match goes on from one to the next, and stands behind what is
no token, so that none goes on from one request to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable

import numpy as np

from cast_sglang.copying.automaton import BETWEEN, SuffixIndex

__all__ = ["Pools", "pool_key"]

# Tokens of an answer that are added at once. A piece costs the overlap besides.
_PIECE, _OVERLAP = 64, 16
# Tokens of the largest pool: sixteen answers of 4,096 tokens. Beyond, the older half is forgotten,
# which takes as long as adding the newer one again.
_MOST_TOKENS = 1 << 16
# A pool takes no more than this share of the room, so that others keep theirs.
_SHARE = 4
_LEAST_CAPACITY = 64  # of a text in the index


def pool_key(name: str) -> Hashable:
    """Return what the index knows a pool by; names may be of any length."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return "pool", digest


class Pools:
    """The texts of pools, the least recently used of which go first.

    Args:
        index: of the requests, with room for `max_tokens` besides theirs.
        max_tokens: capacity of all pools together, in tokens.
    """

    def __init__(self, index: SuffixIndex, max_tokens: int) -> None:
        self._index, self._max_tokens = index, max_tokens
        # Capacities are powers of two.
        share = max(1, max_tokens // _SHARE)
        self._most = min(_MOST_TOKENS, 1 << (share.bit_length() - 1))
        self._known: dict[Hashable, None] = {}  # with a text, the least recently used first
        self._running: dict[Hashable, tuple[Hashable, int]] = {}  # pool; tokens that it has

    @property
    def keys(self) -> list[Hashable]:
        """What the index knows the pools by that have a text."""
        return list(self._known)

    def run(self, requests: Iterable[tuple[Hashable, Hashable | None, int]]) -> None:
        """Note which requests run from now on; those that do not any more add their last tokens.

        Args:
            requests: each with the key of its pool, None for none, and the length of its prompt.
        """
        running = {}
        for request, pool, num_prompt in requests:
            if pool is not None:
                running[request] = self._running.get(request, (pool, num_prompt))
        # In their order: all ranks of a tensor parallel group must come to the same text.
        for request in [request for request in self._running if request not in running]:
            self._add(request, 1)
        self._running = running

    def update(self) -> None:
        """Add the pieces that the running requests have answered since the last call."""
        for request in self._running:
            self._add(request, _PIECE)

    def blocks(self, requests: Iterable[Hashable]) -> np.ndarray | None:
        """Return [B, 2] int64, as `SuffixIndex.blocks`, of each request's pool; None for none."""
        if not self._running:
            return None
        pools = [self._running.get(request, (None, 0))[0] for request in requests]
        for pool in pools:
            self._touch(pool)
        return self._index.blocks(pools)

    def _touch(self, pool: Hashable | None) -> None:
        if pool in self._known:
            del self._known[pool]
            self._known[pool] = None

    def _add(self, request: Hashable, least: int) -> None:
        """Add what a request's text has gained to its pool, if that is so many tokens."""
        pool, known = self._running[request]
        size = self._index.num_tokens(request)
        if size - known < least:
            return
        piece = self._index.text(request, max(0, known - _OVERLAP))
        piece = np.concatenate([[BETWEEN], piece])
        self._running[request] = pool, size
        self._append(pool, piece)

    def _append(self, pool: Hashable, tokens: np.ndarray) -> None:
        """Add tokens to a pool's text; one that gets no room stays as it is."""
        text = self._index.text(pool)
        is_full = len(text) + len(tokens) > self._most
        if is_full:
            tokens = np.concatenate([text[-(self._most // 2) :], tokens])[-self._most :]
        size = max(_LEAST_CAPACITY, len(tokens) + (0 if is_full else len(text)))
        if not self._make_room(pool, 1 << (size - 1).bit_length()):
            return
        if is_full:
            self._index.drop(pool)
        self._known.pop(pool, None)
        if self._index.add(pool, tokens):
            self._known[pool] = None

    def _make_room(self, pool: Hashable, capacity: int) -> bool:
        """Forget other pools, none of which runs, until this one may have so much capacity."""
        in_use = {key for key, _ in self._running.values()}
        idle = [key for key in self._known if key not in in_use and key != pool]
        others = sum(self._index.capacity(key) for key in self._known if key != pool)
        while others + capacity > self._max_tokens:
            if not idle:
                return False
            others -= self._index.capacity(oldest := idle.pop(0))
            self._index.drop(oldest)
            del self._known[oldest]
        return True
