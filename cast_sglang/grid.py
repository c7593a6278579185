"""Grid: which shapes a profile measures, and where more token counts are needed."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from cast_sglang.cost import CONTEXT_BUCKET_TOKENS
from cast_sglang.metering import Limits

__all__ = ["Grid", "Interval", "default_grid", "log_uniform", "spread"]


class Grid(NamedTuple):
    """Axes of the tables before refinement; each ascending."""

    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    verify_rows: tuple[int, ...]  # also those of draft_extend
    draft_widths: tuple[int, ...]


def default_grid(limits: Limits, quick: bool = False) -> Grid:
    """Choose a grid for a device: powers of two, every second one if `quick`.

    Contexts are powers of four from 128 up; the longest one leaves room for the verified rows.
    """
    step = 4 if quick else 2
    longest = max(limits.max_context - limits.max_verify_rows, 1)
    if longest > CONTEXT_BUCKET_TOKENS:
        # Off a bucket's edge the cost model would round past the last grid point.
        longest -= longest % CONTEXT_BUCKET_TOKENS
    return Grid(
        batch_sizes=_powers(1, limits.max_batch_size, step),
        contexts=_powers(min(128, longest), longest, 2 * step),
        verify_rows=_powers(1, limits.max_verify_rows, step),
        draft_widths=_powers(1, limits.max_width, step),
    )


class Interval(NamedTuple):
    """Two neighbouring token counts of a table."""

    operation: str
    low: int
    high: int

    @property
    def middle(self) -> list[int]:
        """The midpoint and its successor, as far as they lie inside.

        Costs step up after multiples of a tile. The midpoint alone, often such a multiple, may well
        be on the line; then its successor is not.
        """
        middle = (self.low + self.high) // 2
        return [count for count in (middle, middle + 1) if self.low < count < self.high]

    def split(self) -> "list[Interval]":
        """Return the intervals that are left when the middle is added."""
        edges = pairwise([self.low, *self.middle, self.high])
        return [Interval(self.operation, low, high) for low, high in edges]


def spread(items: Sequence[tuple[int, int]], num_items: int) -> list[tuple[int, int]]:
    """Pick evenly spaced items, first and last included."""
    last = len(items) - 1
    picked = {round(i * last / max(num_items - 1, 1)) for i in range(num_items)}
    return [items[i] for i in sorted(picked)]


def log_uniform(rng: random.Random, axis: Sequence[int]) -> int:
    """Draw from the range of an ascending axis, each octave as often as the next."""
    return round(math.exp(rng.uniform(math.log(axis[0]), math.log(axis[-1]))))


def _powers(first: int, last: int, base: int) -> tuple[int, ...]:
    """Return first, first * base, ... below `last`, then `last`."""
    values = [first]
    while values[-1] * base < last:
        values.append(values[-1] * base)
    return tuple(values) if values[-1] == last else (*values, last)
