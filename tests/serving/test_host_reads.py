"""Reads of a step: copies behind what they read, waited for one by one, kept for two steps."""

import pytest
import torch

from cast_sglang.serving import host_reads
from cast_sglang.serving.host_reads import HostReads


class FakeDevice:
    """Records events; the copies themselves are made at once, as on any host."""

    def __init__(self, log):
        self.log = log

    def Event(self):
        log, number = self.log, sum(entry.startswith("new") for entry in self.log)
        log.append(f"new {number}")

        class Event:
            def record(self):
                log.append(f"record {number}")

            def synchronize(self):
                log.append(f"wait {number}")

        return Event()


@pytest.fixture
def log(monkeypatch):
    log = []
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeDevice(log))
    monkeypatch.setattr(
        host_reads, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8).fill_(255)
    )
    return log


def test_on_the_cpu_nothing_is_copied():
    reads, x = HostReads("cpu"), torch.rand(3)
    reads.begin_step()
    assert reads.start(x).wait()[0] is x


def test_a_read_waits_for_its_own_copy_once(log):
    reads = HostReads("cuda")
    reads.begin_step()
    first, second = torch.rand(2, 3), torch.arange(5)[::2]
    one = reads.start(first, second)
    two = reads.start(torch.ones(1))
    assert log == ["new 0", "record 0", "new 1", "record 1"]
    assert torch.equal(two.wait()[0], torch.ones(1))
    copies = one.wait()
    assert torch.equal(copies[0], first) and torch.equal(copies[1], second)
    assert one.wait() is copies
    assert log[4:] == ["wait 1", "wait 0"]


def test_memory_and_events_are_used_again_after_two_steps(log):
    reads = HostReads("cuda")
    kept = []
    for step in range(6):
        reads.begin_step()
        kept.append(reads.start(torch.full((7,), step), torch.full((1000, 30), float(step))))
        # The step before this one can still be read: calibration does.
        for age, read in enumerate(reversed(kept[-2:])):
            small, large = read.wait()
            assert (small == step - age).all() and (large == step - age).all()
    assert sum(entry.startswith("new") for entry in log) == 2
    places = {read.wait()[1].data_ptr() for read in kept}
    assert len(places) == 2


def test_a_step_may_read_more_than_fits_at_first(log):
    reads = HostReads("cuda")
    reads.begin_step()
    parts = [torch.rand(host_reads._FIRST_BYTES // 8) for _ in range(5)]
    parts.append(torch.rand(host_reads._FIRST_BYTES))
    read = reads.start(*parts)
    for part, copy in zip(parts, read.wait(), strict=True):
        assert torch.equal(part, copy)
