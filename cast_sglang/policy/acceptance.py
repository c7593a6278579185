"""Calibration: map the draft model's probability of a node to the chance that it is accepted.

A node's score is the product of draft probabilities along its path. A draft model is overconfident,
more so the deeper it drafts on its own output, so the raw product overestimates the chance that the
whole path is accepted. From the nodes of every verify pass this module learns

    g(x, depth) = P(node accepted | its parent accepted, none of its earlier siblings accepted)

where x is the draft's probability under the same condition, p / (1 - sum of p of those siblings).
At most one of a node's children is accepted. A map of p itself would ignore this, and the chances
of siblings could sum to more than 1. Instead, a node's chance given its parent is g(x) times
(1 - sum of the chances of its earlier siblings).

The calibrated score of a node is its parent's score times its chance, so it never exceeds the
parent's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import AcceptanceCurve

__all__ = ["Acceptance", "Reliability"]

# Knots of g, evenly spaced in arcsin(sqrt(x)), the transform that makes the variance of an observed
# share independent of its size. They are dense near 0 and 1, where most drafts are.
_KNOTS = np.sin(np.linspace(0.0, np.pi / 2, 17)) ** 2
_WIDTHS = np.diff(_KNOTS)
# Last depth of each bucket: 1, 2, 3-4, 5-8, 9 and deeper. The root's children are at depth 1.
_DEPTH_ENDS = (1, 2, 4, 8)
_SHAPE = (len(_DEPTH_ENDS) + 1, len(_KNOTS))
_FORMAT = 2

# Small, so that g adapts fast to an underconfident draft, whose trees stay small and yield little
# data. An overconfident draft is corrected soon in any case, since many of its nodes are verified.
PRIOR_WEIGHT = 2.0
HALF_LIFE = 256
# The curve on the device is rebuilt once this fraction of the updates that count is missing in it.
REMAKE_SHARE = 8


class Reliability(NamedTuple):
    """Predicted and observed acceptance near one knot of g; weighted sums over nodes."""

    first_depth: int
    num_nodes: float  # observed nodes; recent ones count more
    drafted: float  # accepted nodes predicted by the draft's probabilities
    calibrated: float  # accepted nodes predicted by g as it is now
    accepted: float  # accepted nodes observed


class Acceptance:
    """Online estimate of g, linear in x between knots, one curve for each bucket of depths.

    At each knot the estimate is a prior h(x) plus the mean of (accepted - h(x)), shrunk towards 0
    as if `prior_weight` further nodes had agreed with h. For the root's children h(x) = x; for
    deeper buckets h is the curve of the bucket above. So without data g(x) = x exactly, and the
    first layers also correct deeper ones that have no data yet: otherwise an underconfident draft
    would never get to grow those. Isotonic regression then makes the curve non-decreasing in x.

    The weight of a node halves every `half_life` updates. Nothing is random, so processes that see
    the same passes hold the same curves.

    Args:
        prior_weight: weight of the prior at each knot, in nodes, > 0.
        half_life: updates after which a node counts half, > 0. An update holds about ten nodes per
            request, so the default remembers thousands and still follows a change of text.
    """

    def __init__(self, prior_weight: float = PRIOR_WEIGHT, half_life: float = HALF_LIFE) -> None:
        self._prior_weight = prior_weight
        self._half_life = half_life
        self._keep = 0.5 ** (1.0 / half_life)
        # Nodes, sum of x, accepted nodes; each node is split between the two knots around it.
        self._sums = np.zeros((3, *_SHAPE))
        # Built on demand. Those on a device may lack the latest updates.
        self._curves: np.ndarray | None = None
        self._device_curves: dict[
            torch.device, list[AcceptanceCurve]
        ] = {}  # of depth 1, 2 and so on
        self._num_updates = self._age = 0

    def update(
        self,
        shares: np.ndarray,
        depths: np.ndarray,
        is_tried: np.ndarray,
        accepted: np.ndarray,
    ) -> None:
        """Learn from the nodes of one verify pass; arguments as in `VerifiedNodes`, [n] each.

        Only nodes with `is_tried` count. The target never judged the others: nodes below a rejected
        node, and siblings after an accepted one (they are censored).
        """
        _add_nodes(self._sums, self._keep, shares.astype(np.float64), depths, is_tried, accepted)
        self._curves = None
        self._num_updates += 1
        self._age += 1
        # A copy to the device takes as long as a decision, and one update of many changes little.
        if self._age > min(self._num_updates, self._half_life) // REMAKE_SHARE:
            self._forget_device_curves()

    def curve_at(self, depth: int, device: torch.device) -> AcceptanceCurve:
        """Return g at one depth as linear pieces, for the op `grow_layer`.

        Args:
            depth: of the nodes, 1 for the root's children.
            device: device of the returned tensors.

        Effects: no host sync; after a rebuild, one small copy to the device.
        """
        curves = self._device_curves.get(device)
        if curves is None:
            # One copy for all depths: inner knots in the first row, then starts, then slopes.
            packed = torch.from_numpy(_pack_curves(self.curves()))
            knots, *rows = packed.to(device, non_blocking=True).unbind()
            starts, slopes = rows[: _SHAPE[0]], rows[_SHAPE[0] :]
            curves = self._device_curves[device] = []
            for each in range(1, _DEPTH_ENDS[-1] + 2):
                bucket = bisect_left(_DEPTH_ENDS, each)
                curves.append(AcceptanceCurve(knots[:-1], starts[bucket], slopes[bucket]))
        return curves[min(depth, len(curves)) - 1]

    def _forget_device_curves(self) -> None:
        self._age = 0
        self._device_curves.clear()

    def curves(self) -> np.ndarray:
        """Return [buckets, knots] float64, g at the knots for each bucket of depths."""
        if self._curves is None:
            self._curves = _fit(self._sums, self._prior_weight)
        return self._curves

    def reliability(self) -> list[Reliability]:
        """Return predicted and observed acceptance at each knot that has data, for plots."""
        rows = []
        for bucket, first_depth in enumerate((1, *(int(end) + 1 for end in _DEPTH_ENDS))):
            curve = self.curves()[bucket]
            for count, drafted, accepted in self._sums[:, bucket].T.tolist():
                if count > 0.0:
                    calibrated = count * float(np.interp(drafted / count, _KNOTS, curve))
                    rows.append(Reliability(first_depth, count, drafted, calibrated, accepted))
        return rows

    def state(self) -> dict[str, Any]:
        """Return the sums learned so far, as an object that JSON can hold."""
        names = ("nodes", "drafted", "accepted")
        sums = {name: part.tolist() for name, part in zip(names, self._sums, strict=True)}
        return {"format": _FORMAT, **sums}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by those that another object's `state()` returned.

        Raises:
            ValueError: `state` is not valid; nothing is changed then.
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
        self._forget_device_curves()


@compiled("Tuple((i8, f8))(f8)")
def _piece(p: float) -> tuple[int, float]:
    """Return the piece of g that holds p, and the position of p within it, in 0..1.

    Piece i lies between the knots i and i + 1.
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
    """Scale `sums`, [3, buckets, knots], by `keep`; add each node to the two knots around it."""
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
def _pack_curves(curves: np.ndarray) -> np.ndarray:
    """Return the linear pieces of g: a row of inner knots, then starts, then slopes."""
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
    """Return the non-decreasing curve that is closest to `values` in weighted squares.

    Neighbours that decrease are pooled to their weighted mean until none does.

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
    """Return g at the knots, [buckets, knots], from `sums`, [3, buckets, knots]."""
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
