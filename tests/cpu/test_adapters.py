"""Adapters on the CPU: nothing is pinned, and each row gets what its own adapter adds."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from cast_sglang.cpu.adapters import UNPINNED, without_pinning
from tests.support.hooks import hooked

SLOTS, RANK, INPUTS, OUTPUTS = 3, 2, 5, 4
RANKS, SCALES = [0, RANK, 1], [0.0, 0.5, 2.0]  # slot 0 is the base model


def batch_of(mode: ForwardMode, lens: list[int], width: int):
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(lens),
        extend_seq_lens=torch.tensor(lens, dtype=torch.int32),
        extend_seq_lens_cpu=lens,
        spec_info=SimpleNamespace(draft_token_num=width),
    )


@pytest.mark.parametrize("slots", [[1, 0, 2], [1, 1, 0], [0, 0, 0], [2, 1, 1]], ids=str)
@pytest.mark.parametrize(
    ("mode", "lens", "width"),
    [
        (ForwardMode.EXTEND, [3, 1, 2], 0),
        (ForwardMode.DECODE, [1, 1, 1], 0),
        (ForwardMode.TARGET_VERIFY, [4, 4, 4], 4),
        (ForwardMode.TARGET_VERIFY, [1, 1, 1], 1),  # a plain step
    ],
)
def test_rows_get_what_their_own_adapter_adds(slots, mode, lens, width):
    """By SGLang's own backend, at the widths that steps have."""
    torch.manual_seed(0)
    x = torch.randn(sum(lens), INPUTS)
    a, b = torch.randn(SLOTS, RANK, INPUTS), torch.randn(SLOTS, OUTPUTS, RANK)
    base = torch.randn(len(x), OUTPUTS)
    wanted, row = base.clone(), 0
    for slot, count in zip(slots, lens, strict=True):
        rows, rank = slice(row, row + count), RANKS[slot]
        wanted[rows] += SCALES[slot] * x[rows] @ a[slot, :rank].T @ b[slot, :, :rank].T
        row += count
    backend = TorchNativeLoRABackend(max_loras_per_batch=SLOTS, device=torch.device("cpu"))
    batch = batch_of(mode, lens, width)
    without_pinning(backend.prepare_lora_batch, batch, slots, RANKS, SCALES, False)
    inner = backend.run_lora_a_sgemm(x, a)
    found = backend.run_lora_b_sgemm(
        inner, b, output_offset_cpu=torch.tensor([0, OUTPUTS]), base_output=base
    )
    torch.testing.assert_close(found, wanted)


def test_nothing_is_pinned():
    def pin():
        made = torch.zeros(2, pin_memory=True), torch.tensor([1.0], pin_memory=True)
        return [*made, torch.ones(3).pin_memory()]

    assert [tensor.tolist() for tensor in without_pinning(pin)] == [[0, 0], [1], [1, 1, 1]]
    assert not any(tensor.is_pinned() for tensor in without_pinning(pin))


@pytest.mark.parametrize("target", UNPINNED)
def test_what_pins_is_sglangs(target):
    assert callable(hooked(target))
