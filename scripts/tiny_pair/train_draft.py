"""Training of the draft: distillation from the target over self-fed steps (training-time test)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .draft_model import Draft
from .layers import LayerCache
from .loop import BatchResult
from .target_model import Target
from .windows import WindowSampler, fixed_windows

NUM_STEPS = 5
STEP_DECAY = 0.8
CORPUS_WINDOW = 512
HELDOUT_WINDOW = 256
CORPUS_PART = 0.3  # of the batches; the others are the target's own continuations
SEED = 3


class StepResults(NamedTuple):
    """Mean over positions for each self-fed step, [S]."""

    losses: torch.Tensor  # cross-entropy against the target's distribution, nats
    agreement: torch.Tensor  # part of the positions where both put the same token first


def self_fed_steps(
    draft: Draft, target: Target, windows: torch.Tensor, num_steps: int = NUM_STEPS
) -> StepResults:
    """Run the draft from every position of the windows, each step fed by the one before.

    Step s at base b consumes token b + 1 + s and is compared with the target's distribution there.
    It attends to the committed slots up to b and to steps 1..s of its own base, as in serving.

    Args:
        windows: [B, T] int64.
    """
    num_bases = windows.shape[1] - num_steps
    causal = torch.ones(num_bases, num_bases, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            output = target(windows)
            embeds = target.model.embed_tokens(windows)
            target_probs = output.logits.float().softmax(-1)
            target_best = target_probs.argmax(-1)
        losses, agreement = [], []
        chain: list[LayerCache] = []
        for step in range(num_steps):
            slots = slice(1 + step, 1 + step + num_bases)
            if step == 0:
                result = draft.extend(embeds[:, slots], output.features[:, :num_bases])
                committed = result.cache
            else:
                positions = step + torch.arange(num_bases)
                result = draft.step(
                    embeds[:, slots], result.hidden, positions, committed, causal, chain
                )
                chain.append(result.cache)
            log_probs = result.logits.float().log_softmax(-1)
            losses.append(-(target_probs[:, slots] * log_probs).sum(-1).mean())
            same = result.logits.argmax(-1) == target_best[:, slots]
            agreement.append(same.float().mean())
    return StepResults(torch.stack(losses), torch.stack(agreement))


def weighted_loss(losses: torch.Tensor) -> torch.Tensor:
    """Average over self-fed steps [S], later ones counting less."""
    weights = STEP_DECAY ** torch.arange(len(losses))
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def heldout_steps(
    draft: Draft, target: Target, tokens: np.ndarray, num_windows: int
) -> StepResults:
    """Return losses and agreement on fixed windows of the held-out stream."""
    windows = fixed_windows(tokens, num_windows, HELDOUT_WINDOW)
    parts = [self_fed_steps(draft, target, part) for part in windows.split(16)]
    return StepResults(*(torch.stack(column).mean(0) for column in zip(*parts, strict=True)))


class DraftTask:
    """Distillation on corpus text and on the target's own continuations."""

    name = "draft"

    def __init__(
        self,
        draft: Draft,
        target: Target,
        train_tokens: np.ndarray,
        heldout_tokens: np.ndarray,
        continuations: np.ndarray,
        batch_tokens: int,
        num_heldout_windows: int,
        save: Callable[[], None],
    ) -> None:
        self.model = draft
        self.on_checkpoint = save
        self._target = target.requires_grad_(False)
        self._sampler = WindowSampler(train_tokens, SEED)
        self._continuations = continuations
        self._batch_tokens = batch_tokens
        self._heldout_tokens = heldout_tokens
        self._num_heldout_windows = num_heldout_windows

    def batch(self, first_window: int, progress: float) -> BatchResult:
        draw = np.random.default_rng((SEED, first_window))
        if draw.random() < CORPUS_PART:
            count = max(1, self._batch_tokens // CORPUS_WINDOW)
            windows = self._sampler.draw(first_window, count, CORPUS_WINDOW)
        else:
            count = max(1, self._batch_tokens // self._continuations.shape[1])
            rows = self._continuations[draw.integers(len(self._continuations), size=count)]
            windows = torch.from_numpy(rows.astype(np.int64))
        losses = self_fed_steps(self.model, self._target, windows).losses
        return BatchResult(weighted_loss(losses), count, windows.numel())

    def evaluate(self) -> dict[str, float]:
        steps = heldout_steps(
            self.model, self._target, self._heldout_tokens, self._num_heldout_windows
        )
        values = {"heldout_loss": weighted_loss(steps.losses).item()}
        return values | {f"agreement_{s}": a.item() for s, a in enumerate(steps.agreement, start=1)}
