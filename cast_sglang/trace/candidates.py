"""The recorded candidates of a trace, and the value of a tree that a policy grows over them."""

from __future__ import annotations

import numpy as np

from cast_sglang.copying.graft import Grafts
from cast_sglang.trace.records import TracedRequest, TracedStep, candidate_parents, unpacked
from cast_sglang.trace.reward import TreeReward, tree_reward
from cast_sglang.tree import DraftTree, first_child_of

__all__ = ["RecordedTrees", "ReplayedTree", "recorded_reward"]


class RecordedTrees:
    """The recorded candidates of one step, one row per request.

    The last column, index -1, stands for a candidate that was not recorded. M counts those that
    only copying proposes, which have neither probabilities nor chances.
    """

    def __init__(self, step: TracedStep, topk: int) -> None:
        self._topk = topk
        counts = [(len(r.probs) + len(r.copy_parents)) // 4 for r in step.requests]
        trees = [_tree_of(request, topk, max(counts)) for request in step.requests]
        probs, chances, target_probs, accepted, first_child = zip(*trees, strict=True)
        self.probs = np.stack(probs)  # [B, M + 1] float32, the draft's own
        self.chances = np.stack(chances)  # [B, M + 1] float32, calibrated
        self.target_probs = np.stack(target_probs)  # [B, M + 1], nan where not recorded
        self.accepted = np.stack(accepted)  # [B, M + 1], 1 or 0, nan where it is not known
        self.first_child = np.stack(first_child)  # [B, M + 1], -1 for none
        self._bounds = np.cumsum([0, 1, *step.widths])  # of the expanded nodes of each layer

    def children(self, depth: int) -> np.ndarray:
        """Return [n, 2, K], probabilities and chances of the children of all nodes at a depth.

        If the recorded trees are shallower, those of the deepest layer.
        """
        depth = min(depth, len(self._bounds) - 1)
        start, end = self._bounds[depth - 1 : depth + 1]
        first, last = (first_child_of(int(bound), self._topk) for bound in (start, end))
        parts = (part[:, first:last] for part in (self.probs, self.chances))
        return np.stack([part.reshape(-1, self._topk) for part in parts], axis=1)


class ReplayedTree:
    """A tree that a policy grew over recorded candidates, and what verifying it would accept.

    Args:
        recorded: candidates of the step.
        is_wanted: [B] bool, whether the request wants drafts at all.
    """

    tree: DraftTree

    def __init__(self, recorded: RecordedTrees, is_wanted: np.ndarray) -> None:
        self._recorded = recorded
        self._is_wanted = is_wanted[:, None, None]
        self.reach: list[np.ndarray] = []  # [B, W * K] of each layer: chance of being accepted
        self.is_known: list[np.ndarray] = []  # the same shape: whether the trace shows `reach`
        self._target_probs: list[np.ndarray] = []

    def add(self, nodes: np.ndarray, chances: np.ndarray, parent_reach: np.ndarray) -> None:
        """Add a layer; shapes [B, W, K], [B, W, K] and [B, W]."""
        requests = np.arange(len(nodes))[:, None, None]
        accepted = self._recorded.accepted[requests, nodes]
        is_recorded = ~np.isnan(accepted)
        # At most one child is accepted, but the chances in older traces can sum to more than 1.
        chances = chances / np.maximum(chances.sum(axis=2, keepdims=True), 1.0)
        reach = np.where(is_recorded, accepted, parent_reach[..., None] * chances)
        self.reach.append((reach * self._is_wanted).reshape(len(nodes), -1))
        is_known = is_recorded | (parent_reach == 0.0)[..., None] | ~self._is_wanted
        self.is_known.append(is_known.reshape(len(nodes), -1))
        probs = self._recorded.target_probs[requests, nodes]
        probs = np.where(np.isnan(probs), chances, probs)
        self._target_probs.append(probs.reshape(len(nodes), -1))

    def graft(self, grafts: Grafts) -> None:
        """Add copied candidates, of which `grafts.tokens` says the recorded numbers."""
        batch_size, num_drafted = grafts.scores.shape
        requests = np.arange(batch_size)[:, None]
        accepted = self._recorded.accepted[requests, grafts.tokens]
        probs = self._recorded.target_probs[requests, grafts.tokens]
        # Of the root, of the drafted candidates, and then of the copied ones, parents first.
        reach = np.concatenate([np.ones((batch_size, 1)), *self.reach], axis=1)
        above = np.concatenate([np.ones((batch_size, 1)), grafts.scores], axis=1)
        for i in range(grafts.tokens.shape[1]):
            parents = grafts.parents[:, i : i + 1] + 1
            score, over = grafts.copied_scores[:, i], np.take_along_axis(above, parents, 1)[:, 0]
            chance = np.divide(score, over, out=np.zeros_like(score), where=over > 0.0)
            assumed = np.take_along_axis(reach, parents, 1)[:, 0] * chance
            ours = np.where(np.isnan(accepted[:, i]), assumed, accepted[:, i]) * (score > 0.0)
            probs[:, i] = np.where(np.isnan(probs[:, i]), chance, probs[:, i]) * (score > 0.0)
            reach = np.column_stack([reach, ours * self._is_wanted[:, 0, 0]])
            above = np.column_stack([above, score])
        self.reach.append(reach[:, 1 + num_drafted :])
        self.is_known.append(~np.isnan(accepted) | (self.reach[-1] == 0.0))
        self._target_probs.append(probs)

    def reach_of(self, nodes: np.ndarray) -> np.ndarray:
        """Return the chance of being accepted of candidates of the newest layer, [B, W]."""
        start = sum(layer.shape[1] for layer in self.reach[:-1])
        return np.take_along_axis(self.reach[-1], nodes - start, axis=1)

    def reward(self, nodes: np.ndarray, is_verified: np.ndarray) -> TreeReward:
        """Return the mean reward of the verified trees.

        Where the target's probability was not recorded, the calibrated chance replaces it.

        Args:
            nodes: [B, n] int64, the best candidates.
            is_verified: [B, n] bool, which of them are verified.
        """
        probs = np.concatenate(self._target_probs, axis=1)
        parents, rewards = self.tree.parents.numpy(), []
        for b in range(len(nodes)):
            chosen = np.sort(nodes[b][is_verified[b]])
            rewards.append(tree_reward(chosen, parents[b][chosen], probs[b][chosen]))
        return TreeReward(*(sum(part) / len(rewards) for part in zip(*rewards, strict=True)))


def recorded_reward(step: TracedStep, topk: int) -> TreeReward | None:
    """Return the mean reward of the trees that the server verified.

    None for a plain step, or if the target's probabilities were not recorded.
    """
    rewards = []
    for request in step.requests:
        nodes = unpacked(request.verified, "int32")
        probs = unpacked(request.target_probs, "float32")
        if step.is_plain or len(probs) < len(nodes):
            return None
        parents = candidate_parents(request, topk)[nodes]
        rewards.append(tree_reward(nodes, parents, probs))
    return TreeReward(*(sum(part) / len(rewards) for part in zip(*rewards, strict=True)))


def _tree_of(
    request: TracedRequest, topk: int, num_candidates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what is known of each candidate, in the order of the fields of `RecordedTrees`.

    One more entry at the end, after `num_candidates`, stands for a candidate that was not recorded.
    """
    probs = unpacked(request.probs, "float32")
    chances = unpacked(request.chances, "float32") if request.chances else probs
    expanded = unpacked(request.expanded, "int32")
    count = num_candidates
    first_child = np.full(count + 1, -1, dtype=np.int64)
    first_child[expanded] = first_child_of(np.arange(1, 1 + len(expanded)), topk)
    target_probs = np.full(count + 1, np.nan)
    if request.target_probs:
        nodes = unpacked(request.verified, "int32")
        target_probs[nodes] = unpacked(request.target_probs, "float32")
    accepted = np.zeros(count + 1)
    accepted[request.follows] = 1.0
    accepted[-1] = np.nan
    if request.is_open and count:
        # The request ended here, so nobody knows which node below the last accepted one follows.
        last = request.follows[-1] if request.follows else -1
        is_below = np.zeros(count + 1, dtype=bool)
        for node, parent in enumerate(candidate_parents(request, topk)):
            is_below[node] = parent == last or (parent >= 0 and is_below[parent])
        accepted[is_below] = np.nan
    rest = np.zeros(count + 1 - len(probs), dtype=np.float32)
    probs, chances = (np.append(part, rest) for part in (probs, chances))
    return probs, chances, target_probs, accepted, first_child
