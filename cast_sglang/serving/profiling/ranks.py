"""Measuring under tensor parallelism: rank 0 leads, the others run what it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from cast_sglang.costs.limits import Limits
from cast_sglang.serving.profiling.engine_meter import EngineMeter

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

__all__ = ["lead"]

Result = TypeVar("Result")


def lead(scheduler: Scheduler, run: Callable[[Any], Result]) -> Result | None:
    """Call `run` with a meter on rank 0, while the other ranks run what it runs.

    Args:
        run: what to do with the meter, a `Meter`.

    Returns:
        The result on rank 0, None on the others.

    Effects: the scheduler must be idle; its tables are afterwards as before.
    """
    group = scheduler.tp_group
    meter = EngineMeter(scheduler.draft_worker)
    try:
        if group.world_size == 1:
            return run(meter)
        if group.rank_in_group != 0:
            _follow(meter, group)
            return None
        leader = _LeadingMeter(meter, group)
        try:
            return run(leader)
        finally:
            leader.close()
    finally:
        meter.close()


class _LeadingMeter:
    """Rank 0's meter under tensor parallelism: tells the others what to run before running it."""

    def __init__(self, meter: EngineMeter, group: Any) -> None:
        self._meter, self._group = meter, group

    def limits(self) -> Limits:
        return self._meter.limits()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*args: int) -> Any:
            self._group.broadcast_object((name, args), src=0)
            return getattr(self._meter, name)(*args)

        return run

    def close(self) -> None:
        self._group.broadcast_object(None, src=0)


def _follow(meter: EngineMeter, group: Any) -> None:
    """Run what rank 0 runs until it is done."""
    while (call := group.broadcast_object(None, src=0)) is not None:
        name, args = call
        getattr(meter, name)(*args)
