"""Copies to a device: none waits, and on the CPU there is none."""

import numpy as np
import pytest
import torch

from cast_sglang.ops.copies import to_device
from tests.support.copies import DEVICE, watched_copies


@pytest.mark.parametrize("values", [np.arange(6).reshape(2, 3), np.array([True, False])])
def test_a_copy_is_pinned_and_not_waited_for(values, monkeypatch):
    with watched_copies(monkeypatch) as spy:
        copy = to_device(values, DEVICE)
    assert spy.num_copies == 1 and spy.waits == []
    assert copy.shape == values.shape and copy.dtype == torch.from_numpy(values).dtype


def test_on_the_cpu_nothing_is_copied():
    values = np.arange(3)
    tensor = to_device(values, "cpu")
    values[1] = 7
    assert tensor.tolist() == [0, 7, 2]


def test_the_spy_sees_a_copy_that_waits(monkeypatch):
    with watched_copies(monkeypatch) as spy:
        torch.arange(3).to(DEVICE)
        torch.arange(3).to(DEVICE, non_blocking=True)
        torch.zeros(3, device=DEVICE).copy_(torch.arange(3))
        torch.arange(3, device=DEVICE).to(torch.int32)
    assert len(spy.waits) == spy.num_copies == 3
