"""Calibration: map the draft model's probability of a node to the chance that it is accepted.

A node's score is the product of draft probabilities along its path. A draft model is overconfident,
more so the deeper it drafts on its own output, so the raw product overestimates the chance that the
whole path is accepted. From the nodes of every verify pass this module learns

    g(x, depth, kind) = P(node accepted | its parent accepted, no earlier sibling accepted)

where x is the draft's probability under the same condition, p / (1 - sum of p of those siblings).
At most one of a node's children is accepted. A map of p itself would ignore this, and the chances
of siblings could sum to more than 1. Instead, a node's chance given its parent is g(x) times
(1 - sum of the chances of its earlier siblings).

The kind of a request is how its target chooses: greedily, or by sampling; and of those that sample,
whether the draft's likeliest tokens are proposed or draws of it. The chances differ up to twofold:
of first children with x from 0.1 to 0.3 the target of the tiny pair accepts 0.42 greedily, and 0.21
sampling at temperature 1. So each kind has its own curves, and a batch may mix the kinds. Of drawn
children x says how sure the draft is, not of which token (`ops.sampled`).

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
from cast_sglang.ops.copies import to_device
from cast_sglang.policy.outcomes import VerifiedNodes

__all__ = ["DRAWN", "GREEDY", "KINDS", "SAMPLED", "Acceptance", "Reliability"]

# How the target chooses the tokens of a request; of `drawn` the drafts are drawn at random too.
KINDS = ("greedy", "sampled", "drawn")
GREEDY, SAMPLED, DRAWN = range(len(KINDS))

# Knots of g, evenly spaced in arcsin(sqrt(x)), the transform that makes the variance of an observed
# share independent of its size. They are dense near 0 and 1, where most drafts are.
_KNOTS = np.sin(np.linspace(0.0, np.pi / 2, 17)) ** 2
_WIDTHS = np.diff(_KNOTS)
# Last depth of each bucket: 1, 2, 3-4, 5-8, 9 and deeper. The root's children are at depth 1.
_DEPTH_ENDS = (1, 2, 4, 8)
_SHAPE = (len(KINDS), len(_DEPTH_ENDS) + 1, len(_KNOTS))
# Of `state`; the earlier ones knew fewer kinds of requests.
_FORMAT = 4

# Small, so that g adapts fast to an underconfident draft, whose trees stay small and yield little
# data. An overconfident draft is corrected soon in any case, since many of its nodes are verified.
# In its place 0.5, 8 and 32 changed the speed on simulated machines by -0.4, +0.2 and -0.1 %, with
# standard errors of 0.6.
PRIOR_WEIGHT = 2.0
# Long enough for thousands of nodes and short enough to follow a change of text: 64 changed the
# speed on simulated machines, with text that changes, by +0.7 % (standard error 0.4).
HALF_LIFE = 256


class Reliability(NamedTuple):
    """Predicted and observed acceptance near one knot of g; weighted sums over nodes."""

    kind: str  # of `KINDS`
    first_depth: int
    num_nodes: float  # observed nodes; recent ones count more
    drafted: float  # accepted nodes predicted by the draft's probabilities
    calibrated: float  # accepted nodes predicted by g as it is now
    accepted: float  # accepted nodes observed


class Acceptance:
    """Online estimate of g, linear in x between knots, by kind of request and bucket of depths.

    At each knot the estimate is a prior h(x) plus the mean of (accepted - h(x)), shrunk towards 0
    as if `prior_weight` further nodes had agreed with h. For the root's children h(x) = x; for
    deeper buckets h is the curve of the bucket above. So without data g(x) = x exactly, and the
    first layers also correct deeper ones that have no data yet: otherwise an underconfident draft
    would never get to grow those. Isotonic regression then makes the curve non-decreasing in x.

    The weight of a node halves every `half_life` updates with requests of its kind. Nothing is
    random, so processes that see the same passes hold the same curves.

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
        # Built on demand from the sums.
        self._curves: np.ndarray | None = None
        self._pieces: list[AcceptanceCurve] = []  # by bucket of depths, for these kinds
        self._kinds: torch.Tensor | None = None

    def update(
        self, nodes: VerifiedNodes, kinds: np.ndarray, remembered: np.ndarray | None = None
    ) -> tuple[float, float]:
        """Learn from the nodes of one verify pass.

        Only nodes with `is_tried` count. The target never judged the others: nodes below a rejected
        node, and siblings after an accepted one (they are censored).

        Args:
            kinds: [B] int64, the kind of each request.
            remembered: `curves()` of before; None for those of now.

        Returns:
            How many of these nodes the remembered curves expect to be accepted, and how many were.
        """
        curves = self.curves() if remembered is None else remembered
        expected, accepted = _add_nodes(self._sums, self._keep, curves, *nodes, kinds)
        self._forget_curves()
        return float(expected), float(accepted)

    def curve_at(self, depth: int, kinds: torch.Tensor) -> AcceptanceCurve:
        """Return g at one depth as linear pieces, for the op `grow_layer`.

        Args:
            depth: of the nodes, 1 for the root's children.
            kinds: [B] int64, the kind of each request, another tensor when they change; on the
                device of the returned tensors.

        Effects: no host sync; after an update and for other kinds, one small copy to the device.
        """
        if kinds is not self._kinds:
            # One copy for all depths: inner knots in the first row, then starts, then slopes.
            packed = to_device(_pack_curves(self.curves()), kinds.device)
            # By bucket of depths, [kinds, pieces] each.
            starts, slopes = packed[1:].view(2, _SHAPE[1], _SHAPE[0], -1)
            self._pieces = [
                AcceptanceCurve(packed[0, :-1], start, slope, kinds)
                for start, slope in zip(starts, slopes, strict=True)
            ]
            self._kinds = kinds
        return self._pieces[bisect_left(_DEPTH_ENDS, depth)]

    def _forget_curves(self) -> None:
        self._curves = self._kinds = None

    def curves(self) -> np.ndarray:
        """Return [kinds, buckets, knots] float64, g at the knots for each bucket of depths."""
        if self._curves is None:
            self._curves = _fit(self._sums, self._prior_weight)
        return self._curves

    def reliability(self) -> list[Reliability]:
        """Return predicted and observed acceptance at each knot that has data, for plots."""
        rows, first_depths = [], (1, *(end + 1 for end in _DEPTH_ENDS))
        for (kind, bucket), _ in np.ndenumerate(self._sums[0, :, :, 0]):
            curve = self.curves()[kind, bucket]
            for count, drafted, accepted in self._sums[:, kind, bucket].T.tolist():
                if count > 0.0:
                    calibrated = count * float(np.interp(drafted / count, _KNOTS, curve))
                    sums = count, drafted, calibrated, accepted
                    rows.append(Reliability(KINDS[kind], first_depths[bucket], *sums))
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
        self._forget_curves()


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


