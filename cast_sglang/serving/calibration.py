"""Calibration: what verify accepted, fed back into the scores of the next trees."""

from __future__ import annotations

import logging
import time
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from cast_sglang.policy.acceptance import DRAWN, GREEDY, SAMPLED, Acceptance
from cast_sglang.policy.outcomes import verify_outcomes
from cast_sglang.serving.drift import Drift
from cast_sglang.serving.host_reads import HostReads, Read
from cast_sglang.serving.stats import StepStats

if TYPE_CHECKING:
    from cast_sglang.ops.contract import AcceptanceCurve
    from cast_sglang.serving.step import Drafted, Verified
    from cast_sglang.tree import Selection

__all__ = ["Calibration"]

# Steps that are learned together: between two passes of a model the code has left the caches, and
# most of the time goes into fetching it. On two cores learning one outcome took 0.26 ms, eight 0.46
# ms, and making the curves 0.24 ms, so this takes 0.09 ms a step in place of 0.5. On simulated
# machines, where that time does not count, eight together lose 0.5 % of the speed of the first 100
# steps and sixteen 1.8 %; later on, sixteen lose nothing.
LEARN_AT_ONCE = 8
LIKELY_CAUSES = (
    "the weights of target or draft have changed, by an update or while their memory was released, "
    "or the draft was trained for another target, other layers or another vocabulary"
)

logger = logging.getLogger(__name__)


class _Lesson(NamedTuple):
    """What is learned from one step, on the device.

    It holds no more of `Drafted` and `Verified` than that: the target's logits are large, and
    several lessons wait to be learned together.
    """

    selection: Selection
    probs: torch.Tensor  # [B, drafted], the draft's own probabilities given the parent
    kinds: torch.Tensor  # [B], of the requests
    topk: int
    accept_index: torch.Tensor | None = None  # None until the step is verified

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors of `verify_outcomes`, in its order, and the kinds."""
        assert self.accept_index is not None
        nodes = self.selection.parent_rows, self.selection.top_scores_index
        return *nodes, self.accept_index, self.probs, self.kinds


class Calibration:
    """Gives the layers of a tree an `Acceptance`'s curves and teaches it by the tree's outcome.

    Outcomes of several steps are learned together when the next tree has been drafted: drafting has
    waited for them, so by then their copies are on the host.

    Args:
        stats: told how far acceptance is from what is remembered.

    Attributes:
        last_change: what was last changed of the models while serving; "" for nothing.
        seconds: host time spent since `begin_step`.
    """

    def __init__(self, reads: HostReads | None = None, stats: StepStats | None = None) -> None:
        self.acceptance = Acceptance()
        self.drift = Drift(self.acceptance)
        self.last_change = ""
        self.seconds = 0.0
        self._stats = StepStats() if stats is None else stats
        self._reads = HostReads("cpu") if reads is None else reads
        # Of the step's requests.
        self._top_ks: torch.Tensor | None = None
        self._is_drawn: torch.Tensor | None = None
        self._kinds: torch.Tensor | None = None
        self._probs: list[torch.Tensor] = []  # of the tree that grows, one entry per layer
        self._lesson: _Lesson | None = None  # of the step that runs
        self._lessons: list[_Lesson] = []
        self._read: Read | None = None  # of all lessons

    def begin_step(self, top_ks: torch.Tensor, is_drawn: torch.Tensor | None = None) -> None:
        """Count `seconds` anew, and note how the target chooses.

        Args:
            top_ks: [B] int, of each request, on the draft's device; another tensor when they
                change. SGLang makes a temperature of 0 a top-k of 1.
            is_drawn: [B] bool, whose drafts are drawn at random; None where no one's are.
        """
        if top_ks is not self._top_ks or is_drawn is not self._is_drawn:
            self._top_ks, self._is_drawn = top_ks, is_drawn
            self._kinds = torch.where(top_ks <= 1, GREEDY, SAMPLED)
            if is_drawn is not None:
                self._kinds = self._kinds.masked_fill_(is_drawn, DRAWN)
        self.seconds = 0.0

    def curve_at(self, probs: torch.Tensor, depth: int) -> AcceptanceCurve:
        """Return what to calibrate a layer's candidates by, in the op that scores them.

        Args:
            probs: [n, K] float32, request-major: the root's children, or those of a layer's nodes.
            depth: the candidates' layer, 1 for the root's children.
        """
        began = time.perf_counter()
        if depth == 1:
            self._probs.clear()
        self._probs.append(probs)
        assert self._kinds is not None, "begin_step comes first"
        curve = self.acceptance.curve_at(depth, self._kinds)
        self.seconds += time.perf_counter() - began
        return curve

    def on_drafted(self, drafted: Drafted) -> None:
        """Keep the tree that the step verifies, and learn from the steps before when it is time."""
        began = time.perf_counter()
        self._learn()
        assert self._kinds is not None
        probs = torch.cat([layer.view(len(self._kinds), -1) for layer in self._probs], dim=1)
        if drafted.wants_drafts is not None:
            # The nodes of the other requests cannot be accepted.
            probs.masked_fill_(~drafted.wants_drafts.unsqueeze(1), torch.nan)
        self._lesson = _Lesson(drafted.selection, probs, self._kinds, drafted.tree.topk)
        self.seconds += time.perf_counter() - began

    def on_verified(self, verified: Verified) -> None:
        """Pair the outcome with the tree that the step drafted; ignored where there is none."""
        lesson, self._lesson = self._lesson, None
        if lesson is not None:
            self._lessons.append(lesson._replace(accept_index=verified.accept_index))
            if len(self._lessons) >= LEARN_AT_ONCE:
                tensors = [tensor for lesson in self._lessons for tensor in lesson.tensors()]
                self._read = self._reads.start(*tensors)

    def _learn(self) -> None:
        if self._read is None:
            return
        arrays = iter([tensor.numpy() for tensor in self._read.wait()])
        for lesson in self._lessons:
            parents, nodes, accepted, probs, kinds = islice(arrays, 5)
            outcome = verify_outcomes(parents, nodes, accepted, probs, lesson.topk)
            was_collapsed = self.drift.is_collapsed
            if self.drift.update(outcome, kinds):
                self._report(was_collapsed)
        self._lessons.clear()
        self._read = None

    def _report(self, was_collapsed: bool) -> None:
        """Export how far acceptance is from what is remembered; log when it collapses, once."""
        ratio = self.drift.ratio
        assert ratio is not None
        self._stats.record_acceptance(ratio)
        if self.drift.is_collapsed and not was_collapsed:
            logger.warning(
                "CAST: drafts are accepted %.2f times as often as calibration remembers. %s. "
                "Policy auto decodes plainly where drafts do not pay. To see whether the draft "
                "fits: cast-sglang doctor --probe URL",
                ratio,
                f"Since then: {self.last_change}"
                if self.last_change
                else f"Likely {LIKELY_CAUSES}",
            )
        elif was_collapsed and not self.drift.is_collapsed:
            logger.warning("CAST: drafts are accepted as before again, %.2f times as often", ratio)
