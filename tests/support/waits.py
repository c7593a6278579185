"""Where a step reads what is computed: on a device the host would wait there.

On the CPU platform nothing tells a device's tensors from the host's. So all reads of tensors are
noted but of those that are the host's own: what was read through `HostReads`, what came from numpy,
and what the scheduler keeps on the host. Kernels that run on the host in place of a device's read
their arguments, which is no wait.
"""

import contextlib
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS_FILE = "TEST_WAITS_FILE"  # gets a line for each place
# Ops that wait on a device for a number of elements, or for a value.
WAITING_OPS = ("aten._local_scalar_dense.default", "aten.nonzero.default")
METHODS = ("tolist", "numpy", "cpu")
# Counterparts of a device's kernels, and the interpreter of kernels.
KERNELS = ("cast_sglang/cpu/", "cast_sglang/ops/", "triton/", "tests/support/")


class Watch(TorchDispatchMode):
    """Notes the ops inside that wait, in `places`."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in WAITING_OPS:
            note(args[0], str(function), self.places)
        return function(*args, **(kwargs or {}))


_host: dict[int, torch.Tensor] = {}  # by where their memory begins


def keep(tensor):
    """Know a tensor as the host's own."""
    _host[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def note(tensor, what, places):
    """Note that this tensor is read, unless it is the host's own or a kernel reads it."""
    if tensor.untyped_storage().data_ptr() in _host:
        return
    frame, callers = sys._getframe(2), []
    while frame is not None:
        callers.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        frame = frame.f_back
    outside = [caller for caller in callers if "/torch/" not in caller]
    for caller in outside:
        if any(part in caller for part in KERNELS):
            return
        if "sglang/" in caller:
            break
    places.add(f"{what} in {outside[0].split('site-packages/')[-1].split('gpupath/')[-1]}")


def watch_steps():
    """Note the reads of every step that decodes, and write their places to `WAITS_FILE`."""
    from cast_sglang.serving import host_reads
    from cast_sglang.serving.worker import CastWorker

    places, is_watched = set(), [False]
    for name in METHODS:
        method = getattr(torch.Tensor, name)

        def noted(tensor, *args, _method=method, _name=name, **kwargs):
            if is_watched[0]:
                note(tensor, _name, places)
            return _method(tensor, *args, **kwargs)

        setattr(torch.Tensor, name, noted)
    from_numpy, pinned = torch.from_numpy, host_reads._pinned
    torch.from_numpy = lambda values: keep(from_numpy(values))
    host_reads._pinned = lambda num_bytes: keep(pinned(num_bytes))
    forward = CastWorker.forward_batch_generation

    @contextlib.contextmanager
    def watched():
        is_watched[0] = True
        try:
            with Watch(places):
                yield
        finally:
            is_watched[0] = False
            with open(os.environ[WAITS_FILE], "w") as file:
                file.writelines(f"{place}\n" for place in sorted(places))

    def forward_batch_generation(worker, batch, *args, **kwargs):
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return forward(worker, batch, *args, **kwargs)
        for name, value in vars(batch).items():
            if name.endswith("_cpu") and isinstance(value, torch.Tensor):
                keep(value)
        with watched():
            return forward(worker, batch, *args, **kwargs)

    CastWorker.forward_batch_generation = forward_batch_generation
