"""Training of the target on the token stream."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from .loop import BatchResult
from .target_model import Target
from .windows import WindowSampler, fixed_windows

SHORT_WINDOW = 256
LONG_WINDOW = 512
LONG_WINDOW_FROM = (
    0.7  # of the time: short windows are faster, long ones teach to look further back
)
SEED = 1


def next_token_loss(target: Target, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of windows [B, T + 1], in nats a token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = target(windows[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class TargetTask:
    """Next-token prediction."""

    name = "target"

    def __init__(
        self,
        target: Target,
        train_tokens: np.ndarray,
        heldout_tokens: np.ndarray,
        batch_tokens: int,
        num_heldout_windows: int,
        save: Callable[[], None],
    ) -> None:
        self.model = target
        self.on_checkpoint = save
        self._sampler = WindowSampler(train_tokens, SEED)
        self._batch_tokens = batch_tokens
        self._heldout = fixed_windows(heldout_tokens, num_heldout_windows, SHORT_WINDOW + 1)

    def batch(self, first_window: int, progress: float) -> BatchResult:
        window = LONG_WINDOW if progress >= LONG_WINDOW_FROM else SHORT_WINDOW
        count = max(1, self._batch_tokens // window)
        windows = self._sampler.draw(first_window, count, window + 1)
        return BatchResult(next_token_loss(self.model, windows), count, count * window)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        losses = [next_token_loss(self.model, part).item() for part in self._heldout.split(16)]
        return {"heldout_loss": sum(losses) / len(losses)}
