"""How far a step may go: what its requests may still get, and the cache slots that they hold."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from sglang.srt.runtime_context import get_schedule, get_spec

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

__all__ = [
    "PLAIN_RESERVE",
    "STOCK_TREE",
    "Envelope",
    "StepRoom",
    "copies_text",
    "deepest_copy",
    "most_tokens",
    "needs_whole_trees",
    "slots_reserved",
    "step_reserve",
    "stock_slots",
]

# Slots that a request reserves where it can only be decoded plainly: one for the step, and one for
# the step before, whose result the host may not know yet.
PLAIN_RESERVE = 2
# SGLang's default tree for Llama: steps, topk, tokens.
STOCK_TREE = (5, 4, 8)


def stock_slots(num_steps: int, topk: int, num_draft_tokens: int) -> int:
    """Return the slots that SGLang reserves for a request's next two steps.

    A row of the request pool's table has room for as many, under CAST too.
    """
    return 2 * max(num_steps * topk, num_draft_tokens)


def needs_whole_trees(config: CastConfig) -> bool:
    """Return whether trees may always be as large as the envelope.

    Policy `auto` adapts its trees to the slots that there are. The others promise a shape, and a
    trace of whole trees needs them.
    """
    return config.policy != "auto" or config.trace_full


def copies_text(config: CastConfig, has_draft: bool) -> bool:
    """Return whether a server proposes again what its requests have said before."""
    is_on = config.copying == "on" or config.copying == "auto" and not has_draft
    return is_on and config.policy == "auto"


def deepest_copy(config: CastConfig, has_draft: bool, num_draft_tokens: int) -> int:
    """Return the depth that a copied node may have; 0 where nothing is copied.

    A copy takes no pass of the draft, so a path of them may be as long as there are rows.
    """
    return num_draft_tokens - 1 if copies_text(config, has_draft) else 0


def step_reserve(
    max_layers: int,
    topk: int,
    max_rows: int,
    *,
    copy_depth: int = 0,
    overlaps: bool,
    is_whole: bool,
) -> int:
    """Return the slots past its known tokens that a request reserves for a step with drafts.

    Draft layers and verify use the same slots, one after the other. The children of the last layer
    are not run, so they take none, and one slot is left for the step after.

    Args:
        copy_depth: as of `Envelope`.
        overlaps: the step before may still run, whose tokens the host does not know yet.
        is_whole: reserve what a step of the whole envelope needs. Else a request reserves no more
            than SGLang does with its default tree, unless verify alone needs more, and trees keep
            within that.
    """
    slots = max((max_layers - 1) * topk, max_rows + 1)
    slots += most_tokens(max(max_layers, copy_depth), max_rows) if overlaps else 0
    return slots if is_whole else max(max_rows + 1, min(slots, stock_slots(*STOCK_TREE)))


def most_tokens(max_depth: int, max_rows: int) -> int:
    """Return the most tokens that a step brings a request: a path of the tree and the bonus."""
    return min(max_depth, max_rows - 1) + 1


class StepRoom(NamedTuple):
    """How much of the envelope a step may use, by what its requests still can take."""

    max_layers: int  # of the tree; 0 where nothing may be drafted
    max_rows: int  # verified per request, root included
    max_nodes: int  # that the draft may run per request
    copy_depth: int = 0  # of a copied node; 0 where nothing is copied


class Envelope:
    """The largest tree that a step may grow and verify, and how much of it the requests can take.

    Requests are looked at when they change, and in each step only when all of them end soon.

    Args:
        max_layers: layers that a tree may have.
        topk: nodes that a layer may have.
        max_rows: rows that may be verified per request, root included.
        copy_depth: of a copied node; 0 where nothing is copied.
        overlaps: as of `step_reserve`, and the next.
        is_whole: layers have all their nodes, or do not run.

    Attributes:
        reserve: slots that each request of a batch reserves for a step with drafts.
    """

    def __init__(
        self,
        max_layers: int,
        topk: int,
        max_rows: int,
        *,
        copy_depth: int = 0,
        overlaps: bool = False,
        is_whole: bool = False,
    ) -> None:
        self._max_layers, self._topk, self._max_rows = max_layers, topk, max_rows
        self._copy_depth, self._is_whole = copy_depth, is_whole
        self._max_tokens = most_tokens(max(max_layers, copy_depth), max_rows)
        self._tokens_left = 0  # lower bound for the request that may still get most
        self.reserve = step_reserve(
            *(max_layers, topk, max_rows),
            copy_depth=copy_depth,
            overlaps=overlaps,
            is_whole=is_whole,
        )

    @classmethod
    def of_server(cls, config: CastConfig) -> Envelope:
        """Return that of the server of this process."""
        spec = get_spec()
        rows, has_draft = spec.speculative_num_draft_tokens, bool(spec.speculative_draft_model_path)
        return cls(
            spec.speculative_num_steps,
            spec.speculative_eagle_topk,
            rows,
            copy_depth=deepest_copy(config, has_draft, rows),
            overlaps=not get_schedule().disable_overlap_schedule,
            is_whole=needs_whole_trees(config),
        )

    def limits(self, max_batch_size: int, max_context: int) -> Limits:
        """Return the largest shapes of one pass in trees of this envelope."""
        return Limits(
            max_batch_size=max_batch_size,
            max_context=max_context,
            max_verify_rows=self._max_rows,
            max_width=self._topk,
            # No accepted path is longer than the tree is deep, the bonus token added.
            max_extend_rows=self._max_tokens,
        )

    @property
    def whole(self) -> StepRoom:
        """The room of a step that may use all of it."""
        nodes = (self._max_layers - 1) * self._topk
        return StepRoom(
            self._max_layers, self._max_rows, min(nodes, self.reserve), self._copy_depth
        )

    def room(self, reqs: list[Req], pending: list[int], are_new: bool) -> StepRoom:
        """Return how much of the envelope the next step may use.

        A tree is no deeper than the request that may get the most tokens can go, which is what is
        left of its answer and so of the context. It keeps within the slots that each request holds
        and leaves one for the step after. That is the reserve, less what earlier steps may have
        brought meanwhile; a request that is alone may hold fewer (`host_patches.hooks`).

        Args:
            pending: of each earlier step whose result is not in the requests yet, the most tokens
                that it may have brought a request.
            are_new: the requests differ from those of the step before.
        """
        layers, rows, nodes, copy_depth = self.whole
        if are_new or self._tokens_left < self._max_tokens:
            left = max(req.sampling_params.max_new_tokens - len(req.output_ids) for req in reqs)
            # A step whose result is not known has brought one token at least.
            deepest = max(0, left - len(pending) - 1)
            layers, copy_depth = min(layers, deepest), min(copy_depth, deepest)
            self._tokens_left = left - sum(pending)
        self._tokens_left -= self._max_tokens
        slots = self.reserve
        if len(reqs) == 1:
            slots = reqs[0].kv.kv_allocated_len - reqs[0].kv.kv_committed_len
        slots -= sum(pending)
        if self._is_whole:
            # The children of the last layer are not run, so they take no slots.
            layers = min(layers, slots // self._topk + 1)
        return StepRoom(layers, min(rows, slots - 1), min(nodes, slots), copy_depth)


@functools.cache
def slots_reserved() -> int:
    """Return the slots that a request of this server reserves for a step with drafts.

    SGLang reserves twice the larger of all nodes and all rows.
    """
    return Envelope.of_server(CastConfig.load()).reserve
