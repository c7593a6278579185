"""Prices that set themselves: the tree that makes a step's tokens per time as high as it can be.

A step brings 1 + A tokens per request (A accepted drafts and the bonus token) and takes T, in units
of one target pass over one row per request. The tree with the highest rate (1 + A) / T is the one
that maximises

    A - price * T        at price = the highest rate

(Dinkelbach). So all thresholds of CAST are one number, which serving measures anyway. At a price
below the best rate, the tree that is best at this price has a rate above the price; at a price
above it, one below. So to take the rate just reached as the next price leads to the best one.

Source: Dinkelbach, "On nonlinear fractional programming" (Management Science 13, 1967).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from cast_sglang.costs.model import plain_units
from cast_sglang.policy.base import Costs, TreePolicy
from cast_sglang.policy.lookahead import Lookahead
from cast_sglang.policy.verify_size import best_size, share_out

__all__ = ["AutoPolicy"]

# Steps after which a step counts half in the price.
HALF_LIFE = 32
_KEEP = 0.5 ** (1 / HALF_LIFE)
# Weight of a new bucket's first price, in target passes: some steps, to be outvoted at once.
START_WEIGHT = 4.0

# Steps of an answer that bring nothing: half of its last one lies beyond its end, and half a step
# passes until another request has its place.
LOST_STEPS = 1.0

# What speculation may lose against plain decoding before it gives way, in target passes, at batch
# size 1: more than bad luck, less than a second. Luck evens out with the root of the batch size.
MAX_LOSS = 32.0
# Share of plain decoding's time that tries of speculation may lose.
PROBE_SHARE = 0.01
# In plain decoding the draft is brought up to date every so many steps if that takes less than this
# share of their time, and else only when it is needed.
KEEP_UP_SHARE = 0.01
# A try begins with credit for at least this loss, in target passes.
MIN_PROBE = 0.25


@dataclass(slots=True, eq=False)
class _Bucket:
    """What is known of the batch sizes of one octave."""

    tokens: float  # forgotten sums over steps; tokens per request
    time: float
    steps: float
    plain_units: float = math.inf  # time of a plain step; inf while plain is no candidate
    max_account: float = MAX_LOSS
    account: float = MAX_LOSS  # target passes that speculation may still lose, at most the above
    is_plain: bool = False

    def worth(self, loss: float) -> float:
        """Return what a token of the mean step is worth, relative to one of a plain step."""
        return (1.0 + loss) / (1.0 + loss * self.tokens / self.steps)

    def rate(self, loss: float) -> float:
        """Return the best known rate, in tokens of plain steps per unit of time."""
        return max(self.tokens * self.worth(loss) / self.time, 1.0 / self.plain_units)

    def price(self, loss: float) -> float:
        """Return what a unit of time has to bring in further tokens of a step.

        Args:
            loss: here and above, steps that an answer loses, per token of it.
        """
        return self.rate(loss) * (1.0 + loss) / self.worth(loss) ** 2


class _View(NamedTuple):
    """A step's costs as the decisions read them, in units."""

    costs: Costs
    growth: np.ndarray  # [K], one more layer of 1.. nodes, extending the draft by it included
    extend: np.ndarray  # [E], draft extend of 1.. rows
    rows: np.ndarray  # [N], verifying 1.. rows
    sized: np.ndarray  # [N], verifying the smallest allowed size of 1.. rows or more
    token: float  # what a further accepted token adds to draft extend


