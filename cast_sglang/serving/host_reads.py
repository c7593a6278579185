"""What the host reads of a step: small copies, started early and waited for where they are needed.

A plain `.cpu()` waits for everything on the stream, and the device is then idle until the host
launches something new. Here the copy is enqueued behind what it reads; the host prepares more work
meanwhile, and waits for that copy alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["HostReads", "Read"]

# Bytes of pinned memory for the reads of one step; more is taken when a step needs more.
_FIRST_BYTES = 1 << 18
_ALIGNMENT = 16


class Read:
    """Tensors on their way to the host."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], event: Any = None) -> None:
        self._tensors, self._event = tensors, event

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors on the host, when they are there."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors


class HostReads:
    """Copies of one step after the other, into pinned memory that is used again.

    What a step has read stays valid until the step after the next begins. On the CPU nothing is
    copied: a read returns the tensors it was given.
    """

    def __init__(self, device: torch.device | str) -> None:
        is_cpu = torch.device(device).type == "cpu"
        self._module = None if is_cpu else torch.get_device_module(device)
        self._arenas = [_Arena(), _Arena()]

    def begin_step(self) -> None:
        """Reuse the memory of what the step before the last one read."""
        self._arenas.reverse()
        self._arenas[0].reset()

    def start(self, *tensors: torch.Tensor) -> Read:
        """Enqueue copies of the tensors on the current stream."""
        if self._module is None:
            return Read(tensors)
        arena = self._arenas[0]
        copies = []
        for tensor in tensors:
            copy = arena.take(tensor.shape, tensor.dtype)
            copies.append(copy.copy_(tensor, non_blocking=True))
        event = arena.event(self._module)
        event.record()
        return Read(tuple(copies), event)


class _Arena:
    """Pinned memory and events of one step."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self._block = self._used = 0
        self._events: list[Any] = []
        self._num_events = 0

    def reset(self) -> None:
        self._block = self._used = self._num_events = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        while True:
            if self._block == len(self._blocks):
                self._blocks.append(_pinned(max(num_bytes, _FIRST_BYTES)))
            block = self._blocks[self._block]
            if self._used + num_bytes <= len(block):
                break
            self._block, self._used = self._block + 1, 0
        taken = block[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken.view(dtype).view(shape)

    def event(self, module: Any) -> Any:
        if self._num_events == len(self._events):
            self._events.append(module.Event())
        self._num_events += 1
        return self._events[self._num_events - 1]


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
