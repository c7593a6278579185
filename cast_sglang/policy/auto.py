"""Policy `auto`: finds the price by itself and chooses the trees that serve most tokens per time.

A step serves 1 + A tokens per request (A accepted drafts and the bonus token) and takes T, in units
of one target pass over one row per request. The tree with the highest rate (1 + A) / T is the one
that maximises

    A - price * T        at price = the highest rate

(Dinkelbach). So one number replaces all thresholds of CAST, and serving measures that number
anyway. At a price below the highest rate the best tree has a rate above the price, and at a price
above it one below. So the policy takes the rate just reached as its next price and comes to the
highest.

Source: Dinkelbach, "On nonlinear fractional programming" (Management Science 13, 1967).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cast_sglang.costs.model import extend_row_units, plain_units
from cast_sglang.policy.base import NO_PREFILL, Costs, Prefill, TreePolicy
from cast_sglang.policy.lookahead import KEEP, Lookahead
from cast_sglang.policy.octaves import MAX_LOSS, Octave, octave_of
from cast_sglang.policy.select_count import pooled, select_count, select_size, share_out, size_costs
from cast_sglang.policy.turns import Shape, Turns

__all__ = ["LEAST_CUT", "AutoPolicy"]

# A node of this score is accepted once in a hundred thousand steps; no row is as cheap.
LEAST_CUT = 1e-5


class _View(NamedTuple):
    """A step's costs in the form that the decisions use, in units."""

    costs: Costs
    growth: np.ndarray  # [K], one more layer of 1.. nodes, with what it adds to draft extend
    sized: np.ndarray  # [N], verifying the smallest allowed size that holds 1.. rows
    token: float  # what a further accepted token adds to draft extend
    plain: float  # a plain step


