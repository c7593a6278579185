"""Training of a head: distillation from the target over all tokens that it drafts.

An EAGLE-3 head is fed with its own states step by step (training-time test).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .draft_model import NUM_STEPS, Head
from .loop import BatchResult
from .loss import head_loss
from .rows import Row, Rows
from .target_model import Target

ROW_TOKENS = 512  # longer rows are cut there
# The target's likeliest tokens that the draft learns from; what lies beyond them it would hardly
# propose.
NUM_TARGET_TOKENS = 128
SEED = 3


@dataclass(frozen=True)
class Batch:
    """Rows of B texts, padded behind their ends to T tokens."""

    tokens: torch.Tensor  # [B, T] int64
    states: torch.Tensor  # [B, T, state_size] bfloat16
    bases: torch.Tensor  # [B, N] int64: slots that draft; a row with fewer repeats its first
    counts: torch.Tensor  # [S, B, N] boolean: whether the token that step s proposes there counts


class TargetTokens(NamedTuple):
    """What the target would put behind each token, among the draft's own tokens."""

    indices: torch.Tensor  # [B, T, K] int64, into the draft's vocabulary, likeliest first
    probs: torch.Tensor  # [B, T, K] float32, of sum 1


class StepResults(NamedTuple):
    """Means over positions for each self-fed step, [S], and the loss that is trained."""

    loss: torch.Tensor  # [], the mean of the steps' losses, later ones counting less
    losses: torch.Tensor  # cross-entropy against the target's distribution, nats
    agreement: torch.Tensor  # part of the positions where both put the same token first


def make_batch(
    store: Rows,
    rows: list[Row],
    in_vocabulary: torch.Tensor,
    num_steps: int = NUM_STEPS,
) -> Batch:
    """Lay rows side by side.

    A token counts if the target wrote it (it lies at or behind `answer_start`), if it has a place
    in the draft's vocabulary [V] boolean, and if the target's state there is known.
    """
    length = min(ROW_TOKENS, max(len(row.tokens) for row in rows))
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    known = torch.zeros(len(rows), length + num_steps + 1, dtype=torch.bool)
    states = []
    firsts, lasts = [], []
    for index, row in enumerate(rows):
        num_tokens = min(len(row.tokens), length)
        tokens[index, :num_tokens] = torch.tensor(row.tokens[:num_tokens])
        known[index, row.answer_start : num_tokens] = True
        row_states = store.states(row)[: num_tokens - 1]
        states.append(torch.nn.functional.pad(row_states, (0, 0, 0, length - len(row_states))))
        # As in serving: the first base is the slot whose root is the first token of the answer.
        # A row whose answer lies behind the cut counts nowhere.
        firsts.append(min(max(row.answer_start - 1, 0), length - 1))
        lasts.append(max(num_tokens - 3, firsts[-1]))
    known[:, :length] &= in_vocabulary[tokens]
    first, last = torch.tensor(firsts)[:, None], torch.tensor(lasts)[:, None]
    bases = first + torch.arange(int((last - first).max()) + 1)
    is_base = bases <= last
    bases = torch.where(is_base, bases, first)
    proposed = [bases + 2 + step for step in range(num_steps)]
    counts = torch.stack([known.gather(1, index) & is_base for index in proposed])
    return Batch(tokens, torch.stack(states), bases, counts)


@torch.no_grad()
def target_tokens(target: Target, draft: Head, states: torch.Tensor) -> TargetTokens:
    """Return what the target expects behind states [B, T, state_size], among the draft's tokens."""
    head = target.lm_head.weight[draft.vocabulary]
    hidden = states[..., -target.shape.hidden_size :]
    logits = (hidden.to(head.dtype) @ head.T).float()
    best = logits.topk(min(NUM_TARGET_TOKENS, len(draft.vocabulary)))
    return TargetTokens(best.indices, best.values.softmax(-1))


