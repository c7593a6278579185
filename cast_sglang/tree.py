"""The draft trees of one step, one per request of the batch.

Shape letters: B requests, K `topk` candidates per expanded node, W nodes expanded (kept) per
layer, M candidates in all, N `num_draft_tokens` (nodes verified, root included).

A *candidate* is a token that was proposed. Candidates are numbered in the order of proposal: first
the drafted ones, the K children of the root, then K children of each expanded node, layer by layer;
then those that were grafted. Code that knows drafted candidates alone reads their numbering through
`proposer_of` and the functions beside it. Each candidate names its parent (`DraftTree.parents`),
whose number is lower than its own.

The tree only stores tensors. A policy makes the decisions (`policy`), `ops` holds the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

__all__ = [
    "DraftTree",
    "Frontier",
    "RankedNodes",
    "Selection",
    "TreeOps",
    "first_child_of",
    "layer_ends",
    "parents_of",
    "proposer_of",
]

Numbers = TypeVar("Numbers", int, np.ndarray, torch.Tensor)


def proposer_of(candidates: Numbers, topk: int) -> Numbers:
    """Return which expanded node proposed each candidate: 0 is the root, then in order."""
    return candidates // topk


def first_child_of(proposers: Numbers, topk: int) -> Numbers:
    """Return the number of the first of the K candidates that each expanded node proposed."""
    return proposers * topk


def layer_ends(widths: Sequence[int], topk: int) -> np.ndarray:
    """Return [layers] int64, 1 + each layer's last number; layer i + 1 expanded widths[i]."""
    return topk * np.cumsum([1, *widths])


def parents_of(expanded: np.ndarray, topk: int) -> np.ndarray:
    """Return [M] int64, each candidate's parent (-1: root); `expanded` [E] int, in order."""
    return np.repeat(np.concatenate(([-1], expanded)), topk)


class Frontier(NamedTuple):
    """The best candidates of the newest layer, best first."""

    scores: torch.Tensor  # [B, K] float32, descending
    node_index: torch.Tensor  # [B, K] int64, candidate numbers
    tokens: torch.Tensor  # [B, K] int64
    parents: torch.Tensor  # [B, K] int64, row of the parent among the W kept nodes above


class RankedNodes(NamedTuple):
    """Candidates of the whole tree, best first; any first k of them form a tree with the root."""

    scores: torch.Tensor  # [B, n] float32, descending
    node_index: torch.Tensor  # [B, n] int64, candidate numbers


class Selection(NamedTuple):
    """The nodes to verify. The root is row 0 of a request, and entry i of each array is row i + 1.

    A request with fewer than N nodes fills its remaining entries with candidate number M. No
    candidate has this number, and its parent's row is -1, so that it hangs nowhere.
    """

    top_scores_index: torch.Tensor  # [B, N - 1] int64, ascending candidate numbers
    draft_tokens: torch.Tensor  # [B, N - 1] int64
    parent_rows: torch.Tensor  # [B, N - 1] int64, row of each node's parent, lower than its own


class TreeOps(Protocol):
    """The ops that a tree calls: the module that `ops.ops_for` returns."""

    grow_layer: Any
    rank_nodes: Any
    select_nodes: Any


