"""What policy `auto` knows of each octave of batch sizes: its price, and its account."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cast_sglang.config import MAX_VERIFY_ROWS
from cast_sglang.policy.base import NO_PREFILL, Prefill
from cast_sglang.policy.turns import FIRST, Turns

__all__ = ["MAX_LOSS", "Octave", "octave_of"]

# Target passes that speculation may lose against plain decoding before it stops, at batch size 1:
# more than chance takes, less than a second. In larger batches chance averages out, so the limit
# falls with the root of the batch size. On simulated machines with hard text, 128 lost 1.3 % (error
# 0.6) over 900 steps, and no limit at all 3.2 %; 8 gained 1.6 % (0.7).
MAX_LOSS = 32.0
# Share of the time of plain decoding that tries of speculation may lose. On the same machines 0.003
# lost 8 % where hard text becomes easy, and 0.03 gained 0.4 % (0.5) in all.
PROBE_SHARE = 0.01
# The same the other way: share of the time of speculation that tries of plain decoding may lose. No
# comparison would show so little; other values were not tried.
PLAIN_SHARE = 0.002
# Steps from one to the next at least, so that speculation goes on where both are alike: about as
# many as use up the account where drafts bring nothing.
PLAIN_AFTER = 32
# Plain steps of a try. The first one behind a step with drafts takes longer than those that follow
# each other, 8 % at batch 8 on two AMD cores, and is not learned from.
PLAIN_STEPS = 4


def octave_of(batch_size: int) -> int:
    """Return the number of the octave of a batch size; 2**octave is the largest one in it."""
    return (batch_size - 1).bit_length()


@dataclass(slots=True, eq=False)
class Octave:
    """What policy `auto` knows of the batch sizes of one octave; times are in units."""

    # Sums over steps with a tree, in which older steps count less.
    tokens: float  # per request
    time: float  # units
    steps: float
    plain_units: float = math.inf  # time of a plain step; inf while plain is no candidate
    prefill: Prefill = NO_PREFILL  # the draft's, which plain decoding goes without
    max_account: float = MAX_LOSS
    account: float = MAX_LOSS  # target passes that speculation may still lose, at most the above
    is_plain: bool = False
    # Logarithm of the score of the last node worth its time, mean of the last steps.
    log_cut: float | None = None
    num_rows: int = MAX_VERIFY_ROWS  # of the request that had most in the last step
    turns: Turns = field(default_factory=Turns)
    # Steps with drafts since a plain one; the first try is as early as the first turn of a tree.
    since_plain: int = PLAIN_AFTER - FIRST
    plain_left: int = 0  # steps of the try of plain decoding that runs

    @property
    def price(self) -> float:
        """The best known rate, in tokens per unit of time, which further time must reach."""
        return max(self.tokens / self.time, 1.0 / self.plain_units)

    @property
    def try_loss(self) -> float:
        """Time that a step with drafts may lose: what the last ones have lost in the mean."""
        return max(0.0, -self.gain(self.tokens, self.time) / self.steps)

    def gain(self, tokens: float, time: float) -> float:
        """Return the time that plain decoding would have taken more for these tokens.

        However long the prompts, a step loses no more than it took.
        """
        prefill = self.prefill.units / self.prefill.answer_tokens
        return tokens * max(0.0, self.plain_units - prefill) - time

    @property
    def plain_steps(self) -> int:
        """Plain steps until the account covers a try with its prompts; catching up is left out."""
        if not self.is_plain:
            return 0
        lacking = self.try_loss + self.prefill.units - self.account
        return max(0, math.ceil(lacking / (PROBE_SHARE * self.plain_units)))

    def pay_in(self, catch_up: float = 0.0) -> None:
        """Take note of a step of the policy's own choice before it runs."""
        if self.is_plain or self.account < 0.0:
            lacks = self.account < self.try_loss + catch_up
            self.is_plain = lacks or self.prefill.num_left_out > 0
        if self.is_plain:
            self.account += PROBE_SHARE * self.plain_units
            self.since_plain = self.plain_left = 0

    def tries_plain(self) -> bool:
        """Count a step that drafts; return whether plain decoding is to have this one instead.

        Where plain decoding is about as fast, its time must be known within a few percent, and a
        try loses next to nothing, so tries are many; where it is far off they are few.
        """
        if self.plain_left:
            self.plain_left -= 1
            return True
        self.since_plain += 1
        saved = self.since_plain * PLAIN_SHARE * self.time / self.steps
        loss = PLAIN_STEPS * (self.plain_units - self.time / self.tokens)
        if self.since_plain < PLAIN_AFTER or saved < loss:
            return False
        self.since_plain, self.plain_left = 0, PLAIN_STEPS - 1
        return True
