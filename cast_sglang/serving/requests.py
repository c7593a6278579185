"""What the running requests tell: their contexts, how long answers get, how far they may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

__all__ = ["PLAIN_RESERVE", "AnswerLengths", "StepRoom", "TokensLeft", "mean_context", "slots_left"]

# Slots that a request reserves where it can only be decoded plainly: one for the step, and one for
# the step before, whose result the host may not know yet.
PLAIN_RESERVE = 2

# Ended answers after which one counts half.
HALF_LIFE = 32
_KEEP = 0.5 ** (1 / HALF_LIFE)


class AnswerLengths:
    """The mean length of answers lately: tokens over ends, so that those still running count too.

    A mean of the ended ones alone would be that of the short ones for as long as long ones run.
    """

    def __init__(self) -> None:
        self._running: list[Req] = []
        self._tokens = self._ends = 0.0  # forgotten sums

    @property
    def mean_tokens(self) -> float | None:
        """None while no answer has ended."""
        return max(1.0, self._tokens / self._ends) if self._ends else None

    def note(self, running: list[Req]) -> bool:
        """Take note of the requests of a step; return whether they are others than before."""
        if running == self._running:
            return False
        staying = set(map(id, running))
        # One that was retracted leaves as well, and comes back.
        ends = sum(id(req) not in staying and req.finished() for req in self._running)
        self._running = list(running)
        keep = _KEEP**ends
        self._tokens, self._ends = keep * self._tokens, keep * self._ends + ends
        return True

    def count(self, num_tokens: int) -> None:
        """Count new tokens of all requests of a step."""
        self._tokens += num_tokens


def mean_context(batch: ScheduleBatch) -> float:
    """Return the mean committed length of the batch's requests, in tokens."""
    if batch.seq_lens_cpu is not None:
        return int(batch.seq_lens_cpu.sum()) / len(batch.reqs)
    lengths = (len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
    return sum(lengths) / len(batch.reqs)


class StepRoom(NamedTuple):
    """How much of the envelope a step may use, by what its requests still can take."""

    max_layers: int  # of the tree; 0 where nothing may be drafted
    max_rows: int  # verified per request, root included

    @property
    def has_drafts(self) -> bool:
        return self.max_layers > 0 and self.max_rows > 1


class TokensLeft:
    """The most tokens that any running request may still get.

    Requests are looked at when they change, and in each step only when all of them end soon: a step
    brings a request from one to `max_tokens` tokens.

    Args:
        max_tokens: the most tokens that a step of the whole envelope brings a request.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._at_least = 0

    def step(self, reqs: list[Req], num_pending: int, are_new: bool) -> int:
        """Return how many tokens the step may bring; exact where that is less than it could.

        Args:
            num_pending: earlier steps whose results are not in the requests yet.
            are_new: the requests differ from those of the step before.
        """
        if are_new or self._at_least < self._max_tokens:
            left = max(req.sampling_params.max_new_tokens - len(req.output_ids) for req in reqs)
            # A step that is not counted yet brings one token at least.
            most, least = left - num_pending, left - num_pending * self._max_tokens
        else:
            most = least = self._at_least
        self._at_least = least - self._max_tokens
        return most


def slots_left(req: Req, pending_rows: int) -> int:
    """Return the cache slots that a request holds past its committed length.

    Args:
        pending_rows: tokens that steps may have committed of which the host does not know yet.
    """
    return int(req.kv.kv_allocated_len - req.kv.kv_committed_len) - pending_rows
