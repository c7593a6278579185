"""The optimizers and the learning rate, which follows a clock and not a step count."""

import time
from dataclasses import dataclass

import torch
from torch import nn

WARMUP_FRACTION = 0.02
HOLD_FRACTION = 0.4


@dataclass(frozen=True)
class Rates:
    """Peak learning rates; the defaults are those of the tiny pair."""

    matrices: float = 0.02
    others: float = 2e-3


class Clock:
    """Training time used and allowed, in seconds; time before a resume counts.

    It is the time that the calling thread computes: none passes while other work has its core, or
    while the process is stopped. So runs of as many minutes compare on a shared machine.
    """

    def __init__(self, minutes: float, used_seconds: float = 0.0) -> None:
        self._budget = 60 * minutes
        self._start = time.thread_time() - used_seconds

    @property
    def used_seconds(self) -> float:
        """Seconds of training so far."""
        return time.thread_time() - self._start

    @property
    def progress(self) -> float:
        """Part of the budget that is used, in [0, 1]."""
        return min(1.0, self.used_seconds / self._budget)


class OptimizerPair:
    """Muon for the matrices of the layers, AdamW for embeddings, output heads and norms.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, model: nn.Module, rates: Rates) -> None:
        matrices, vectors = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_hidden = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if is_hidden else vectors).append(parameter)
        muon = torch.optim.Muon(matrices, lr=rates.matrices, momentum=0.95, weight_decay=0.01)
        adamw = torch.optim.AdamW(
            vectors, lr=rates.others, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._optimizers = [muon, adamw]
        self._peaks = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    def step(self, lr_factor: float) -> None:
        """Apply the gradients at `lr_factor` times the peak rates, then drop them."""
        for optimizer, peak in zip(self._optimizers, self._peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """Return what a resume needs."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, state: list[dict]) -> None:
        """Take up where `state_dict` left off."""
        for optimizer, part in zip(self._optimizers, state, strict=True):
            optimizer.load_state_dict(part)


def lr_factor(progress: float) -> float:
    """Return the part of the peak rate: a short warm-up, a plateau, then linear to zero."""
    if progress < WARMUP_FRACTION:
        return (progress + 1e-3) / WARMUP_FRACTION
    if progress < HOLD_FRACTION:
        return 1.0
    return max(0.0, (1.0 - progress) / (1.0 - HOLD_FRACTION))
