"""Acceptance: from the draft model's probability of a node to the chance that the target takes it.

A node's score is the product of draft probabilities along its path. A draft model is a little too
sure of itself, more so the deeper it drafts on its own output, so raw products over-state how far a
path survives. Every verify pass tells the truth about some nodes, and from it this module learns

    g(p, depth) = P(node accepted | its parent accepted, draft probability p given the parent)

Trees that grow by g(p, depth) instead of p have the calibrated path scores
score = parent's score * g(p, depth), which never exceed the parent's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Acceptance", "Outcomes", "Reliability", "verify_outcomes"]

# Knots of g along p, even in arcsin(sqrt(p)): the transform that gives shares of any size equal
# variance. They are dense near 0 and 1, where drafts are and where errors of a path multiply.
_KNOTS = np.sin(np.linspace(0.0, np.pi / 2, 17)) ** 2
_WIDTHS = np.diff(_KNOTS)
# Last depth of each bucket: 1, 2, 3-4, 5-8, 9 and deeper. The root's children are at depth 1.
_DEPTH_ENDS = np.array([1, 2, 4, 8])
_SHAPE = (len(_DEPTH_ENDS) + 1, len(_KNOTS))
_CELLS = _SHAPE[0] * _SHAPE[1]
_FORMAT = 1

PRIOR_WEIGHT = 8.0
HALF_LIFE = 256


class Reliability(NamedTuple):
    """What was predicted and what happened around one knot of g; sums over forgotten nodes."""

    first_depth: int
    num_nodes: float  # observed nodes, recent ones counting more
    drafted: float  # accepted nodes by the draft's probabilities
    calibrated: float  # accepted nodes by g as it is now
    accepted: float  # accepted nodes


class Outcomes(NamedTuple):
    """What a verify pass showed of its nodes; [B, N - 1] each, the root left out."""

    depths: np.ndarray  # int64, the root's children at 1
    parent_accepted: np.ndarray  # bool
    accepted: np.ndarray  # bool


class Acceptance:
    """Online estimate of g, linear in p between knots, one curve for each bucket of depths.

    Near each knot the estimate is p plus the mean of (accepted - p), shrunk by `prior_weight`
    imagined nodes for which p was right; so without data g(p) = p exactly. Then the curve is made
    not to fall in p (isotonic regression), so ranks among siblings stay the draft's.

    Old evidence halves every `half_life` updates. Nothing is random, so processes that see the same
    passes hold the same map.

    Args:
        prior_weight: imagined nodes in favour of the draft's own probability, at each knot, > 0.
        half_life: updates after which a node counts half, > 0. An update brings some ten nodes per
            request, so the default remembers thousands and still follows a change of text.
    """

    def __init__(self, prior_weight: float = PRIOR_WEIGHT, half_life: float = HALF_LIFE) -> None:
        self._prior_weight = prior_weight
        self._keep = 0.5 ** (1.0 / half_life)
        # Nodes, sum of p, accepted nodes; each node is shared by the two knots around it.
        self._sums = np.zeros((3, *_SHAPE))
        self._curves: np.ndarray | None = None  # None when data came in since the last look
        self._lines: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        probs: np.ndarray,
        depths: np.ndarray,
        parent_accepted: np.ndarray,
        accepted: np.ndarray,
    ) -> None:
        """Learn from the nodes of one verify pass.

        Only children of accepted nodes count, the root being accepted always: the target never
        looked below a rejected node, so its descendants say nothing (they are censored).

        Args:
            probs: [n] the draft's probability of each verified node given its parent, uncalibrated.
            depths: [n] int, >= 1.
            parent_accepted: [n] bool.
            accepted: [n] bool.
        """
        seen = parent_accepted & np.isfinite(probs)
        p = np.clip(probs[seen].astype(np.float64), 0.0, 1.0)
        left = np.searchsorted(_KNOTS[1:-1], p, side="right")
        right_share = (p - _KNOTS[left]) / _WIDTHS[left]
        cell = np.searchsorted(_DEPTH_ENDS, depths[seen]) * _SHAPE[1] + left
        cells = np.concatenate((cell, cell + 1))
        shares = np.concatenate((1.0 - right_share, right_share))
        hits = accepted[seen]
        self._sums *= self._keep
        sums = self._sums.reshape(3, _CELLS)
        sums[0] += np.bincount(cells, shares, _CELLS)
        sums[1] += np.bincount(cells, shares * np.concatenate((p, p)), _CELLS)
        sums[2] += np.bincount(cells, shares * np.concatenate((hits, hits)), _CELLS)
        self._curves = None
        self._lines.clear()

    def calibrated(self, probs: torch.Tensor, depth: int) -> torch.Tensor:
        """Return g(probs, depth), in the shape and on the device of `probs`.

        Grow the tree with these in place of `probs`, so that its scores are calibrated.

        Args:
            probs: [...] float32 in [0, 1], draft probabilities of nodes given their parents.
            depth: their layer, 1 for the root's children.

        Effects: no host sync; one small copy to the device after each update.
        """
        if probs.device.type == "cpu":
            row = self.curves()[int(np.searchsorted(_DEPTH_ENDS, depth))]
            return torch.from_numpy(np.interp(probs.numpy(), _KNOTS, row).astype(np.float32))
        knots, starts, slopes = self.lines_at(depth, probs.device)
        piece = torch.bucketize(probs, knots, right=True)
        return torch.addcmul(starts[piece], slopes[piece], probs).clamp_(0.0, 1.0)

    def lines_at(
        self, depth: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return knots [P - 1], starts [P] and slopes [P] of g at one depth; see `lines`."""
        knots, starts, slopes = self.lines(device)
        row = int(np.searchsorted(_DEPTH_ENDS, depth))
        return knots, starts[row], slopes[row]

    def lines(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the inner knots of g, and where each piece starts and how it rises, on a device.

        Returns:
            knots [P - 1], starts [R, P] and slopes [R, P], float32, of P pieces and R buckets of
            depths: g(p) = starts[r, i] + slopes[r, i] * p in piece i.
        """
        lines = self._lines.get(device)
        if lines is None:
            curves = self.curves()
            slopes = np.diff(curves, axis=1) / _WIDTHS
            starts = curves[:, :-1] - slopes * _KNOTS[:-1]
            # One copy for the three: inner knots in the first row, then starts, then slopes.
            packed = np.zeros((1 + 2 * _SHAPE[0], len(_WIDTHS)), dtype=np.float32)
            packed[0, :-1] = _KNOTS[1:-1]
            packed[1 : 1 + _SHAPE[0]], packed[1 + _SHAPE[0] :] = starts, slopes
            table = torch.from_numpy(packed).to(device, non_blocking=True)
            lines = (table[0, :-1], table[1 : 1 + _SHAPE[0]], table[1 + _SHAPE[0] :])
            self._lines[device] = lines
        return lines

    def curves(self) -> np.ndarray:
        """Return g at the knots, one row for each bucket of depths."""
        if self._curves is None:
            count, drafted, accepted = self._sums
            weights = count + self._prior_weight
            raw = np.clip(_KNOTS + (accepted - drafted) / weights, 0.0, 1.0)
            self._curves = _isotonic(raw, weights)
        return self._curves

    def reliability(self) -> list[Reliability]:
        """Return predicted and observed acceptance where there is data, for plots."""
        rows = []
        for bucket, first_depth in enumerate((1, *(int(end) + 1 for end in _DEPTH_ENDS))):
            curve = self.curves()[bucket]
            for count, drafted, accepted in self._sums[:, bucket].T.tolist():
                if count > 0.0:
                    calibrated = count * float(np.interp(drafted / count, _KNOTS, curve))
                    rows.append(Reliability(first_depth, count, drafted, calibrated, accepted))
        return rows

    def state(self) -> dict[str, Any]:
        """Return what was learned, as a plain object that JSON can hold."""
        names = ("nodes", "drafted", "accepted")
        sums = {name: part.tolist() for name, part in zip(names, self._sums, strict=True)}
        return {"format": _FORMAT, **sums}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what another object's `state()` returned.

        Raises:
            ValueError: it is not such a state; nothing is changed then.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"not an acceptance state of format {_FORMAT}")
        try:
            sums = np.array([state["nodes"], state["drafted"], state["accepted"]], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("acceptance state: a table is missing or is no table") from error
        if sums.shape != self._sums.shape:
            raise ValueError(f"acceptance state: tables must be {_SHAPE}, got {sums.shape[1:]}")
        most = sums[0] * (1 + 1e-9) + 1e-9
        if not (np.isfinite(sums).all() and (sums >= 0).all() and (sums[1:] <= most).all()):
            raise ValueError("acceptance state: need 0 <= drafted, accepted <= nodes < inf")
        self._sums = sums
        self._curves = None
        self._lines.clear()


def verify_outcomes(
    parent_list: np.ndarray,
    top_scores_index: np.ndarray,
    accept_index: np.ndarray,
    widths: Sequence[int],
    topk: int,
) -> Outcomes:
    """Read from a verify pass which nodes were accepted, and which had an accepted parent.

    Candidate g is a child of expanded node g // K, and stands in verified row 1 + its place in the
    ascending `top_scores_index`; row 0 is the root.

    Args:
        parent_list: [B, *] int, `tree.Selection`'s.
        top_scores_index: [B, N - 1] int, `tree.Selection`'s.
        accept_index: [B, *] int, rows of the accepted nodes and the root counted through the batch
            (b * N + row), -1 for none; as SGLang's verify returns it.
        widths: nodes expanded per request in each layer below the root.
        topk: K.
    """
    batch_size, num_nodes = top_scores_index.shape
    rows = num_nodes + 1
    is_accepted = np.zeros((batch_size, rows), dtype=bool)
    is_accepted.ravel()[accept_index[accept_index >= 0]] = True
    is_accepted[:, 0] = True
    # Candidate numbers made unique through the batch find all parents' rows in one search.
    stride = topk * (2 + sum(widths))
    offsets = stride * np.arange(batch_size)[:, None]
    parents = np.take_along_axis(parent_list, top_scores_index // topk, axis=1)
    flat = (top_scores_index + offsets).ravel()
    place = np.searchsorted(flat, (np.maximum(parents, 0) + offsets).ravel())
    place = place.reshape(batch_size, num_nodes) - num_nodes * np.arange(batch_size)[:, None]
    parent_row = np.where(top_scores_index < topk, 0, place + 1)
    layer_starts = topk * np.cumsum([1, *widths])
    return Outcomes(
        depths=np.searchsorted(layer_starts, top_scores_index, side="right") + 1,
        parent_accepted=np.take_along_axis(is_accepted, parent_row, axis=1),
        accepted=is_accepted[:, 1:],
    )


def _isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return each row's closest not falling curve, in weighted squares.

    Definition: out[i] = max over a <= i of min over b >= i of the weighted mean of values[a..b]

    Source: Barlow et al., "Statistical inference under order restrictions" (1972), max-min formula.
    """
    if (np.diff(values, axis=1) >= 0.0).all():
        return values
    zeros = np.zeros((len(values), 1))
    total = np.concatenate((zeros, np.cumsum(values * weights, axis=1)), axis=1)
    weight = np.concatenate((zeros, np.cumsum(weights, axis=1)), axis=1)
    n = values.shape[1]
    valid = np.tri(n, dtype=bool).T  # [a, b], a <= b
    spans = np.where(valid, weight[:, None, 1:] - weight[:, :-1, None], 1.0)
    means = np.where(valid, (total[:, None, 1:] - total[:, :-1, None]) / spans, np.inf)
    least = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    return np.where(valid, least, -np.inf).max(axis=1)
