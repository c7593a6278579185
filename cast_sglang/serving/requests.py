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
    """The mean length of the answers that ended lately.

    Attributes:
        mean_tokens: None while none has ended.
    """

    def __init__(self) -> None:
        self.mean_tokens: float | None = None
        self._running: list[Req] = []
        self._tokens = self._count = 0.0  # forgotten sums

    def note(self, running: list[Req]) -> bool:
        """Take note of the requests of a step; return whether the mean changed."""
        if running == self._running:
            return False
        staying = set(map(id, running))
        # One that was retracted leaves as well, and comes back.
        ended = [req for req in self._running if id(req) not in staying and req.finished()]
        self._running = list(running)
        for req in ended:
            self._tokens = _KEEP * self._tokens + max(1, len(req.output_ids_through_stop))
            self._count = _KEEP * self._count + 1.0
        if ended:
            self.mean_tokens = self._tokens / self._count
        return bool(ended)


def mean_context(batch: ScheduleBatch) -> float:
    """Return the mean committed length of the batch's requests, in tokens."""
    if batch.seq_lens_cpu is not None:
        return int(batch.seq_lens_cpu.sum()) / len(batch.reqs)
    lengths = (len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
    return sum(lengths) / len(batch.reqs)
