"""The trees of a replay: grown anew over recorded candidates, and verified as a policy chooses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cast_sglang.ops import loops
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.trace.candidates import RecordedTrees, ReplayedTree
from cast_sglang.trace.copied import ReplayedCopies, WholeDrafts
from cast_sglang.trace.full_width import layers_kept
from cast_sglang.trace.records import TracedStep, TraceHeader
from cast_sglang.trace.reward import TreeReward
from cast_sglang.tree import DraftTree

__all__ = ["TreeGrower", "VerifiedTree"]


class VerifiedTree(NamedTuple):
    """What a step verifies, and what of it is accepted."""

    widths: tuple[int, ...]
    num_layers: int  # that a model drafted
    depth: int  # of the deepest node that may be accepted
    num_rows: np.ndarray  # [B], root included
    accepted: np.ndarray  # [B] float64, drafts
    assumed: np.ndarray  # [B], the part of them that is assumed
    reward: TreeReward | None

    def with_whole(self, whole: WholeDrafts, is_ragged: bool) -> VerifiedTree:
        """Return this with the drafts that are copied as a whole in place of their trees."""
        num_rows = np.where(whole.is_copied, 1 + whole.lengths, self.num_rows)
        return self._replace(
            depth=max(self.depth, int(whole.lengths.max())),
            num_rows=num_rows if is_ragged else np.full_like(num_rows, num_rows.max()),
            accepted=np.where(whole.is_copied, whole.accepted, self.accepted),
            assumed=np.where(whole.is_copied, whole.assumed, self.assumed),
            reward=None if whole.is_copied.any() else self.reward,
        )


class TreeGrower:
    """Grows a policy's trees over the recorded candidates of a trace's steps.

    Args:
        drafted: a step of the trace with a tree, from which children are drawn at first.
        decider: asks the policy.
        scores_by_chance: the policy goes by calibrated chances, not by the draft's probabilities.
        copies: whether what was copied is copied again.
        rewards: whether to compute the reward of each tree.
        seed: of the random draws of children that were not recorded.
    """

    def __init__(
        self,
        header: TraceHeader,
        drafted: TracedStep,
        decider: Decider,
        *,
        scores_by_chance: bool,
        copies: bool,
        rewards: bool,
        seed: int,
    ) -> None:
        self._header, self._decider = header, decider
        self._scores_by_chance, self._copies, self._rewards = scores_by_chance, copies, rewards
        self._drawn_from = RecordedTrees(drafted, header.topk)
        self._random = np.random.default_rng(seed)

    def verify(self, step: TracedStep, facts: StepFacts, weights: np.ndarray) -> VerifiedTree:
        """Grow the tree of a step that drafts, and verify what the policy chooses of it.

        Args:
            facts: that the decider has begun the step with.
            weights: [B], those of the step's requests.
        """
        is_drawn = facts.is_drawn
        copies = None
        if self._copies and step.copy_chances:
            num_nodes = self._header.verify_sizes[-1] - 1
            copies = ReplayedCopies(step, facts, num_nodes, self._decider.least_scores())
        grown = self._grow(step, weights, is_drawn, copies)
        num_layers = layers_kept(self._decider.policy, grown.tree.num_layers, facts.costs)
        widths = [kept.shape[1] for kept in grown.tree.expanded][: num_layers - 1]
        grafts = None if copies is None else copies.graft_into(grown.tree)
        if grafts is not None:
            grown.graft(grafts)
        ranked = grown.tree.ranked(facts.max_rows - 1, num_layers)
        settled = None
        if is_drawn is not None:
            settled_scores = grown.tree.settled_scores(*self._decider.settlement())
            settled = grown.tree.ranked_settled(settled_scores, facts.max_rows - 1)
        rows = self._decider.rows(ranked.scores, None if settled is None else settled.scores)
        ranked = ranked if settled is None else settled
        size, num_rows = rows
        if grafts is not None:
            size, num_rows = grafts.fit(size, num_rows, self._header.is_ragged)
        if num_rows is None:
            num_rows = np.full(step.batch_size, size)
        nodes = ranked.node_index.numpy()
        is_verified = np.arange(nodes.shape[1]) < num_rows[:, None] - 1
        if grafts is not None:  # the tree has places for copies that a request does not have
            is_verified &= nodes < (grafts.scores.shape[1] + grafts.counts)[:, None]
        if not self._header.is_ragged:  # rows that a drawn request has no node for run empty
            num_rows = np.full(step.batch_size, size)
        reach = np.take_along_axis(np.concatenate(grown.reach, axis=1), nodes, axis=1) * is_verified
        is_known = np.take_along_axis(np.concatenate(grown.is_known, axis=1), nodes, axis=1)
        return VerifiedTree(
            widths=tuple(widths),
            num_layers=num_layers,
            depth=max(num_layers, 0 if grafts is None else grafts.depth),
            num_rows=num_rows,
            accepted=reach.sum(axis=1),
            assumed=(reach * ~is_known).sum(axis=1),
            reward=grown.reward(nodes, is_verified) if self._rewards else None,
        )

    def _grow(
        self,
        step: TracedStep,
        weights: np.ndarray,
        is_drawn: np.ndarray | None,
        copies: ReplayedCopies | None,
    ) -> ReplayedTree:
        recorded = RecordedTrees(step, self._header.topk)
        if not step.is_plain:
            self._drawn_from = recorded
        decider, header, batch_size = self._decider, self._header, step.batch_size
        grown = ReplayedTree(recorded, weights > 0.0)
        root = np.zeros((batch_size, 1), dtype=np.int64)
        first = root if not step.is_plain else root - 1
        nodes, scored, chances = self._children(recorded, first, depth=1)
        probs = torch.from_numpy(scored).view(batch_size, -1)
        tokens = torch.from_numpy(nodes).view(batch_size, -1)
        drawn = None if is_drawn is None else torch.from_numpy(is_drawn)
        tree = DraftTree(tokens, probs, header.num_steps, loops, is_drawn=drawn)
        grown.add(nodes, chances, np.ones((batch_size, 1)))
        while True:
            frontier = tree.frontier()
            with_copies = None if copies is None else copies.look(tree)
            if (width := decider.width(frontier.scores, with_copies)) is None:
                break
            kept = frontier.tokens[:, :width].numpy()
            first = np.take_along_axis(recorded.first_child, kept, axis=1)
            nodes, scored, chances = self._children(recorded, first, tree.num_layers + 1)
            probs = torch.from_numpy(scored).view(batch_size * width, -1)
            decider.expanded(frontier.scores, probs)
            grown.add(nodes, chances, grown.reach_of(frontier.node_index[:, :width].numpy()))
            tree.grow(frontier, width, torch.from_numpy(nodes).view(probs.shape), probs)
        grown.tree = tree
        return grown

    def _children(
        self, recorded: RecordedTrees, first: np.ndarray, depth: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the children of each node: candidates (-1: drawn), policy scores and chances.

        Args:
            first: [B, W] int64, number of each node's first recorded child, -1 for none.
            depth: layer of the children, from which children are drawn.

        Returns:
            nodes, [B, W, K] int64 candidate numbers; scored, [B, W, K] float32, the probabilities
            that the policy decides by; chances, [B, W, K] float32, the calibrated chances.
        """
        is_known = (first >= 0)[..., None]
        nodes = np.where(is_known, first[..., None] + np.arange(self._header.topk), -1)
        requests = np.arange(len(first))[:, None, None]
        probs, chances = recorded.probs[requests, nodes], recorded.chances[requests, nodes]
        if not is_known.all():
            pool = self._drawn_from.children(depth)
            drawn = pool[self._random.integers(len(pool), size=first.shape)]
            probs = np.where(is_known, probs, drawn[..., 0, :])
            chances = np.where(is_known, chances, drawn[..., 1, :])
        scored = chances if self._scores_by_chance else probs
        return nodes, scored, chances
