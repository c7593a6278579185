"""Meter: the timings that profiling asks of an engine; Sampling: how often it asks."""

import dataclasses
from typing import Protocol, Self

from cast_sglang.costs.limits import Limits

__all__ = ["Meter", "Sampling"]


class Meter(Protocol):
    """Runs one forward pass of a given shape and returns its time in seconds.

    `context` is the number of tokens that each request holds before the pass. A call may set up its
    batch outside of the timed part.
    """

    def limits(self) -> Limits:
        """Return the largest shapes that the engine can run."""

    def verify(self, batch_size: int, context: int, rows: int) -> float:
        """Time one target pass over `rows` tree rows per request."""

    def draft(self, batch_size: int, context: int, width: int) -> float:
        """Time one draft layer over `width` nodes per request."""

    def draft_extend(self, batch_size: int, context: int, rows: int) -> float:
        """Time the draft model's pass over `rows` verified rows per request."""

    def step_overhead(self, batch_size: int) -> float | None:
        """Time a step outside of its passes; None if the engine cannot measure it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How often and how precisely to time each point.

    A visit consists of one untimed pass (`warmup` of them at the first visit) and up to
    `visit_passes` timed ones. A point is done when the 95 % confidence interval of the median of
    its visits has a half-width below `tolerance` of the median, or after `max_visits`.
    """

    warmup: int = 2
    visit_passes: int = 3
    min_visits: int = 3
    max_visits: int = 16
    tolerance: float = 0.02
    max_drift: float = 0.25  # a visit during which the references change by more does not count
    interpolation_tolerance: float = 0.03  # an interval with a larger relative error is halved
    heldout_points: int = 16
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """Return settings for a first look."""
        return cls(max_visits=6, tolerance=0.05, interpolation_tolerance=0.1, heldout_points=9)