class DraftTree:
    """A tree that grows layer by layer.

    A node's score is the product of the draft probabilities along its path (EAGLE-2's confidence),
    so a child never scores above its parent.

    Args:
        tokens: [B, K] int64, the root's candidate tokens.
        probs: [B, K] float32 in [0, 1], their probabilities; with a curve, descending.
        max_layers: D, layers the tree may grow to (`--speculative-num-steps`).
        ops: `ops.ops_for` of the tensors' device.
        curve: `ops.contract.AcceptanceCurve` to calibrate `probs` by; None to take them as given.
        is_drawn: [B] bool, requests whose children are drawn at random; None where none are. Their
            `probs` are what `ops.sampled` gives, and `ranked_settled` says what they may verify.

    Source: Li et al., "EAGLE-2" (arXiv 2406.16858), sections 4.1 and 4.2.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        max_layers: int,
        ops: TreeOps,
        curve: Any = None,
        is_drawn: torch.Tensor | None = None,
    ) -> None:
        if tokens.shape != probs.shape or tokens.dim() != 2:
            raise ValueError(
                f"tokens and probs must both be [B, K], got {tuple(tokens.shape)} "
                f"and {tuple(probs.shape)}"
            )
        self.max_layers = max_layers
        self.topk = tokens.shape[1]
        self._tokens = [tokens]
        # For each layer above the newest: best candidate numbers, and how many were expanded.
        self._kept: list[tuple[torch.Tensor, int]] = []
        self._ops = ops
        self._num_candidates = self.topk
        self._grafted: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens, parents
        # The draft's probabilities are sorted, calibrated ones need not be.
        grown = ops.grow_layer(probs.new_ones(len(probs), 1), probs, tokens, 0, curve)
        self._frontier = grown.frontier
        self._is_drawn = None if is_drawn is None else is_drawn.unsqueeze(1)
        self._scores = [self._ordered(grown.scores)]

    def _ordered(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, W * K] where no later draw of a node is above an earlier one.

        They are that already but for rounding. Verify goes through the draws in their order, and
        leaves out none before another.
        """
        if self._is_drawn is None:
            return scores
        by_node = scores.view(len(scores), -1, self.topk).cummin(2).values
        return torch.where(self._is_drawn, by_node.view(scores.shape), scores)

    @property
    def is_drawn(self) -> torch.Tensor | None:
        """[B] bool, requests whose children are drawn at random; None where none are."""
        return None if self._is_drawn is None else self._is_drawn.squeeze(1)

    @property
    def num_layers(self) -> int:
        """Layers grown so far; layer 1 holds the root's children."""
        return len(self._tokens)

    @property
    def num_candidates(self) -> int:
        """M, candidates per request in all layers, and those that were grafted."""
        return self._num_candidates

    @property
    def tokens(self) -> torch.Tensor:
        """[B, M] int64, the token of each candidate."""
        drafted = [tokens.view(len(self._tokens[0]), -1) for tokens in self._tokens]
        return torch.cat(drafted + [tokens for tokens, _ in self._grafted], dim=1)

    @property
    def parents(self) -> torch.Tensor:
        """[B, M] int64, the candidate number of each candidate's parent, -1 for the root."""
        proposers = self._tokens[0].new_full((len(self._tokens[0]), 1), -1)
        proposers = torch.cat([proposers, *self.expanded], dim=1)
        drafted = proposers.repeat_interleave(self.topk, dim=1)
        return torch.cat([drafted, *(parents for _, parents in self._grafted)], dim=1)

    @property
    def scores(self) -> torch.Tensor:
        """[B, M] float32, the score of each candidate."""
        return torch.cat(self._scores, dim=1)

    @property
    def newest(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [B * W, K], scores [B, W * K] and best candidates [B, K] of the newest layer."""
        return self._tokens[-1], self._scores[-1], self._frontier.node_index

    @property
    def expanded(self) -> list[torch.Tensor]:
        """[B, W] int64 for each layer above the newest: the expanded candidates, best first."""
        return [nodes[:, :width] for nodes, width in self._kept]

    def frontier(self) -> Frontier:
        """Return the newest layer's best K candidates."""
        return self._frontier

    def grow(
        self,
        kept: Frontier,
        width: int,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        curve: Any = None,
    ) -> torch.Tensor:
        """Add the layer below the best `width` nodes of the newest layer.

        Args:
            kept: the newest layer's `frontier()`.
            width: W, how many of its nodes were expanded; 1 <= W <= K.
            tokens: [B * W, K] int64, children of each expanded node, request-major.
            probs: [B * W, K] float32, the draft model's probabilities of those children.
            curve: `ops.contract.AcceptanceCurve` to calibrate them by; None to take them as given.

        Returns:
            [B * W, K] float32, `probs` after calibration, which the new scores are made of.

        Raises:
            ValueError: the shapes do not fit, or the tree already has `max_layers` layers.
        """
        batch_size = kept.node_index.shape[0]
        if self.num_layers >= self.max_layers:
            raise ValueError(f"the tree already has {self.max_layers} layers")
        if tokens.shape != (batch_size * width, self.topk) or probs.shape != tokens.shape:
            raise ValueError(
                f"children must be [{batch_size * width}, {self.topk}], got "
                f"{tuple(tokens.shape)} and {tuple(probs.shape)}"
            )
        grown = self._ops.grow_layer(kept.scores, probs, tokens, self._num_candidates, curve)
        self._kept.append((kept.node_index, width))
        self._scores.append(self._ordered(grown.scores))
        self._tokens.append(tokens)
        self._num_candidates += width * self.topk
        self._frontier = grown.frontier
        return grown.probs

    def graft(
        self,
        scores: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
        grafted_scores: torch.Tensor,
    ) -> None:
        """Add candidates that no draft model proposed; no layer can be grown behind them.

        Args:
            scores: [B, M] float32, in place of those of all candidates so far.
            parents: [B, n] int64, candidate numbers, -1 for the root, each lower than the number of
                its child; the n new ones follow the M so far.
            tokens: [B, n] int64.
            grafted_scores: [B, n] float32, none above the parent's.

        Raises:
            ValueError: the shapes do not fit.
        """
        shape = len(self._tokens[0]), self._num_candidates
        if scores.shape != shape or not parents.shape == tokens.shape == grafted_scores.shape:
            raise ValueError(
                f"scores must be {list(shape)}, and parents, tokens and grafted_scores of one "
                f"shape, got {tuple(scores.shape)}, {tuple(parents.shape)}, "
                f"{tuple(tokens.shape)} and {tuple(grafted_scores.shape)}"
            )
        self._scores = [scores, grafted_scores]
        self._grafted = [*self._grafted, (tokens, parents)]
        self._num_candidates += tokens.shape[1]
        self.max_layers = self.num_layers

    def ranked(self, num_nodes: int, num_layers: int | None = None) -> RankedNodes:
        """Rank all candidates; return each request's best `num_nodes`, or all if there are fewer.

        The sort is stable, so of equal scores the shallower node comes first. Otherwise a child of
        probability 1 could displace its own parent, and the best nodes would not form a tree.

        Args:
            num_layers: rank only the candidates of the first layers; None for all. A tree with
                grafts keeps all its layers.
        """
        num_layers = None if self._grafted else num_layers
        scores = torch.cat(self._scores[:num_layers], dim=1)
        return self._ops.rank_nodes(scores, min(num_nodes, scores.shape[1]))

    def settled_scores(self, least_score: float, max_nodes: int) -> torch.Tensor:
        """Return [B, M] float32, the scores, 0 for candidates that drawn requests may not verify.

        They may verify those of `least_score` or more, the first `max_nodes` of them in the order
        of proposal. Both numbers must come from before the step. So whether a draw is verified
        depends on nothing that was drawn in its place, after it or below it (docs/sampling.md); by
        rank, a node might have to go because of what was found below another one.
        """
        scores = self.scores
        if self._is_drawn is None:
            return scores
        may_stay = (scores >= least_score) & (scores > 0.0)
        may_stay &= may_stay.cumsum(1) <= max_nodes
        return scores.masked_fill(self._is_drawn & ~may_stay, 0.0)

    def ranked_settled(self, settled_scores: torch.Tensor, num_nodes: int) -> RankedNodes:
        """Rank the candidates as `ranked`; those that a drawn request may not verify come last.

        They come in the order of proposal there, so that any first k nodes are a tree still.
        """
        return self._ops.rank_nodes(settled_scores, min(num_nodes, settled_scores.shape[1]))

    def select(
        self, ranked: RankedNodes, num_draft_tokens: int, num_rows: torch.Tensor | None = None
    ) -> Selection:
        """Select each request's best N - 1 nodes for verification.

        Args:
            ranked: this tree's `ranked(n)` with n >= N - 1.
            num_draft_tokens: N, root included; 2 <= N <= M + 1.
            num_rows: [B] int64 in 1..N, nodes of each request, root included; None for N each.
        """
        num_nodes = num_draft_tokens - 1
        if not 1 <= num_nodes <= ranked.node_index.shape[1]:
            raise ValueError(
                f"num_draft_tokens must be in 2..{ranked.node_index.shape[1] + 1}, "
                f"got {num_draft_tokens}"
            )
        selected = self._ops.select_nodes(
            ranked.node_index, self.tokens, self.parents, num_draft_tokens, num_rows
        )
        return Selection(*selected)