@compiled("i8(i8)")
def _bucket(depth: int) -> int:
    """Return the bucket of depths that holds a depth."""
    bucket = 0
    while bucket < len(_DEPTH_ENDS) and depth > _DEPTH_ENDS[bucket]:
        bucket += 1
    return bucket


@compiled(
    "UniTuple(f8, 2)"
    "(f8[:, :, :, :], f8, f8[:, :, :], f8[:, :], i8[:, :], b1[:, :], b1[:, :], i8[:])"
)
def _add_nodes(
    sums: np.ndarray,
    keep: float,
    curves: np.ndarray,
    shares: np.ndarray,
    depths: np.ndarray,
    is_tried: np.ndarray,
    accepted: np.ndarray,
    kinds: np.ndarray,
) -> tuple[float, float]:
    """Scale the sums of the kinds that occur by `keep`; add each node to the two knots around it.

    Args:
        sums: [3, kinds, buckets, knots].
        curves: [kinds, buckets, knots].

    Returns:
        The sum of g over the tried nodes by these curves, and how many of them were accepted.
    """
    for kind in range(sums.shape[1]):
        if (kinds == kind).any():
            sums[:, kind] *= keep
    expected, count = 0.0, 0.0
    for request in range(len(shares)):
        kind = kinds[request]
        for node in range(shares.shape[1]):
            if not is_tried[request, node] or not np.isfinite(shares[request, node]):
                continue
            p = min(max(shares[request, node], 0.0), 1.0)
            left, right_share = _piece(p)
            bucket = _bucket(depths[request, node])
            count += accepted[request, node]
            for knot, share in ((left, 1.0 - right_share), (left + 1, right_share)):
                expected += share * curves[kind, bucket, knot]
                sums[0, kind, bucket, knot] += share
                sums[1, kind, bucket, knot] += share * p
                if accepted[request, node]:
                    sums[2, kind, bucket, knot] += share
    return expected, count


@compiled("f4[:, :](f8[:, :, :])")
def _pack_curves(curves: np.ndarray) -> np.ndarray:
    """Return the linear pieces of g: a row of inner knots, then starts, then slopes.

    Starts and slopes have a row for each bucket and kind; the kinds of a bucket lie side by side.
    """
    num_kinds, num_buckets, num_knots = curves.shape
    rows = num_kinds * num_buckets
    packed = np.zeros((1 + 2 * rows, num_knots - 1), dtype=np.float32)
    for piece in range(num_knots - 1):
        if piece:
            packed[0, piece - 1] = _KNOTS[piece]
        for bucket in range(num_buckets):
            for kind in range(num_kinds):
                low, row = curves[kind, bucket, piece], 1 + bucket * num_kinds + kind
                slope = (curves[kind, bucket, piece + 1] - low) / _WIDTHS[piece]
                packed[row, piece] = low - slope * _KNOTS[piece]
                packed[row + rows, piece] = slope
    return packed


@compiled("f8[:](f8[:], f8[:])")
def _isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the non-decreasing curve that is closest to `values` in weighted squares.

    Neighbours that decrease are pooled to their weighted mean until none does. The running maximum
    in its place lost 2.2 % (standard error 0.7) of the first 100 steps on simulated machines.

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


@compiled("f8[:, :, :](f8[:, :, :, :], f8)")
def _fit(sums: np.ndarray, prior_weight: float) -> np.ndarray:
    """Return g at the knots, [kinds, buckets, knots], from `sums`, [3, kinds, buckets, knots]."""
    num_kinds, num_buckets, num_knots = sums.shape[1:]
    curves = np.empty((num_kinds, num_buckets, num_knots))
    values, weights = np.empty(num_knots), np.empty(num_knots)
    for kind in range(num_kinds):
        prior = _KNOTS
        for bucket in range(num_buckets):
            for knot in range(num_knots):
                count, drafted, accepted = sums[:, kind, bucket, knot]
                shift = 0.0
                if count > 0.0:
                    left, share = _piece(drafted / count)
                    expected = count * (prior[left] + share * (prior[left + 1] - prior[left]))
                    shift = (accepted - expected) / (count + prior_weight)
                values[knot] = min(max(prior[knot] + shift, 0.0), 1.0)
                weights[knot] = count + prior_weight
            prior = curves[kind, bucket] = _isotonic(values, weights)
    return curves
