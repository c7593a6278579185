"""Acceptance: from the draft model's probability of a node to the chance that the target takes it.

A node's score is the product of draft probabilities along its path. A draft model is a little too
sure of itself, more so the deeper it drafts on its own output, so raw products over-state how far a
path survives. Every verify pass tells the truth about some nodes, and from it this module learns

    g(x, depth) = P(node accepted | its parent accepted, none of the siblings before it accepted)

where x is the draft's probability under the same condition, p / (1 - sum of p of those siblings).
Of siblings only one is accepted, so a map of p itself would take what the first ones show for the
chance of all, and the chances of siblings would sum to more than 1. In turn, a node's chance given
its parent is g times what the siblings before it leave.

Trees that grow by these chances have the calibrated path scores score = parent's score * chance,
which never exceed the parent's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import CalibrationLines

__all__ = ["Acceptance", "Reliability"]

# Knots of g along p, even in arcsin(sqrt(p)): the transform that gives shares of any size equal
# variance. They are dense near 0 and 1, where drafts are and where errors of a path multiply.
_KNOTS = np.sin(np.linspace(0.0, np.pi / 2, 17)) ** 2
_WIDTHS = np.diff(_KNOTS)
# Last depth of each bucket: 1, 2, 3-4, 5-8, 9 and deeper. The root's children are at depth 1.
_DEPTH_ENDS = (1, 2, 4, 8)
_SHAPE = (len(_DEPTH_ENDS) + 1, len(_KNOTS))
_FORMAT = 2

# Small: a draft that is too modest keeps trees small until it is known, and one that is too sure is
# soon found out, as its nodes are verified.
PRIOR_WEIGHT = 2.0
HALF_LIFE = 256
# Lines lack at most this part of the updates that count.
REMAKE_SHARE = 8


class Reliability(NamedTuple):
    """What was predicted and what happened around one knot of g; sums over forgotten nodes."""

    first_depth: int
    num_nodes: float  # observed nodes, recent ones counting more
    drafted: float  # accepted nodes by the draft's probabilities
    calibrated: float  # accepted nodes by g as it is now
    accepted: float  # accepted nodes


class Acceptance:
    """Online estimate of g, linear in x between knots, one curve for each bucket of depths.

    Near each knot the estimate is a prior h(x) plus the mean of (accepted - h(x)), shrunk by
    `prior_weight` imagined nodes for which h was right. For the root's children h(x) = x, deeper it
    is the curve of the depths above: so without data g(x) = x exactly, and what the first layer
    shows holds for layers that nobody has grown yet, or a draft that is too modest would keep them
    from being grown. Then the curve is made not to fall in x (isotonic regression).

    Old evidence halves every `half_life` updates. Nothing is random, so processes that see the same
    passes hold the same map.

    Args:
        prior_weight: imagined nodes in favour of the prior, at each knot, > 0.
        half_life: updates after which a node counts half, > 0. An update brings some ten nodes per
            request, so the default remembers thousands and still follows a change of text.
    """

    def __init__(self, prior_weight: float = PRIOR_WEIGHT, half_life: float = HALF_LIFE) -> None:
        self._prior_weight = prior_weight
        self._half_life = half_life
        self._keep = 0.5 ** (1.0 / half_life)
        # Nodes, sum of p, accepted nodes; each node is shared by the two knots around it.
        self._sums = np.zeros((3, *_SHAPE))
        # Made when asked for: the curves of all data, the lines of data that may be a little older.
        self._curves: np.ndarray | None = None
        self._lines: dict[torch.device, list[CalibrationLines]] = {}  # of depth 1, 2 and so on
        self._num_updates = self._age = 0

    def update(
        self,
        shares: np.ndarray,
        depths: np.ndarray,
        is_tried: np.ndarray,
        accepted: np.ndarray,
    ) -> None:
        """Learn from the nodes of one verify pass; arguments as in `VerifiedNodes`, [n] each.

        Only nodes that were tried count: the target never looked below a rejected node, nor at the
        siblings behind an accepted one, so those say nothing (they are censored).
        """
        _add_nodes(self._sums, self._keep, shares.astype(np.float64), depths, is_tried, accepted)
        self._curves = None
        self._num_updates += 1
        self._age += 1
        # One update among many moves them little, and to make them takes as long as a decision.
        if self._age > min(self._num_updates, self._half_life) // REMAKE_SHARE:
            self._forget_lines()

    def lines(self, depth: int, device: torch.device) -> CalibrationLines:
        """Return g at one depth in pieces, for the op that grows a layer.

        Args:
            depth: of the nodes, 1 for the root's children.
            device: where the lines are to be.

        Effects: no host sync; now and then one small copy to the device.
        """
        lines = self._lines.get(device)
        if lines is None:
            # One copy for all: inner knots in the first row, then starts, then slopes.
            packed = torch.from_numpy(_pack_lines(self.curves()))
            knots, *rows = packed.to(device, non_blocking=True).unbind()
            starts, slopes = rows[: _SHAPE[0]], rows[_SHAPE[0] :]
            lines = self._lines[device] = []
            for each in range(1, _DEPTH_ENDS[-1] + 2):
                bucket = bisect_left(_DEPTH_ENDS, each)
                lines.append(CalibrationLines(knots[:-1], starts[bucket], slopes[bucket]))
        return lines[min(depth, len(lines)) - 1]

    def _forget_lines(self) -> None:
        self._age = 0
        self._lines.clear()

    def curves(self) -> np.ndarray:
        """Return g at the knots, one row for each bucket of depths."""
        if self._curves is None:
            self._curves = _fit(self._sums, self._prior_weight)
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
        self._forget_lines()


@compiled("Tuple((i8, f8))(f8)")
def _piece(p: float) -> tuple[int, float]:
    """Return the number of the knot at or below p that is not the last, and how far p is beyond.

    The distance is a share of that to the next knot.
    """
    low, high = 0, len(_WIDTHS)
    while high - low > 1:
        middle = (low + high) // 2
        if p >= _KNOTS[middle]:
            low = middle
        else:
            high = middle
    return low, (p - _KNOTS[low]) / _WIDTHS[low]


@compiled("void(f8[:, :, :], f8, f8[:], i8[:], b1[:], b1[:])")
def _add_nodes(
    sums: np.ndarray,
    keep: float,
    shares: np.ndarray,
    depths: np.ndarray,
    is_tried: np.ndarray,
    accepted: np.ndarray,
) -> None:
    """Forget a little of [3, buckets, knots] and add nodes, each shared by the knots around it."""
    sums *= keep
    for node in range(len(shares)):
        if not is_tried[node] or not np.isfinite(shares[node]):
            continue
        p = min(max(float(shares[node]), 0.0), 1.0)
        left, right_share = _piece(p)
        bucket = 0
        while bucket < len(_DEPTH_ENDS) and depths[node] > _DEPTH_ENDS[bucket]:
            bucket += 1
        for knot, share in ((left, 1.0 - right_share), (left + 1, right_share)):
            sums[0, bucket, knot] += share
            sums[1, bucket, knot] += share * p
            if accepted[node]:
                sums[2, bucket, knot] += share


@compiled("f4[:, :](f8[:, :])")
def _pack_lines(curves: np.ndarray) -> np.ndarray:
    """Return the pieces of g: inner knots, then where the lines start, then how they rise."""
    num_buckets, num_pieces = _SHAPE[0], len(_WIDTHS)
    packed = np.zeros((1 + 2 * num_buckets, num_pieces), dtype=np.float32)
    for piece in range(num_pieces):
        if piece:
            packed[0, piece - 1] = _KNOTS[piece]
        for bucket in range(num_buckets):
            slope = (curves[bucket, piece + 1] - curves[bucket, piece]) / _WIDTHS[piece]
            packed[1 + bucket, piece] = curves[bucket, piece] - slope * _KNOTS[piece]
            packed[1 + num_buckets + bucket, piece] = slope
    return packed


@compiled("f8[:](f8[:], f8[:])")
def _isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the closest not falling curve, in weighted squares.

    Neighbours that fall are pooled to their weighted mean until none does.

    Source: Barlow et al., "Statistical inference under order restrictions" (1972), pool adjacent
    violators.
    """
    n = len(values)
    result = np.empty(n)
    mean, weight = np.empty(n), np.empty(n)  # of each block of pooled neighbours
    end = np.empty(n, dtype=np.int64)
    last = -1
    for i in range(n):
        last += 1
        mean[last], weight[last], end[last] = values[i], weights[i], i + 1
        while last > 0 and mean[last - 1] > mean[last]:
            both = weight[last - 1] + weight[last]
            pooled = mean[last - 1] * weight[last - 1] + mean[last] * weight[last]
            last -= 1
            mean[last], weight[last], end[last] = pooled / both, both, i + 1
    begin = 0
    for block in range(last + 1):
        result[begin : end[block]] = mean[block]
        begin = end[block]
    return result


@compiled("f8[:, :](f8[:, :, :], f8)")
def _fit(sums: np.ndarray, prior_weight: float) -> np.ndarray:
    """Return g at the knots, a row for each bucket of depths, from [3, buckets, knots]."""
    curves, prior = np.empty(_SHAPE), _KNOTS
    values, weights = np.empty(_SHAPE[1]), np.empty(_SHAPE[1])
    for bucket in range(_SHAPE[0]):
        for knot in range(_SHAPE[1]):
            count, drafted, accepted = sums[:, bucket, knot]
            shift = 0.0
            if count > 0.0:
                left, share = _piece(drafted / count)
                expected = count * (prior[left] + share * (prior[left + 1] - prior[left]))
                shift = (accepted - expected) / (count + prior_weight)
            values[knot] = min(max(prior[knot] + shift, 0.0), 1.0)
            weights[knot] = count + prior_weight
        prior = curves[bucket] = _isotonic(values, weights)
    return curves
