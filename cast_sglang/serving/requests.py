"""What the running requests tell: how long their contexts are, and how long answers get."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

__all__ = ["AnswerLengths", "mean_context"]

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