class AutoPolicy(TreePolicy):
    """CAST with the price found by itself; no constant depends on model or device.

    The price of each octave of batch sizes is the rate it has reached lately: tokens over time, as
    sums in which a step counts half after 32 more. So after a change of text nine tenths of the way
    are gone within 110 steps. A change of batch size takes the other octave's own price at once; an
    octave that is new starts from the nearest known one, and the very first from 1, the rate of
    plain decoding without its overhead: a low price, so that the first trees err on the large side
    and show what is accepted. That start weighs as much as about two steps.

    Expansion compares the tree that stands with the one with a further layer, both at their best
    cut, by what the children of such nodes have lately been (`lookahead.py`):

        max over k of cut(tree and children of the best k) - price * draft[k]  against  cut(tree)

    A worker that does not call `expanded` leaves it to the root's children to stand for all.

    Where answers are short, long steps are worth less than their tokens. An answer of L tokens by
    steps of x takes L / x steps, and some more (`LOST_STEPS`) whose place brings nothing. So what
    is to be as high as it can be is not x / T, but x / (1 + x LOST_STEPS / L) / T, and the price of
    a further token follows from that. L is told by `expect`.

    Where the target runs requests of unequal numbers of rows, `share_out` ranks the nodes of all
    requests together and cuts once, where a further row no longer pays; so a request that drafts
    well gets the rows of one that is hopeless. With equal numbers a row that another request has
    paid for is free, and `rerank` fills all of them.

    Args:
        verify_sizes: ascending values allowed for N, each >= 2.
        max_layers: D, layers a tree may grow to.
        extend_by_outcome: draft extend runs the accepted rows of each request, not as many as the
            tree is deep.
    """

    def __init__(
        self, verify_sizes: tuple[int, ...], max_layers: int, extend_by_outcome: bool = False
    ) -> None:
        self._sizes = verify_sizes
        self._num_nodes = np.asarray(verify_sizes) - 1
        self._max_layers = max_layers
        self._extend_by_outcome = extend_by_outcome
        self._buckets: dict[int, _Bucket] = {}
        self._lookahead = Lookahead(max_layers)
        self._view: _View | None = None
        self._layers = 1  # of the tree that grows
        self._price = 1.0  # of the step's tree
        self._deepen = False
        self._root_children: torch.Tensor | None = None  # until deeper ones are seen in the step
        self._weights: np.ndarray | None = None  # [B, 1]
        self._loss = 0.0  # steps that an answer loses, per token of it

    def price(self, batch_size: int) -> float:
        """Return accepted tokens asked per unit of time at this batch size."""
        return self._bucket(batch_size).price(self._loss)

    def expect(self, answer_tokens: float) -> None:
        self._loss = LOST_STEPS / answer_tokens

    def state(self) -> list[dict[str, Any]]:
        """Return what is known of each octave of batch sizes, for people and as JSON."""
        return [
            {
                "batch_sizes": [2**octave // 2 + 1 if octave else 1, 2**octave],
                "price": bucket.price(self._loss),
                "is_plain": bucket.is_plain,
            }
            for octave, bucket in sorted(self._buckets.items())
        ]

    def weigh(self, weights: np.ndarray | None) -> None:
        self._weights = None if weights is None else weights[:, None].astype(np.float32)

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Choose the layer's width, and whether it pays to expand it at all."""
        view, ranked = self._read(costs), self._weighed(scores)
        if self._layers == 1:
            self._price = self.price(scores.shape[0])
            self._lookahead.begin_tree()
            self._root_children = scores
            if not self._lookahead.has_learned:
                self._lookahead.add(0, None, scores)
                self._lookahead.learn()
        # An accepted token is one row more to extend, where its number decides that.
        token = 1.0 - self._price * view.token
        room = self._max_layers - self._layers
        width, gain = self._lookahead.best_width(
            self._layers, ranked, token, view.sized, view.growth, self._price, room
        )
        self._deepen = gain > 0.0 and room > 0
        return width

    def deepen(self) -> bool:
        self._layers += self._deepen
        return self._deepen

    def expanded(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        """Take note of the children of the nodes just expanded.

        The tensors must not be overwritten before `rerank`.
        """
        self._root_children = None
        self._lookahead.add(self._layers - 1, parent_scores, child_probs)

    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Choose the size whose nodes bring most beyond the price of their time."""
        num_sizes = bisect_right(self._sizes, scores.shape[1] + 1)
        if num_sizes == 0:  # the tree ended below the smallest size
            self._close_step()
            return scores.shape[1] + 1
        ranked = self._weighed(scores)
        sizes = self._num_nodes[:num_sizes]
        best = best_size(ranked, sizes, *self._terms(costs, len(ranked)))
        self._close_step()
        return self._sizes[best]

    def share_out(self, scores: torch.Tensor, costs: Costs | None) -> np.ndarray | None:
        """Rank the nodes of all requests together and verify those worth their time."""
        ranked = self._weighed(scores[:, : self._sizes[-1] - 1])
        num_rows = share_out(ranked, *self._terms(costs, len(ranked)))
        self._close_step()
        return num_rows

    def _terms(
        self, costs: Costs | None, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Return what a cut is judged by: rows, extend, layers and price of `best_size`."""
        view = self._read(costs)
        layers = -1 if self._extend_by_outcome else self._layers
        return view.rows, view.extend, layers, self.price(batch_size)

    def _weighed(self, scores: torch.Tensor) -> np.ndarray:
        ranked = scores.numpy(force=True)
        return ranked if self._weights is None else ranked * self._weights

    def _close_step(self) -> None:
        """Learn from the children of this step, whose tree is chosen."""
        if self._root_children is not None:
            self._lookahead.add(0, None, self._root_children)
        self._lookahead.learn()
        self._layers, self._root_children = 1, None

    def observe(self, batch_size: int, accepted_mean: float, time_units: float) -> None:
        """Take note of what a step with a tree brought; plain steps are not reported.

        The step may have been several steps ago. `step_units` gives its time.
        """
        bucket = self._bucket(batch_size)
        tokens = 1.0 + accepted_mean
        bucket.tokens = _KEEP * bucket.tokens + tokens
        bucket.time = _KEEP * bucket.time + time_units
        bucket.steps = _KEEP * bucket.steps + 1.0
        if math.isfinite(bucket.plain_units):
            gain = tokens * bucket.worth(self._loss) * bucket.plain_units - time_units
            bucket.account = min(bucket.max_account, bucket.account + gain)

    def speculate(self, batch_size: int, costs: Costs | None, catch_up: float = 0.0) -> bool:
        """Return whether to draft in this step, or to decode plainly.

        An account for each octave of batch sizes holds what speculation may still lose against
        plain decoding: at most 32 target passes at batch size 1, less for more requests. When it is
        used up, plain decoding takes over and pays in a hundredth of its time; from that, tries of
        a step or some are paid, until one of them goes on earning. So by the costs no more than
        that is ever lost at a batch size, however the luck falls. A try comes when it has been
        saved for, what the draft has to catch up on included: mostly after 25 to 100 target
        passes, about a second where a pass takes 10 ms.
        """
        bucket = self._bucket(batch_size)
        assert costs is not None
        bucket.plain_units = plain_units(costs)
        if bucket.is_plain or bucket.account < 0.0:
            plain_time = bucket.tokens * bucket.worth(self._loss) * bucket.plain_units
            mean_loss = (bucket.time - plain_time) / bucket.steps
            bucket.is_plain = bucket.account < max(MIN_PROBE, mean_loss) + catch_up
        if bucket.is_plain:
            bucket.account += PROBE_SHARE * bucket.plain_units
        else:
            bucket.account -= catch_up
        return not bucket.is_plain

    def plain_loss(self, batch_size: int) -> float:
        bucket = self._bucket(batch_size)
        return 1.0 - 1.0 / (bucket.rate(self._loss) * bucket.plain_units)

    def _bucket(self, batch_size: int) -> _Bucket:
        octave = (batch_size - 1).bit_length()
        bucket = self._buckets.get(octave)
        if bucket is None:
            bucket = _Bucket(START_WEIGHT, START_WEIGHT, START_WEIGHT)
            if self._buckets:
                nearest = self._buckets[min(self._buckets, key=lambda other: abs(other - octave))]
                part = START_WEIGHT / nearest.time
                bucket = _Bucket(part * nearest.tokens, START_WEIGHT, part * nearest.steps)
            bucket.max_account = bucket.account = MAX_LOSS / math.sqrt(2**octave)
            self._buckets[octave] = bucket
        return bucket

    def _read(self, costs: Costs | None) -> _View:
        assert costs is not None
        # The same object comes again until batch size or context change.
        if self._view is None or self._view.costs is not costs:
            self._view = _view(costs, self._num_nodes, self._extend_by_outcome)
        return self._view


def _view(costs: Costs, num_nodes: np.ndarray, extend_by_outcome: bool) -> _View:
    extend = costs.draft_extend
    row = max(0.0, float(extend[-1] - extend[0]) / max(1, len(extend) - 1))
    row_of_layer, row_of_token = (0.0, row) if extend_by_outcome else (row, 0.0)
    return _View(
        costs,
        growth=costs.draft + np.float32(row_of_layer),
        extend=extend,
        rows=costs.verify,
        sized=costs.verify[num_nodes[np.searchsorted(num_nodes, np.arange(num_nodes[-1] + 1))]],
        token=row_of_token,
    )
