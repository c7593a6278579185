"""Copies to a device that the host does not wait for, and what it need not wait for."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["is_on_host", "to_device"]


def is_on_host(tensor: torch.Tensor) -> bool:
    """Return whether the host may read the tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def to_device(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Return the values on a device, without waiting for what runs there.

    A copy from pageable memory may wait for everything that was launched before it. Pinned memory
    is used again by torch only after the copy, so nothing has to be kept.

    Args:
        values: of any shape; not to be changed before the copy is done.

    Returns:
        A tensor of the same shape and dtype; on the CPU it shares the memory of `values`.
    """
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
