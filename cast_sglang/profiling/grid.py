"""Grid: the shapes that a profile measures at first, and the intervals that it may halve later."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits
from cast_sglang.profiling.journal import Point

__all__ = ["AXES", "Axes", "Grid", "Interval", "default_grid", "log_uniform", "spread"]

AXES = ("batch_size", "context", "num_tokens")


class Grid(NamedTuple):
    """Axes of the tables before refinement, each ascending."""

    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    token_counts: dict[str, tuple[int, ...]]  # by the name of each pass that is run


class Axes(NamedTuple):
    """The grid of one table, to which refinement adds values."""

    batch_size: list[int]
    context: list[int]
    num_tokens: list[int]


def default_grid(limits: Limits, quick: bool = False) -> Grid:
    """Return the grid for a device: half octaves, or powers of four if `quick`.

    Contexts are 128 times powers of four (of 64 if `quick`), as attention is linear in them. The
    longest one leaves room for the verified rows. If the cache cannot hold it, the longest one that
    the cache holds for a single request is measured too, to extrapolate from.
    """
    longest = limits.longest_context
    contexts = {*_powers(min(128, longest), longest, 64 if quick else 4)}
    if limits.max_tokens is not None:
        held = limits.max_tokens - max(map(limits.most, limits.passes))
        held -= held % CONTEXT_BUCKET_TOKENS
        if min(contexts) < held < longest:
            contexts.add(held)
    axis = _powers_of_four if quick else _half_octaves
    return Grid(
        batch_sizes=axis(limits.max_batch_size),
        contexts=tuple(sorted(contexts)),
        # The draft is small beside the target, so both ends and a middle suffice.
        token_counts={
            each.name: (axis if each.model == "target" else _powers_of_four)(limits.most(each))
            for each in limits.passes
        },
    )


class Interval(NamedTuple):
    """Two neighbouring values of an axis of a table."""

    operation: str
    axis: str  # of AXES
    low: int
    high: int

    @property
    def middle(self) -> list[int]:
        """Return the values to add when the interval is split; none if there are none between.

        Costs step up after multiples of a tile. The midpoint of two token counts is often such a
        multiple and then lies on the line, but its successor does not.
        """
        middle = (self.low + self.high) // 2
        values = [middle]
        if self.axis == "num_tokens":
            values.append(middle + 1)
        elif self.axis == "context" and middle > CONTEXT_BUCKET_TOKENS:
            values = [middle - middle % CONTEXT_BUCKET_TOKENS]
        return [value for value in values if self.low < value < self.high]

    def split(self) -> "list[Interval]":
        """Return the intervals between low, middle and high."""
        edges = pairwise([self.low, *self.middle, self.high])
        return [self._replace(low=low, high=high) for low, high in edges]

    def ends(self, point: Point) -> tuple[Point, Point, float]:
        """Return the points at both ends, and where the given one lies between them, 0 to 1."""
        value = getattr(point, self.axis)
        low, high = (self._at(point, end) for end in (self.low, self.high))
        return low, high, (value - self.low) / (self.high - self.low)

    def _at(self, point: Point, value: int) -> Point:
        return Point(**{**point._asdict(), self.axis: value})


def spread(items: Sequence[int], num_items: int) -> list[int]:
    """Return evenly spaced items, the first and the last among them."""
    last = len(items) - 1
    picked = {round(i * last / max(num_items - 1, 1)) for i in range(num_items)}
    return [items[i] for i in sorted(picked)]


def log_uniform(rng: random.Random, axis: Sequence[int]) -> int:
    """Draw from the range of an ascending axis, equally often from each octave."""
    return round(math.exp(rng.uniform(math.log(axis[0]), math.log(axis[-1]))))


def _half_octaves(last: int) -> tuple[int, ...]:
    """Return 1, 2, 3, 4, 6, 8, 12, ... below `last`, then `last`."""
    values = {1, last}
    for power in range(1, last.bit_length()):
        values.update(value for value in (1 << power, 3 << power >> 1) if value < last)
    return tuple(sorted(values))


def _powers_of_four(last: int) -> tuple[int, ...]:
    return _powers(1, last, 4)


def _powers(first: int, last: int, base: int) -> tuple[int, ...]:
    """Return first, first * base, ... below `last`, then `last`."""
    values = [first]
    while values[-1] * base < last:
        values.append(values[-1] * base)
    return tuple(values) if values[-1] == last else (*values, last)
