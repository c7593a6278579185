"""Arms in turns, round after round, and the ratios of speeds that rounds give."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import httpx
import numpy as np

from benchmarks.harness.arms import Arm
from benchmarks.harness.servers import ServerError

# What an arm may end with while it is measured; anything else is a mistake of the benchmark.
FAILURES = (ServerError, ValueError, httpx.HTTPError)
CONFIDENCE = 0.95
# Servers of the same settings differ by up to 5 % (docs/results.md). Ends that are no further apart
# say as much as one start of the servers can.
SETTLED_WIDTH = 0.05
DRAWS = 2000  # of prompts; the ends of a range are then known to about a tenth of its width

T = TypeVar("T")
OnFailure = Callable[[Arm, Exception], None]


class Ratio(NamedTuple):
    """A ratio of speeds: its median over rounds, and two ends; None where only the median is."""

    median: float
    low: float | None = None
    high: float | None = None


def rounds(
    arms: Sequence[Arm],
    take: Callable[[Arm, int], T],
    on_failure: OnFailure | None = None,
    first: int = 0,
) -> Iterator[dict[str, T]]:
    """Let every arm take one turn after the other; yield each round's turns by the arm's name.

    There is no last round: the caller stops. What drifts on the machine meets all arms of a round
    nearly alike, so speeds are to be compared within a round.

    Args:
        take: does an arm's turn of the round of this number.
        on_failure: called for an arm that fails, which has no further turn; None to raise.
        first: number of the first round.
    """
    standing = list(arms)
    for number in itertools.count(first):
        turns: dict[str, T] = {}
        # Another order each time, so that no arm always follows the same one.
        for arm in _rotated(standing, number):
            try:
                turns[arm.name] = take(arm, number)
            except FAILURES as error:
                if on_failure is None:
                    raise
                standing.remove(arm)
                on_failure(arm, error)
        yield turns


def quotients(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratio within each round."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def extent(values: Sequence[float]) -> Ratio:
    """Return the median of at least one round with the least and the greatest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return Ratio(round(middle, 4), round(low, 4), round(high, 4))


def interval(values: Sequence[float]) -> Ratio:
    """Return the median of at least one round with the ends of its confidence interval.

    The ends are values of certain ranks: of n rounds, at most k lie below the true median with
    chance P(Binomial(n, 1/2) <= k), whatever their distribution is. So a round in which the machine
    stalled counts as one round and no more. Fewer than six rounds cannot be as sure as
    `CONFIDENCE`; they give the least and the greatest.
    """
    count = len(values)
    chances = itertools.accumulate(math.comb(count, k) / 2**count for k in range(count))
    dropped = max(0, sum(chance <= (1 - CONFIDENCE) / 2 for chance in chances) - 1)
    return extent(values)._replace(
        low=round(sorted(values)[dropped], 4), high=round(sorted(values)[-1 - dropped], 4)
    )


def ratio_of_sums(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    percent: float,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return a quotient of sums over that of others, and the range that holds so many percent.

    The range is that of prompts drawn anew with replacement, the same for both.

    Args:
        ours, theirs: of each prompt dividend and divisor, such as tokens and passes.
    """
    pairs = np.array(ours, dtype=float), np.array(theirs, dtype=float)

    def over(index: np.ndarray) -> np.ndarray:
        mine, other = (each[index].sum(axis=-2) for each in pairs)
        return np.asarray((mine[..., 0] / mine[..., 1]) / (other[..., 0] / other[..., 1]))

    size = len(pairs[0])
    drawn = np.random.default_rng(seed).integers(size, size=(DRAWS, size))
    tail = (100.0 - percent) / 2
    low, high = np.percentile(over(drawn), (tail, 100.0 - tail))
    return float(over(np.arange(size))), float(low), float(high)


def is_sure(num_rounds: int) -> bool:
    """Say whether the ends of an `interval` of so many rounds hold with `CONFIDENCE`."""
    return 2 * 0.5**num_rounds <= 1 - CONFIDENCE


def is_settled(values: Sequence[float]) -> bool:
    """Say whether the ratios of the rounds so far tell as much as further ones could."""
    if not is_sure(len(values)):
        return False
    middle, low, high = interval(values)
    assert low is not None and high is not None
    return high - low <= SETTLED_WIDTH * middle


def _rotated(arms: Sequence[Arm], by: int) -> list[Arm]:
    by %= len(arms) or 1
    return [*arms[by:], *arms[:by]]
