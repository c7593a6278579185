"""Discrete-event simulation of decoding steps: one host thread, one stream of one device.

The host goes through a program in order. What it launches the device runs in the order of
launching, each piece when the one before is done and the launch has arrived. A read is a small copy
to the host behind everything launched before it; only `Wait` makes the host wait for one.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Launch", "Op", "Read", "Span", "Timeline", "Wait", "Work", "simulate"]

HOST, DEVICE = "host", "device"


class Work(NamedTuple):
    """The host computes."""

    name: str
    us: float


class Launch(NamedTuple):
    """The host launches what the device then runs: a graph, or `count` equal kernels in a row."""

    name: str
    host_us: float  # of all of them, as is
    device_us: float
    kind: str = "pass"  # of the span on the device
    count: int = 1


class Read(NamedTuple):
    """The host launches a small copy from the device, which takes no time of the stream."""

    name: str
    host_us: float


class Wait(NamedTuple):
    """The host waits until the read of this name has arrived."""

    name: str


Op = Work | Launch | Read | Wait


class Span(NamedTuple):
    """What host or device did for a while."""

    track: str  # host | device
    kind: str  # host: launch, work, wait; device: pass, surplus, policy
    name: str
    begin_us: float
    end_us: float

    @property
    def us(self) -> float:
        return self.end_us - self.begin_us


@dataclasses.dataclass(frozen=True)
class Timeline:
    """All spans, in the order in which they were programmed; nothing of length 0."""

    spans: Sequence[Span]

    def cut(self, begin_us: float, end_us: float) -> "Timeline":
        """Return what lies between two moments."""
        kept = [
            span._replace(begin_us=max(span.begin_us, begin_us), end_us=min(span.end_us, end_us))
            for span in self.spans
            if span.begin_us < end_us and span.end_us > begin_us
        ]
        return Timeline(kept)

    def total_us(self, track: str, kind: str | None = None) -> float:
        """Return the time a track spent, on spans of one kind or of any."""
        return sum(s.us for s in self.spans if s.track == track and kind in (None, s.kind))


def simulate(program: Sequence[Op], read_us: float, launch_latency_us: float = 0.0) -> Timeline:
    """Run a program.

    Definition: a kernel is submitted at the end of its share of `host_us` and begins on the device
    at max(end of the piece before, submission + launch_latency_us). A read arrives read_us after
    the end of the last piece launched before it, or after its own submission if that is later.

    Args:
        read_us: from the end of the device's work to the value on the host.
        launch_latency_us: from a submission to the begin on an idle device.

    Raises:
        ValueError: a negative time, or a wait for what is not read before it.
    """
    host_us = device_us = 0.0
    arrivals: dict[str, float] = {}
    spans: list[Span] = []

    def put(track: str, kind: str, name: str, begin_us: float, end_us: float) -> None:
        if end_us < begin_us:
            raise ValueError(f"{name}: {end_us - begin_us:g} us is no duration")
        if end_us > begin_us:
            spans.append(Span(track, kind, name, begin_us, end_us))

    for op in program:
        began = host_us
        match op:
            case Work():
                host_us += op.us
                put(HOST, "work", op.name, began, host_us)
            case Launch():
                for _ in range(op.count):
                    host_us += op.host_us / op.count
                    start = max(device_us, host_us + launch_latency_us)
                    device_us = start + op.device_us / op.count
                    put(DEVICE, op.kind, op.name, start, device_us)
                put(HOST, "launch", op.name, began, host_us)
            case Read():
                host_us += op.host_us
                put(HOST, "launch", op.name, began, host_us)
                arrivals[op.name] = max(device_us, host_us) + read_us
            case Wait():
                if op.name not in arrivals:
                    raise ValueError(f"{op.name} is waited for, but not read before")
                host_us = max(host_us, arrivals[op.name])
                put(HOST, "wait", op.name, began, host_us)
    return Timeline(spans)
