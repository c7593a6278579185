"""Training of the target on the token stream."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from draft_trainer.loop import BatchResult
from draft_trainer.target_model import Target

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
        logits = target.logits(target(windows[:, :-1]).states)
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(target: Target, tokens: np.ndarray, num_windows: int) -> float:
    """Return the loss on fixed windows of the held-out stream."""
    windows = fixed_windows(tokens, num_windows, SHORT_WINDOW + 1)
    losses = [next_token_loss(target, part).item() for part in windows.split(16)]
    return sum(losses) / len(losses)


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
        self._heldout_tokens = heldout_tokens
        self._num_heldout_windows = num_heldout_windows

    def batch(self, first_window: int, progress: float) -> BatchResult:
        window = LONG_WINDOW if progress >= LONG_WINDOW_FROM else SHORT_WINDOW
        count = max(1, self._batch_tokens // window)
        windows = self._sampler.draw(first_window, count, window + 1)
        return BatchResult(next_token_loss(self.model, windows), count, count * window)

    def evaluate(self) -> dict[str, float]:
        loss = heldout_loss(self.model, self._heldout_tokens, self._num_heldout_windows)
        return {"heldout_loss": loss}
