"""Which sizes of a pass are worth a captured graph, at each batch size.

A captured graph serves one number of rows per request. With one for every number a server would
spend minutes at start-up on graphs that it never replays: costs are staircases, and where the next
step up is far away, a few more rows are free. What a row more brings is never negative, so a size
is of no use where a larger one costs no more, whatever the price; and of next to none where a
larger one costs next to nothing more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = ["SLACK", "GraphSizes", "kept_sizes", "most_that_pays"]

# What a pass may take more because its size has no graph and a larger one runs in its place.
SLACK = 0.02


def kept_sizes(
    costs: Sequence[float], sizes: Sequence[int], slack: float = SLACK
) -> tuple[int, ...]:
    """Drop sizes in whose place a larger one may run.

    Definition: the fewest sizes such that for each size n there is a kept m >= n with
    cost(m) <= (1 + slack) cost(n)

    With slack 0 they are those that are best at some price, for some nodes: for a size n that costs
    less than every larger one, n nodes worth something before others worth nothing. With more, the
    best kept size loses at most `slack` of a pass against the best of all.

    Args:
        costs: costs[n - 1] > 0 is the time of a pass over n rows per request.
        sizes: ascending sizes that may run; at least one.
    """
    kept: list[int] = []
    for size in reversed(sizes):
        limit = costs[size - 1] * (1.0 + slack)
        if not kept or min(costs[other - 1] for other in kept) > limit:
            kept.append(size)
    return tuple(reversed(kept))


def most_that_pays(costs: np.ndarray, plain: float, depth: int) -> int:
    """Return the most rows per request that can be worth their time, whatever is drafted.

    Definition: the size with the most of bound(n) - costs[n - 1] / plain, where
    bound(n) = sum of min(1, depth / i) for i in 1..n - 1

    Of each layer of a tree one node at most is accepted. So the i-th best node is accepted with a
    chance of depth / i at most, and n rows bring no more than their bound and the root's token. A
    step is worth its time only if it brings more than plain decoding would in it. A larger size
    brings less than that for the rows that it has more.

    Args:
        costs: [N], costs[n - 1] is the time of a pass over n rows per request; never falling.
        plain: time of a plain step, which brings one token.
        depth: D, layers that a tree may have.
    """
    chances = np.minimum(1.0, depth / np.arange(1, len(costs)))
    bound = np.concatenate(([0.0], chances.cumsum()))
    return 1 + int(np.argmax(bound - np.asarray(costs) / plain))


class GraphSizes:
    """The sizes that have a graph, for each captured batch size.

    Args:
        tiers: captured batch size -> ascending sizes, at least one. A batch runs padded to the
            smallest captured batch size that holds it.
    """

    def __init__(self, tiers: Mapping[int, tuple[int, ...]]) -> None:
        self._tiers = dict(sorted(tiers.items()))
        self._batch_sizes = list(self._tiers)

    @classmethod
    def by_cost(
        cls,
        batch_sizes: Sequence[int],
        sizes: Sequence[int],
        costs_of: Callable[[int], Sequence[float]],
        always: Sequence[int] = (),
        most_of: Callable[[int], int] | None = None,
    ) -> GraphSizes:
        """Keep `kept_sizes` of each batch size, and those of `always` that are among the sizes.

        The largest size stays at the largest batch size: others are captured in its buffers.

        Args:
            batch_sizes: to capture, ascending.
            sizes: ascending sizes that may run.
            costs_of: batch size -> costs, as `kept_sizes` takes them.
            most_of: batch size -> the largest size that can pay; None for any.
        """
        tiers = {}
        for batch_size in batch_sizes:
            paying = tuple(sizes)
            if most_of is not None:
                most = most_of(batch_size)
                paying = tuple(size for size in sizes if size <= most) or paying[:1]
            kept = {*kept_sizes(costs_of(batch_size), paying), *(set(always) & set(paying))}
            if batch_size == batch_sizes[-1]:
                kept.update(sizes[-1:])
            tiers[batch_size] = tuple(sorted(kept))
        return cls(tiers)

    @property
    def tiers(self) -> dict[int, list[int]]:
        """Captured batch size -> ascending sizes; what `__init__` takes."""
        return {batch_size: list(sizes) for batch_size, sizes in self._tiers.items()}

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes that have a graph at some batch size, ascending."""
        return tuple(sorted({size for sizes in self._tiers.values() for size in sizes}))

    @property
    def num_graphs(self) -> int:
        return sum(map(len, self._tiers.values()))

    @property
    def all_batch_sizes(self) -> list[int]:
        """The captured batch sizes, ascending."""
        return self._batch_sizes

    def at(self, batch_size: int) -> tuple[int, ...]:
        """Return the sizes that have a graph at a captured batch size."""
        return self._tiers[batch_size]

    def batch_sizes(self, size: int) -> list[int]:
        """Return the batch sizes at which this size has a graph, ascending."""
        return [batch_size for batch_size, sizes in self._tiers.items() if size in sizes]

    def bucket(self, batch_size: int) -> int | None:
        """Return the captured batch size that a batch runs at; None if it is above them all."""
        index = bisect_left(self._batch_sizes, batch_size)
        return self._batch_sizes[index] if index < len(self._batch_sizes) else None

    def fit(self, batch_size: int, size: int, limit: int) -> int | None:
        """Return the size to run in place of `size`: the next with a graph, else the last before.

        Args:
            limit: the largest size there are nodes for.

        Returns:
            A size in 1..limit that has a graph at this batch size; None where there is none.
        """
        bucket = self.bucket(batch_size)
        if bucket is None:
            return None
        sizes = self._tiers[bucket]
        sizes = sizes[: bisect_right(sizes, limit)]
        if not sizes:
            return None
        return sizes[min(bisect_left(sizes, size), len(sizes) - 1)]

    def replayed(self, batch_size: int, size: int) -> int:
        """Return the size of the graph that runs `size` rows; `size` where no graph holds them."""
        fitting = self.fit(batch_size, size, self.sizes[-1])
        return size if fitting is None else max(size, fitting)

    def __str__(self) -> str:
        tiers = (
            f"batch {batch_size}: {','.join(map(str, sizes))}"
            for batch_size, sizes in self._tiers.items()
        )
        return "; ".join(tiers)
