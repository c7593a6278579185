"""What a recorded step may copy: grafted into replayed trees, or in place of whole drafts.

A trace knows the copies that were worth a row of verify, in the mean over all rows, at the recorded
price. So a replay at a lower price knows fewer of them than a server would find. Their chances are
those that the server had learned by then, whatever the replay's own trees would have taught.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cast_sglang.copying.chances import AGREEMENTS
from cast_sglang.copying.contexts import looked_up
from cast_sglang.copying.graft import Grafts, graft
from cast_sglang.policy.acceptance import DRAWN, GREEDY
from cast_sglang.policy.decider import StepFacts
from cast_sglang.trace.records import TracedStep, unpacked
from cast_sglang.tree import DraftTree

__all__ = ["ReplayedCopies", "WholeDrafts", "whole_drafts"]

_NOT_ASKED = AGREEMENTS.index("not asked")


class WholeDrafts(NamedTuple):
    """Drafts that are copied as a whole; [B] each."""

    is_copied: np.ndarray  # bool; the others are drafted by the model
    lengths: np.ndarray  # int64
    accepted: np.ndarray  # float64, tokens of the draft; a mean where the trace does not say
    assumed: np.ndarray  # float64, the part of them that is assumed


class ReplayedCopies:
    """Grafts what a step may copy into trees of its recorded candidates, as the server does.

    Args:
        step: recorded while copies were looked for.
        facts: that the step is decided by.
        num_nodes, least_scores: as of `graft`.
    """

    def __init__(
        self,
        step: TracedStep,
        facts: StepFacts,
        num_nodes: int,
        least_scores: np.ndarray,
    ) -> None:
        copied = [unpacked(r.copied, "int32").reshape(-1, 3) for r in step.requests]
        counts = [(len(r.probs) + len(r.copy_parents)) // 4 for r in step.requests]
        self._ints, self._blocks = looked_up(copied, counts)
        self._table = unpacked(step.copy_chances, "float32")
        self._num_nodes, self._max_depth = num_nodes, facts.copy_depth
        self._least_scores = least_scores
        # Rows say by themselves whether a request samples.
        self._kinds = np.full(len(step.requests), GREEDY)
        if facts.is_drawn is not None:
            self._kinds[facts.is_drawn] = DRAWN
        self._grafts: Grafts | None = None

    def look(self, tree: DraftTree) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find the copies of the tree as it stands; return what `TreePolicy.stand` takes.

        None where there are none.

        Args:
            tree: its tokens are candidate numbers of the record, -1 for others.
        """
        self._grafts = graft(
            *(self._ints, self._blocks, tree.tokens.numpy(), tree.scores.numpy()),
            *(tree.parents.numpy(), tree.topk, self._table, self._kinds),
            num_nodes=self._num_nodes,
            max_depth=self._max_depth,
            least_scores=self._least_scores,
            vocab_size=np.iinfo(np.int32).max,
            nodes=tree.frontier().node_index.numpy(),
        )
        if not self._grafts.has_copies:
            return None
        return torch.from_numpy(self._grafts.best), torch.from_numpy(self._grafts.left)

    def graft_into(self, tree: DraftTree) -> Grafts | None:
        """Add what `look` found to the tree that has grown; None where no request has a copy."""
        grafts = self._grafts
        if grafts is None or not grafts.has_copies:
            return None
        arrays = grafts.scores, grafts.parents, grafts.tokens, grafts.copied_scores
        tree.graft(*map(torch.from_numpy, arrays))
        return grafts


def whole_drafts(
    step: TracedStep, accepted: np.ndarray, least_match: int, max_nodes: int
) -> WholeDrafts:
    """Return the drafts of a step that a server copies as a whole where enough text repeats.

    Definition: where the longest end of a request's text that occurred before has at least
        `least_match` tokens, what followed it the last time is the draft; else the model drafts.

    Args:
        accepted: [B, *], of each candidate 1 or 0, nan where it is not known.
        max_nodes: tokens of a draft at most.

    Source: Hu et al., "SAM Decoding" (arXiv 2411.10666).
    """
    table, size = unpacked(step.copy_chances, "float32"), len(step.requests)
    found = WholeDrafts(
        np.zeros(size, bool), np.zeros(size, np.int64), np.zeros(size), np.zeros(size)
    )
    for b, request in enumerate(step.requests):
        rows = unpacked(request.copied, "int32").reshape(-1, 3)
        child_of = {node: (child, kind) for node, child, kind in rows.tolist()}
        if request.match < least_match or -1 not in child_of:
            continue
        found.is_copied[b] = True
        node, reach, is_known = -1, 1.0, True
        while node in child_of and found.lengths[b] < min(max_nodes, step.copy_depth):
            node, kind = child_of[node]
            if np.isnan(accepted[b, node]):
                reach, is_known = reach * float(table[kind + _NOT_ASKED]), False
            else:
                reach = float(accepted[b, node])
            found.lengths[b] += 1
            found.accepted[b] += reach
            found.assumed[b] += 0.0 if is_known else reach
    return found