class AutoPolicy(TreePolicy):
    """CAST with a price that it finds by itself; no constant depends on model or device.

    The price of each octave of batch sizes is the rate that its last steps reached: the sum of
    their tokens over the sum of their times, in which a step counts half after 32 more. So within
    110 steps after a change of text, nine tenths of the change are in the price. Octaves have
    prices of their own. A new octave starts from the price of the nearest known one, and the first
    of all from 1, the rate of plain decoding without its overhead. That price is low, so that the
    first trees are rather too large and show what the target accepts.

    The policy expands a layer if that promises more than to stop, by the children that such nodes
    had lately (`lookahead.py`). If no worker calls `expanded`, the children of the root stand for
    those of all nodes.

    If the target can run another number of rows for each request, `share_out` ranks the nodes of
    all requests together and stops where a further row no longer pays. So a request that drafts
    well gets the rows of a request that drafts badly. If all requests have equally many rows, a row
    that one of them needs is free for the others, and `rerank` fills it.

    Args:
        verify_sizes: ascending values allowed for N, each >= 2.
        max_layers: D, the most layers of a tree.
        extends_by_accepted: draft extend runs the accepted rows of each request; else as many rows
            as the tree has layers, and one.
    """

    takes_turns = True  # with other trees
    settles = True

    def __init__(
        self, verify_sizes: tuple[int, ...], max_layers: int, extends_by_accepted: bool = False
    ) -> None:
        self._sizes = verify_sizes
        self._max_layers = max_layers
        self._extends_by_accepted = extends_by_accepted
        self._buckets: dict[int, Octave] = {}
        self._lookahead = Lookahead(max_layers, verify_sizes[-1] - 1)
        self._view: _View | None = None
        self._layers = 1  # of the tree that grows
        self._deepen = False
        self._parents = 0  # depth of the nodes whose children `expanded` showed last
        self._turn: Shape | None = None  # of the step that runs; None for the policy's own
        self._price = 1.0  # of the tree that grows
        self._shares_out = False  # the last tree was cut by `share_out`
        self._weights: np.ndarray | None = None  # [B, 1]
        self._standing: tuple[torch.Tensor, torch.Tensor] | None = None  # arguments of `stand`

    def price(self, batch_size: int) -> float:
        """Return the accepted tokens asked per unit of time at this batch size."""
        return self._bucket(batch_size).price

    def state(self) -> list[dict[str, Any]]:
        """Return what is known of each octave of batch sizes, as JSON can hold it."""
        return [
            {
                "batch_sizes": [2**octave // 2 + 1 if octave else 1, 2**octave],
                "price": bucket.price,
                "is_plain": bucket.is_plain,
                "tokens": bucket.tokens,
                "units": bucket.time,
                "steps": bucket.steps,
                "account": bucket.account,
                "turn": bucket.turns.step,
            }
            for octave, bucket in sorted(self._buckets.items())
        ]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on from where another object's `state()` was.

        Raises:
            ValueError: `state` is not valid; nothing is changed then.
        """
        buckets = {}
        if not isinstance(state, Sequence):
            raise ValueError(f"prices: {state!r:.80} is no list")
        for row in state:
            try:
                octave = (int(row["batch_sizes"][1]) - 1).bit_length()
                tokens, time, steps = (float(row[name]) for name in ("tokens", "units", "steps"))
                account, is_plain = float(row["account"]), bool(row["is_plain"])
                turn = int(row.get("turn", 0))  # earlier releases did not tell
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(f"prices: a row is damaged: {row!r:.80}") from error
            is_known = all(0.0 < part < 1e6 for part in (tokens, time, steps))
            if not (is_known and math.isfinite(account) and turn >= 0):
                raise ValueError(f"prices: a row is out of range: {row!r:.80}")
            bucket = buckets[octave] = Octave(
                tokens, time, steps, is_plain=is_plain, turns=Turns(turn)
            )
            bucket.max_account = MAX_LOSS / math.sqrt(2**octave)
            bucket.account = min(account, bucket.max_account)
        self._buckets = buckets

    def weigh(self, weights: np.ndarray | None) -> None:
        self._weights = None if weights is None else weights[:, None].astype(np.float32)

    def stand(self, best: torch.Tensor, left: torch.Tensor) -> None:
        self._standing = best, left

    def breadth(self, scores: torch.Tensor, costs: Costs | None) -> int:
        """Choose the layer's width, and decide whether expanding it pays at all."""
        if self._layers == 1:
            self._begin(scores)
        (best, left), self._standing = self._standing or (None, scores), None
        if self._turn is not None:
            self._deepen = self._layers < min(self._turn.num_steps, self._max_layers)
            return min(self._turn.topk, scores.shape[1])
        view, price, room = self._read(costs), self._price, self._max_layers - self._layers
        width, gain = self._lookahead.best_width(
            self._layers,
            self._worth(left, view, price),
            view.costs.verify if self._shares_out else view.sized,
            view.growth,
            price,
            room,
            self._shares_out,
            None if best is None else self._worth(best, view, price),
        )
        self._deepen = gain > 0.0 and room > 0
        return width

    def deepen(self) -> bool:
        self._layers += self._deepen
        return self._deepen

    def chain_layers(self, scores: torch.Tensor, costs: Costs | None, max_layers: int) -> int:
        """Choose the length that promises most, by the children that nodes of each depth had."""
        self._begin(scores)
        if self._turn is not None:
            return min(self._turn.num_steps, max_layers)
        view, price = self._read(costs), self._price
        return self._lookahead.best_length(
            self._worth(scores, view, price),
            view.costs.verify if self._shares_out else view.sized,
            float(view.growth[0]),
            price,
            max_layers,
            self._shares_out,
        )

    def _begin(self, scores: torch.Tensor) -> None:
        """See the roots' children; they stand for all others while nothing is known of those."""
        self._parents, self._price = 0, self.price(len(scores))
        self._lookahead.learn(0, None, scores)
        self._lookahead.begin_tree(len(scores))

    def expanded(self, parent_scores: torch.Tensor, child_probs: torch.Tensor) -> None:
        self._parents += 1
        self._lookahead.learn(self._parents, parent_scores, child_probs)

    def rerank(self, scores: torch.Tensor, costs: Costs | None) -> int:
        self._layers = 1
        if self._turn is not None:  # the smallest size that holds its rows, or the tree
            last = bisect_right(self._sizes, scores.shape[1] + 1) - 1
            place = bisect_left(self._sizes, self._turn.num_draft_tokens, hi=max(0, last))
            return self._sizes[place] if last >= 0 else scores.shape[1] + 1
        view, price = self._read(costs), self.price(len(scores))
        return select_size(self._worth(scores, view, price), view.sized, self._sizes, price)[0]

    def beats_plain(
        self, scores: torch.Tensor, costs: Costs | None, shares_out: bool = False
    ) -> bool:
        """Compare the best number of rows with one: what they bring less the price of their time.

        In a turn of another tree it is true where there is anything to verify.
        """
        if self._turn is not None:
            return bool((scores[:, 0] > 0.0).any())
        view, price = self._read(costs), self.price(len(scores))
        verify, sized = view.costs.verify, view.sized[1:]
        worth = self._worth(scores[:, : len(sized)], view, price)
        if shares_out:
            worth, sized = pooled(worth, verify)
        return bool(select_count(worth, sized, price)[1] > -price * verify[0])

    def share_out(self, scores: torch.Tensor, costs: Costs | None) -> np.ndarray | None:
        """Rank the nodes of all requests together and verify those that are worth their time."""
        self._shares_out = True
        if self._turn is not None:
            return None
        self._layers = 1
        view, price = self._read(costs), self.price(len(scores))
        worth = self._worth(scores[:, : self._sizes[-1] - 1], view, price)
        rows: np.ndarray = share_out(worth, view.costs.verify, price)
        return rows

    def settlement(self, batch_size: int, costs: Costs | None, is_even: bool) -> tuple[float, int]:
        """Return what earlier steps say of drawn requests.

        The score is that of the last node that was worth its time, mean of the last steps; at first
        the price of a row, in the mean over all rows. Where requests have equally many rows, the
        nodes are as many as in the last step, or in the tree whose turn it is.
        """
        bucket, num_rows = self._bucket(batch_size), self._sizes[-1]
        if is_even:
            last = bucket.num_rows if self._turn is None else self._turn.num_draft_tokens
            num_rows = min(num_rows, last)
        if bucket.log_cut is not None:
            return math.exp(bucket.log_cut), num_rows
        return self.least_score(batch_size, costs), num_rows

    def least_score(self, batch_size: int, costs: Costs | None) -> float:
        """Return the price of a row, in the mean over all rows."""
        verify = self._read(costs).costs.verify
        row = float(verify[-1] - verify[0]) / max(1, len(verify) - 1)
        return max(LEAST_CUT, self.price(batch_size) * row)

    def learn_settlement(self, batch_size: int, score: float, num_rows: int) -> None:
        bucket = self._bucket(batch_size)
        if self._turn is None and score >= LEAST_CUT:
            log_cut = math.log(score)
            before = log_cut if bucket.log_cut is None else bucket.log_cut
            bucket.log_cut = KEEP * before + (1.0 - KEEP) * log_cut
            bucket.num_rows = num_rows

    def _worth(self, scores: torch.Tensor, view: _View, price: float) -> np.ndarray:
        """Return [B, n] float32, what nodes of these scores are worth, in tokens.

        Each accepted token adds a row to draft extend, where accepted rows are what it runs.
        """
        worth: np.ndarray = scores.numpy()
        if view.token:
            worth = worth * np.float32(1.0 - price * view.token)
        return worth if self._weights is None else worth * self._weights

    def observe(self, batch_size: int, accepted_mean: float, time_units: float) -> None:
        """Count tokens and time of a step with a tree, which may have run several steps ago."""
        bucket = self._bucket(batch_size)
        tokens = 1.0 + accepted_mean
        bucket.tokens = KEEP * bucket.tokens + tokens
        bucket.time = KEEP * bucket.time + time_units
        bucket.steps = KEEP * bucket.steps + 1.0
        if math.isfinite(bucket.plain_units):
            gain = bucket.gain(tokens, time_units)
            bucket.account = min(bucket.max_account, bucket.account + gain)

    def speculate(
        self,
        batch_size: int,
        costs: Costs | None,
        catch_up: float = 0.0,
        prefill: Prefill = NO_PREFILL,
        wants_drafts: bool = True,
    ) -> bool:
        """Return whether to draft in this step, or to decode plainly.

        Each octave of batch sizes has an account of the time that speculation may still lose
        against plain decoding: at most 32 target passes at batch size 1, fewer for more requests.
        When it is used up, the policy decodes plainly and pays a hundredth of that time into the
        account. As soon as the account covers a try, with the time that the draft needs to catch
        up, the policy drafts again for a step or some, and stays with it if that gains time. So by
        the costs, speculation never loses more than the account held, whatever is accepted. A try
        mostly comes after 25 to 100 target passes, about a second where a pass takes 10 ms. Steps
        of requests that want no drafts pay for it too. Meanwhile the draft leaves out prompts. A
        try needs them, so that ends when the account covers their passes as well. And a try waits
        until no request runs that lacks drafts for its prompt alone: it would make the try look
        bad.

        Now and then it is another tree's turn (`turns.py`), or plain decoding is tried.
        """
        bucket, self._turn = self._bucket(batch_size), None
        bucket.plain_units, bucket.prefill = self._read(costs).plain, prefill
        bucket.pay_in(catch_up if wants_drafts else 0.0)
        if not wants_drafts:
            return False
        if bucket.is_plain or (self.takes_turns and bucket.tries_plain()):
            return False
        bucket.account -= catch_up
        # Where speculation barely pays, turns of worse trees would use up what is saved for tries.
        if self.takes_turns and bucket.account == bucket.max_account:
            self._turn = bucket.turns.next()
        return True

    def plain_steps(self, batch_size: int) -> int:
        bucket = self._buckets.get(octave_of(batch_size))
        return 0 if bucket is None else bucket.plain_steps

    def _bucket(self, batch_size: int) -> Octave:
        octave = octave_of(batch_size)
        bucket = self._buckets.get(octave)
        if bucket is None:
            # As if one target pass had served at the first price; steps soon outvote it. A weight
            # of 4 passes did as well on simulated machines, one of 16 lost 0.9 % (error 0.6).
            bucket = Octave(1.0, 1.0, 1.0)
            if self._buckets:
                nearest = self._buckets[min(self._buckets, key=lambda other: abs(other - octave))]
                bucket = Octave(nearest.tokens / nearest.time, 1.0, nearest.steps / nearest.time)
            bucket.max_account = bucket.account = MAX_LOSS / math.sqrt(2**octave)
            self._buckets[octave] = bucket
        return bucket

    def _read(self, costs: Costs | None) -> _View:
        assert costs is not None
        # `CostModel` returns the same object until the batch size or the context changes.
        if self._view is None or self._view.costs is not costs:
            row = extend_row_units(costs)
            row_of_layer, row_of_token = (0.0, row) if self._extends_by_accepted else (row, 0.0)
            self._view = _View(
                costs,
                growth=costs.draft + np.float32(row_of_layer),
                sized=size_costs(costs.verify, self._sizes),
                token=row_of_token,
                plain=plain_units(costs),
            )
        return self._view
