"""What a profiler trace of a server says about the time of the policy."""

import gzip
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class TraceTimes(NamedTuple):
    """Times of a trace in microseconds."""

    span_us: float  # from the begin of the first event on the device to the end of the last
    busy_us: float  # at least one kernel runs
    policy_us: float  # of the policy's kernels
    num_policy_kernels: int
    num_kernels: int

    @property
    def policy_share(self) -> float | None:
        """The policy's part of the span; None where the device did nothing."""
        return self.policy_us / self.span_us if self.span_us else None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a Chrome trace, gzipped or not."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as file:
        return list(json.load(file)["traceEvents"])


def device_times(
    events: Iterable[Mapping[str, Any]], policy_kernels: Collection[str]
) -> TraceTimes:
    """Sum up the kernels of a trace.

    Args:
        events: of a torch profiler; those of category `kernel` ran on the device.
        policy_kernels: names of the policy's kernels, as they are or followed by what a compiler
            adds.
    """
    kernels = [
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("cat") == "kernel" and "dur" in event
    ]
    kernels.sort()
    busy_us, busy_until = 0.0, float("-inf")
    for begin, duration, _ in kernels:
        end = begin + duration
        busy_us += max(0.0, end - max(begin, busy_until))
        busy_until = max(busy_until, end)
    policy = [duration for _, duration, name in kernels if name.startswith(tuple(policy_kernels))]
    span_us = busy_until - kernels[0][0] if kernels else 0.0
    return TraceTimes(span_us, busy_us, sum(policy), len(policy), len(kernels))