def self_fed_steps(
    draft: Head, target: Target, batch: Batch, draw: np.random.Generator | None = None
) -> StepResults:
    """Run the draft from the bases of a batch, as serving does, but on the text's own tokens.

    Step s at base b is compared with the target's distribution behind token b + 1 + s, which an
    EAGLE-3 head consumes there, and the state of the step before. It attends to the committed slots
    up to b and to steps 1..s of its own base.

    Args:
        draw: chooses bases for heads that draft from some of them only; None for all of them.
    """
    tokens, states, bases, counts = batch.tokens, batch.states, batch.bases, batch.counts
    num_features = states.shape[-1] - target.shape.hidden_size
    row = torch.arange(len(tokens))[:, None]
    last = tokens.shape[1] - 1
    step_weights = draft.depth_decay ** torch.arange(len(counts))
    expected = target_tokens(target, draft, states)
    with torch.no_grad():
        embeds = target.model.embed_tokens(tokens)

    def follow(step: int) -> torch.Tensor:
        return embeds[row, (bases + 1 + step).clamp(max=last)]

    with torch.autocast("cpu", torch.bfloat16):
        features = states[:, :-1, :num_features]
        steps = draft.unroll(embeds[:, 1:], features, bases, follow, len(counts), draw)
        normed, sought, counted = [], [], []
        for step, (hidden, columns) in enumerate(steps):
            slots, counts_here = (bases + 1 + step).clamp(max=last), counts[step]
            if columns is not None:
                slots, counts_here = slots[:, columns], counts_here[:, columns]
            normed.append(draft.norm(hidden[counts_here]))
            sought.append([x[row, slots][counts_here] for x in expected])
            counted.append(counts_here.sum())
        parts = [len(rows) for rows in normed]
        indices, probs = (torch.cat(column) for column in zip(*sought, strict=True))
        num_counted = torch.stack(counted).clamp(min=1)
        row_weights = step_weights / step_weights.sum() / num_counted
        weights = row_weights.repeat_interleave(torch.tensor(parts))
        head = draft.lm_head.weight.to(torch.bfloat16)
        found = head_loss(torch.cat(normed).to(torch.bfloat16), head, indices, probs, weights)
    sums = [
        [part.float().sum() for part in column.split(parts)]
        for column in (found.losses, found.is_same)
    ]
    losses, agreement = (torch.stack(column) / num_counted for column in sums)
    return StepResults(found.total, losses, agreement)


@torch.no_grad()
def heldout_steps(
    draft: Head,
    target: Target,
    store: Rows,
    rows: list[Row],
    rows_at_once: int = 8,
) -> StepResults:
    """Return losses and agreement on rows that training never sees."""
    in_vocabulary = mark_vocabulary(draft)
    rows = sorted(rows, key=lambda row: len(row.tokens))
    parts = []
    for i in range(0, len(rows), rows_at_once):
        batch = make_batch(store, rows[i : i + rows_at_once], in_vocabulary, draft.num_steps)
        parts.append(self_fed_steps(draft, target, batch))
    return StepResults(*(torch.stack(column).mean(0) for column in zip(*parts, strict=True)))


def mark_vocabulary(draft: Head) -> torch.Tensor:
    """Return [V] boolean: the target's tokens that the draft can propose."""
    marks = torch.zeros(draft.shape.vocab_size, dtype=torch.bool)
    marks[draft.vocabulary] = True
    return marks


class DraftTask:
    """Distillation on the rows of a store, which may grow meanwhile."""

    name = "draft"

    def __init__(
        self,
        draft: Head,
        target: Target,
        store: Rows,
        is_held_out: Callable[[Row], bool],
        batch_tokens: int,
        num_heldout_rows: int,
        save: Callable[[], None],
    ) -> None:
        self.model = draft
        self.on_checkpoint = save
        self._target = target.requires_grad_(False)
        self._store = store
        self._is_held_out = is_held_out
        self._in_vocabulary = mark_vocabulary(draft)
        self._batch_tokens = batch_tokens
        held_out = [row for row in store.rows if is_held_out(row)]
        self._heldout_rows = held_out[:num_heldout_rows]
        self._train_rows: list[Row] = []
        self._sort_rows()
        if not self._heldout_rows or not self._train_rows:
            raise ValueError("there are no answers yet to train on and to hold out")

    def batch(self, first_window: int, progress: float) -> BatchResult:
        """Train on a row drawn at random and the rows next to it in length."""
        draw = np.random.default_rng((SEED, first_window))
        first = int(draw.integers(len(self._train_rows)))
        length = min(ROW_TOKENS, len(self._train_rows[first].tokens))
        count = max(1, self._batch_tokens // length)
        first = max(0, min(first - count // 2, len(self._train_rows) - count))
        rows = self._train_rows[first : first + count]
        batch = make_batch(self._store, rows, self._in_vocabulary, self.model.num_steps)
        loss = self_fed_steps(self.model, self._target, batch, draw).loss
        num_tokens = sum(min(ROW_TOKENS, len(row.tokens)) for row in rows)
        return BatchResult(loss, len(rows), num_tokens)

    def evaluate(self) -> dict[str, float]:
        """Return held-out numbers, and take up the rows that have come meanwhile."""
        self._store.refresh()
        self._sort_rows()
        steps = heldout_steps(self.model, self._target, self._store, self._heldout_rows)
        values = {"heldout_loss": steps.loss.item()}
        return values | {f"agreement_{s}": a.item() for s, a in enumerate(steps.agreement, start=1)}

    def _sort_rows(self) -> None:
        """Sort rows by length, in an order that is another one each time among equals."""
        rows = [row for row in self._store.rows if not self._is_held_out(row)]
        order = np.random.default_rng(len(rows)).permutation(len(rows))
        self._train_rows = sorted((rows[i] for i in order), key=lambda row: len(row.tokens))
