"""What is read from requests: their modes, and how long contexts are.

Modes are checked where a request arrives (`request_checks.py`) and read where it is served. SGLang
carries custom parameters from the client to the scheduler whether or not a custom logit processor
uses them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from cast_sglang.errors import ConfigError
from cast_sglang.policy.decider import PromptFacts
from cast_sglang.policy.lookahead import KEEP
from cast_sglang.serving.request_modes import OFF, THROUGHPUT, mode_weights, parse_mode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

__all__ = [
    "RunningRequests",
    "SamplingNeeds",
    "mean_context",
    "modes_of",
    "why_plain",
]


logger = logging.getLogger(__name__)

# Where later prompts find more than this share of their tokens in the cache, they would find there
# what the draft has left out. That costs them 8 % of their tokens per pass at most, where all of
# an answer was left out (`docs/results.md`), so this is on the safe side; less is found where
# prompts have no more in common than how a chat begins.
MAX_REUSE = 0.05


class SamplingNeeds(NamedTuple):
    """What SGLang's verify lacks for the requests of a batch."""

    truncates: bool  # one that samples cuts by top-k and top-p, or by min-p
    is_plain: np.ndarray | None  # [B] bool, those that are decoded plainly; None for no one


def mean_context(batch: ScheduleBatch) -> float:
    """Return the mean committed length of the batch's requests, in tokens."""
    if batch.seq_lens_cpu is not None:
        return int(batch.seq_lens_cpu.sum()) / len(batch.reqs)
    lengths = (len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
    return sum(lengths) / len(batch.reqs)


def modes_of(reqs: Iterable[Req]) -> tuple[str, ...]:
    """Return the mode of each request of a batch.

    A mode that was never checked, because another front end than SGLang's Python server took the
    request in, counts as throughput: a bad request must not end the scheduler.
    """
    return tuple([_mode_of(req.sampling_params.custom_params) for req in reqs])


def why_plain(req: Req) -> str | None:
    """Return why a request has to be decoded plainly at the moment; None where drafts are exact.

    Penalties depend on the tokens before a node, which differ within a tree, and a custom processor
    sees one position of a request at a time. SGLang counts `min_new_tokens` by decode steps; these
    are tokens as long as the request is decoded plainly. With deterministic inference a seed gives
    each position its own noise, which the plain sampler alone knows.
    """
    params = req.sampling_params
    if params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0:
        return "a penalty"
    # Tokens whose step still runs are not among them, so this ends no earlier than the penalty.
    if len(req.output_ids) < params.min_new_tokens:
        return "min_new_tokens"
    if req.custom_logit_processor:
        return "a custom logit processor"
    if params.top_k != 1 and get_exec().deterministic.enable_deterministic_inference:
        return "a seed"
    return None


class RunningRequests:
    """The requests of the last step that were read, and what SGLang's verify lacks for them.

    Args:
        draws: whether the drafts of requests that sample are drawn at random.
        has_draft: whether a draft model drafts at all.

    Attributes:
        sampling: None where verify samples as plain decoding does.
        drawn: [B] bool, whose drafts are drawn at random; None where no one's are.
    """

    def __init__(self, draws: bool = False, has_draft: bool = True) -> None:
        self.drawn: np.ndarray | None = None
        self._draws, self._has_draft = draws and has_draft, has_draft
        self.sampling: SamplingNeeds | None = None
        self._prompts = PromptFacts()
        self._reqs: list[Req] = []
        self._coming: list[Req] = []  # that were prefilled since
        # Those whose prompts the draft has left out; one that is prefilled anew is looked at anew.
        self._left_out: weakref.WeakSet[Req] = weakref.WeakSet()
        # Tokens of the last prompts, and those of them that the cache held; older ones count less,
        # as older steps in a price.
        self._prompt_tokens, self._cached_tokens = 0.0, 0.0
        # Those that drafts would not serve exactly; one that SGLang retracts comes back as it was.
        self._counted: weakref.WeakSet[Req] = weakref.WeakSet()
        self._told: set[str] = set()  # reasons

    def are(self, reqs: Sequence[Req]) -> bool:
        """Return whether these are the requests of the last update."""
        return self._reqs == reqs

    def prompts(self, row_us: float | None) -> PromptFacts:
        """Return what their prompts take of the draft.

        Args:
            row_us: what it takes for a row, as measured; None where it is not.
        """
        return self._prompts._replace(prompt_row_us=row_us)

    def left_out(self, batch: ScheduleBatch, plain_steps: Callable[[int], int]) -> int:
        """Return how many prompts of a prefill the draft leaves out: all of them or none.

        It leaves out those of requests that want no drafts or cannot be served exactly with them,
        and where the policy decodes plainly, of those that end before its next try. Such a request
        is decoded plainly to its end. Where prompts are found in the cache again nothing is left
        out: a later request would draft behind what the draft has not seen.

        Args:
            batch: that is prefilled.
            plain_steps: as `Decider.plain_steps`.
        """
        if not self._has_draft:
            return 0
        for req in batch.reqs:
            self._prompt_tokens = KEEP * self._prompt_tokens + len(req.origin_input_ids)
            self._cached_tokens = KEEP * self._cached_tokens + req.cached_tokens
        self._coming += batch.reqs
        running = sum(not req.finished() for req in {*self._reqs, *self._coming})
        steps = plain_steps(running)
        is_of_use = (
            self._reuse > MAX_REUSE
            or batch.chunked_req is not None  # its next part needs this one
            or not all(_is_done_by(req, steps) for req in batch.reqs)
        )
        if is_of_use:
            self._left_out.difference_update(batch.reqs)
            return 0
        self._left_out.update(batch.reqs)
        return len(batch.reqs)

    @property
    def _reuse(self) -> float:
        """Share of the last prompts' tokens that the cache held."""
        return self._cached_tokens / max(1.0, self._prompt_tokens)

    def update(self, reqs: Sequence[Req], count: Callable[[int], None]) -> np.ndarray | None:
        """Read the requests of a step; log why some of them have to be decoded plainly.

        Args:
            reqs: the batch's requests.
            count: told how many of these are decoded plainly for the first time.

        Returns:
            [B], what the tokens of each request are worth: `mode_weights`. 0 for one that gets no
            drafts, as it wants none, cannot be served exactly with them or is left out; None where
            all are worth the same.
        """
        self._reqs, self._coming = list(reqs), []
        rows = 0  # where prompts are found again, plain decoding has the draft run them too
        if self._reuse <= MAX_REUSE:
            rows = sum(len(req.origin_input_ids) - req.cached_tokens for req in reqs)
        tokens = sum(max(1, req.sampling_params.max_new_tokens) for req in reqs)
        reasons = {req: reason for req in reqs if (reason := why_plain(req)) is not None}
        asked = zip(reqs, modes_of(reqs), strict=True)
        modes = [OFF if req in reasons else mode for req, mode in asked]
        self.sampling = _sampling_needs(reqs, modes)
        num_others = modes.count(OFF)  # get no drafts in any case
        # Verify serves those that are left out exactly as it does others.
        if self._left_out:
            asked = zip(reqs, modes, strict=True)
            modes = [OFF if req in self._left_out else mode for req, mode in asked]
        self._prompts = PromptFacts(
            prompt_rows=rows / len(reqs),
            answer_tokens=tokens / len(reqs),
            num_left_out=modes.count(OFF) - num_others,
            reuse=self._reuse,
        )
        differ = any(mode != THROUGHPUT for mode in modes)
        weights = np.array(mode_weights(modes)) if differ else None
        self.drawn = None
        if self._draws:
            samples = np.array([req.sampling_params.top_k != 1 for req in reqs])
            samples &= True if weights is None else weights > 0.0
            self.drawn = samples if samples.any() else None
        if new := reasons.keys() - self._counted:
            count(len(new))
            self._counted |= new
        for reason in set(reasons.values()) - self._told:
            self._told.add(reason)
            logger.info(
                "CAST: a request is decoded without drafts, because of %s; others like it are "
                "counted as plain_requests",
                reason,
            )
        return weights


def _is_done_by(req: Req, plain_steps: int) -> bool:
    """Return whether a request that is prefilled will have ended before anything is drafted."""
    if _mode_of(req.sampling_params.custom_params) == OFF:
        return True
    if why_plain(req) not in (None, "min_new_tokens"):  # that one ends
        return True
    # The prefill brings the first token.
    left = req.sampling_params.max_new_tokens - len(req.output_ids) - 1
    return plain_steps > 0 and left <= plain_steps


def _sampling_needs(reqs: Sequence[Req], modes: Sequence[str]) -> SamplingNeeds | None:
    """Return what SGLang's verify lacks for a batch of these modes; None for nothing."""
    truncates = any(
        params.top_k != 1
        and (params.min_p > 0.0 or (params.top_k != TOP_K_ALL and params.top_p < 1.0))
        for params in (req.sampling_params for req in reqs)
    )
    is_plain = np.array([mode == OFF for mode in modes]) if OFF in modes else None
    return SamplingNeeds(truncates, is_plain) if truncates or is_plain is not None else None


def _mode_of(custom_params: Any) -> str:
    if custom_params is None:  # as in most requests
        return THROUGHPUT
    try:
        return parse_mode(custom_params)
    except ConfigError:
        return THROUGHPUT
