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

NUM_STEPS = 6  # one more than the depth served, so that the deepest one is not at the edge
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
            target_logits = output.logits[:, slots].float()
            draft_logits = result.logits.float()
            log_probs = draft_logits.log_softmax(-1)
            losses.append(-(target_logits.softmax(-1) * log_probs).sum(-1).mean())
            same = draft_logits.argmax(-1) == target_logits.argmax(-1)
            agreement.append(same.float().mean())
    return StepResults(torch.stack(losses), torch.stack(agreement))


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
        self._heldout = fixed_windows(heldout_tokens, num_heldout_windows, HELDOUT_WINDOW)
        self._weights = STEP_DECAY ** torch.arange(NUM_STEPS)

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
        loss = (losses * self._weights).sum() / self._weights.sum()
        return BatchResult(loss, count, windows.numel())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        parts = [self_fed_steps(self.model, self._target, part) for part in self._heldout.split(16)]
        losses = torch.stack([part.losses for part in parts]).mean(0)
        agreement = torch.stack([part.agreement for part in parts]).mean(0)
        weighted = (losses * self._weights).sum() / self._weights.sum()
        values = {"heldout_loss": weighted.item()}
        return values | {f"agreement_{s + 1}": a.item() for s, a in enumerate(agreement)}
