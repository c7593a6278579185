"""How far a step may go: what its requests may still get, and the cache slots that they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cast_sglang.costs.limits import Limits

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

__all__ = ["PLAIN_RESERVE", "Envelope", "StepRoom", "most_tokens", "step_reserve"]

# Slots that a request reserves where it can only be decoded plainly: one for the step, and one for
# the step before, whose result the host may not know yet.
PLAIN_RESERVE = 2


def step_reserve(max_layers: int, topk: int, max_rows: int, *, overlaps: bool) -> int:
    """Return the slots past its known tokens that a request needs for a step of the whole envelope.

    Draft layers and verify use the same slots, one after the other. The children of the last layer
    are not run, so they take none, and one slot is left for the step after.

    Args:
        overlaps: the step before may still run, whose tokens the host does not know yet.
    """
    slots = max((max_layers - 1) * topk, max_rows + 1)
    return slots + (most_tokens(max_layers, max_rows) if overlaps else 0)


def most_tokens(max_layers: int, max_rows: int) -> int:
    """Return the most tokens that a step brings a request: a path of the tree and the bonus."""
    return min(max_layers, max_rows - 1) + 1


class StepRoom(NamedTuple):
    """How much of the envelope a step may use, by what its requests still can take."""

    max_layers: int  # of the tree; 0 where nothing may be drafted
    max_rows: int  # verified per request, root included


class Envelope:
    """The largest tree that a step may grow and verify, and how much of it the requests can take.

    Requests are looked at when they change, and in each step only when all of them end soon.

    Args:
        max_layers: layers that a tree may have.
        topk: nodes that a layer may have.
        max_rows: rows that may be verified per request, root included.
    """

    def __init__(self, max_layers: int, topk: int, max_rows: int) -> None:
        self._max_layers, self._topk, self._max_rows = max_layers, topk, max_rows
        self._max_tokens = most_tokens(max_layers, max_rows)
        self._tokens_left = 0  # lower bound for the request that may still get most

    def limits(self, max_batch_size: int, max_context: int) -> Limits:
        """Return the largest shapes of one pass in trees of this envelope."""
        return Limits(
            max_batch_size=max_batch_size,
            max_context=max_context,
            max_verify_rows=self._max_rows,
            max_width=self._topk,
            # No accepted path is longer than the tree is deep, the bonus token added.
            max_extend_rows=min(self._max_layers + 1, self._max_rows),
        )

    @property
    def whole(self) -> StepRoom:
        """The room of a step that may use all of it."""
        return StepRoom(self._max_layers, self._max_rows)

    def room(self, reqs: list[Req], pending: list[int], are_new: bool) -> StepRoom:
        """Return how much of the envelope the next step may use.

        A tree is no deeper than the request that may get the most tokens can go, which is what is
        left of its answer and so of the context. A request that is alone may hold fewer slots than
        the envelope takes (`host_patches.hooks`); then the tree keeps within them and leaves one
        for the step after.

        Args:
            pending: of each earlier step whose result is not in the requests yet, the most tokens
                that it may have brought a request.
            are_new: the requests differ from those of the step before.
        """
        layers, rows = self._max_layers, self._max_rows
        if are_new or self._tokens_left < self._max_tokens:
            left = max(req.sampling_params.max_new_tokens - len(req.output_ids) for req in reqs)
            # A step whose result is not known has brought one token at least.
            layers = min(layers, left - len(pending) - 1)
            self._tokens_left = left - sum(pending)
        self._tokens_left -= self._max_tokens
        if len(reqs) == 1:
            kv = reqs[0].kv
            slots = kv.kv_allocated_len - kv.kv_committed_len - sum(pending)
            # The children of the last layer are not run, so they take no slots.
            layers, rows = min(layers, slots // self._topk + 1), min(rows, slots - 1)
        return StepRoom(layers, rows)
