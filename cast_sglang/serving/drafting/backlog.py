"""Backlog: what the draft model has not seen yet, because the server decoded plainly.

A plain step that extended the draft by one token would pay for a whole pass of it. So the target's
hidden states are kept instead, and the draft takes them in one pass when it is needed again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cast_sglang.ops.copies import to_device

__all__ = ["Backlog", "MissingRows"]


class MissingRows(NamedTuple):
    """The rows that the draft lacks, oldest first, laid out with the same number W per request.

    Only the first `num_rows` rows of a request count, the others hold arbitrary valid content. The
    pass runs at least one row of every request, so one whose draft is up to date has one of these.
    """

    num_rows: np.ndarray  # [B] int64, rows of each request, at least 1
    is_missing: np.ndarray  # [B] bool, False for a request whose draft is up to date
    hidden_states: torch.Tensor  # [B * W, H], of the target
    tokens: torch.Tensor  # [B * W] int64, each the token that follows its row


class Backlog:
    """The last rows of each running request that the draft has not been extended by.

    Of more than `capacity` rows the oldest are lost: the draft then misses their keys and values,
    which costs acceptance and no correctness.

    Requests are known by their slots, [B] int64 on the host: rows of SGLang's request pool.

    Args:
        num_slots: size of the request pool.
        capacity: rows kept per request.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.capacity = capacity
        self._num_slots = num_slots
        self._missing = np.zeros(num_slots, dtype=np.int64)
        self._is_empty = True  # as mostly; looking at each request takes longer
        self._next = np.zeros(num_slots, dtype=np.int64)  # place in the ring
        self._hidden_states: torch.Tensor | None = None  # [slots, capacity, H], a ring per request
        self._tokens: torch.Tensor | None = None

    def num_missing(self, slots: np.ndarray) -> int:
        """Return the most rows that any of the requests lacks."""
        return 0 if self._is_empty else int(self._missing[slots].max(initial=0))

    def forget(self, slots: np.ndarray) -> None:
        """Drop the rows of requests whose draft has just been brought up to date."""
        self._missing[slots] = 0
        self._is_empty = self._is_empty or not self._missing.any()

    def clear(self) -> None:
        """Drop the rows of all requests."""
        self._missing[:] = 0
        self._is_empty = True

    def add(self, slots: np.ndarray, hidden_states: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep one more row of each request.

        Args:
            hidden_states: [B, H], of the target.
            tokens: [B] int, the tokens that follow.
        """
        if self._hidden_states is None or self._tokens is None:
            shape = (self._num_slots, self.capacity)
            # Rows that were never written are run too, so they must hold a valid token.
            self._hidden_states = hidden_states.new_zeros(*shape, hidden_states.shape[1])
            self._tokens = tokens.new_zeros(shape, dtype=torch.int64)
        place = to_device(slots * self.capacity + self._next[slots], hidden_states.device)
        self._hidden_states.flatten(0, 1).index_copy_(0, place, hidden_states)
        self._tokens.flatten().index_copy_(0, place, tokens.to(torch.int64))
        self._next[slots] = (self._next[slots] + 1) % self.capacity
        self._missing[slots] = np.minimum(self._missing[slots] + 1, self.capacity)
        self._is_empty = False

    def take(self, slots: np.ndarray, width: int | None = None) -> MissingRows:
        """Return the requests' rows and drop them; some must lack one.

        Args:
            width: W, at least what any of them lacks and at most the capacity; None for as many
                as that.
        """
        assert self._hidden_states is not None and self._tokens is not None
        missing = self._missing[slots]
        self.forget(slots)
        first = self._next[slots] - missing
        offsets = np.arange(int(missing.max()) if width is None else width)
        places = (first[:, None] + offsets) % self.capacity
        index = np.stack((np.broadcast_to(slots[:, None], places.shape), places))
        rows, columns = to_device(index, self._tokens.device)
        return MissingRows(
            num_rows=np.maximum(missing, 1),
            is_missing=missing > 0,
            hidden_states=self._hidden_states[rows, columns].flatten(0, 1),
            tokens=self._tokens[rows, columns].flatten(),
        )
