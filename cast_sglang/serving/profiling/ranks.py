"""Measuring under tensor parallelism: rank 0 decides what to time, and all ranks run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from cast_sglang.costs.limits import Limits
from cast_sglang.serving.profiling.engine_meter import EngineMeter

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

__all__ = ["measure_on_all_ranks"]

Result = TypeVar("Result")


def measure_on_all_ranks(scheduler: Scheduler, run: Callable[[Any], Result]) -> Result | None:
    """Call `run` with a meter on rank 0, while the other ranks repeat each of the meter's calls.

    Args:
        run: measures with the `Meter` that it gets.

    Returns:
        The result on rank 0, None on the others.

    Effects: the scheduler must be idle; afterwards its tables are as before.
    """
    group = scheduler.tp_group
    meter = EngineMeter(scheduler.draft_worker)
    try:
        if group.world_size == 1:
            return run(meter)
        if group.rank_in_group != 0:
            _mirror_calls(meter, group)
            return None
        broadcasting = _BroadcastingMeter(meter, group)
        try:
            return run(broadcasting)
        finally:
            broadcasting.close()
    finally:
        meter.close()


class _BroadcastingMeter:
    """Rank 0's meter, which broadcasts each call to the other ranks before it runs the call."""

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
        """Broadcast that no call follows."""
        self._group.broadcast_object(None, src=0)


def _mirror_calls(meter: EngineMeter, group: Any) -> None:
    """Run each call that rank 0 broadcasts, until it has no more."""
    while (call := group.broadcast_object(None, src=0)) is not None:
        name, args = call
        getattr(meter, name)(*args)
