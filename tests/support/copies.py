"""A device without a GPU, on which every copy that the host waits for is seen."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Holds shapes and types and no values, so that reading one from the host fails by itself.
DEVICE = "meta"


class _Spy(TorchDispatchMode):
    def __init__(self, pinned):
        super().__init__()
        self.pinned, self.waits, self.num_copies = pinned, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        if name == "aten._to_copy.default":
            target = torch.device(kwargs.get("device") or args[0].device)
            self._look(name, args[0], target, kwargs.get("non_blocking", False))
        elif name == "aten.copy_.default":
            self._look(name, args[1], args[0].device, (args[2:] or (False,))[0])
        elif name in ("aten._local_scalar_dense.default", "aten.nonzero.default"):
            if args[0].device.type == DEVICE:
                self.waits.append(name)
        return function(*args, **kwargs)

    def _look(self, name, source, target, is_asynchronous):
        if source.device.type == target.type:
            return
        self.num_copies += 1
        if not is_asynchronous or source.data_ptr() not in self.pinned:
            self.waits.append(f"{name} of {tuple(source.shape)} to {target.type}")


@contextlib.contextmanager
def watched_copies(monkeypatch):
    """Note the copies between the host and `DEVICE` that wait, in `waits` of what this yields."""
    pinned = {}

    def pin(tensor):
        copy = tensor.clone()
        pinned[copy.data_ptr()] = copy  # kept, so that no other tensor gets the place
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with _Spy(pinned) as spy:
        yield spy
