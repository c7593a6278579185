"""A draft model and a target that exist only as probabilities, to run policies in closed loop.

Every request has a difficulty that wanders from step to step. A node's best child has a probability
around it, the others share most of the rest. The target takes a child with a true probability below
the draft's, the more so the deeper it is; so raw path products over-state survival, as they do with
real drafts. Of a greedy request it takes the best child more often than the draft says, as a target
does that takes its likeliest token however unlikely that is. Costs are any `StepCosts`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from cast_sglang.costs.model import StepCosts, plain_units, step_units
from cast_sglang.ops import loops
from cast_sglang.ops.contract import AcceptanceCurve
from cast_sglang.policy.acceptance import GREEDY, SAMPLED, Acceptance
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.policy.outcomes import verify_outcomes
from cast_sglang.trace.full_width import best_choice
from cast_sglang.tree import DraftTree

TOPK = 8
LAYERS = 8
TOKENS = 32
SIZES = tuple(range(2, TOKENS + 1))


# By how much greedy decoding raises the odds of the best child: 0.21 of the time becomes 0.42, as
# on the tiny pair for first children with a draft probability of 0.1 to 0.3.
GREEDY_ODDS = 2.7


class Text:
    """Requests with their difficulties.

    Args:
        ease: mean of the log odds of the best child: a number, one for each request, or what
            returns that for the number of a step.
        is_greedy: [B] bool, whether the target chooses greedily; None for no request.
        decay: by how much more each layer's chances are below what the draft says.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int,
        ease: float | np.ndarray | Callable[[int], float] = 1.0,
        is_greedy: np.ndarray | None = None,
        decay: float = 0.03,
    ) -> None:
        self._decay = decay
        self.rng = np.random.default_rng(seed)
        self._ease = ease if callable(ease) else lambda step: ease
        self.is_greedy = np.zeros(batch_size, bool) if is_greedy is None else is_greedy
        self._wander = self.rng.normal(size=batch_size)
        # [B] before the first step and in each, the mean log odds of the best child.
        self.odds = [np.ravel(self._ease(0)) + self._wander]

    def advance(self) -> None:
        noise = self.rng.normal(size=self._wander.shape)
        self._wander = 0.9 * self._wander + math.sqrt(1 - 0.9**2) * noise
        self.odds.append(np.ravel(self._ease(len(self.odds) - 1)) + self._wander)

    @property
    def kinds(self) -> np.ndarray:
        """[B] int64, kinds of the requests as `Acceptance` tells them apart."""
        return np.where(self.is_greedy, GREEDY, SAMPLED)

    def all_at_once(self, most: int = 2500, first: int = 0, last: int | None = None) -> "Text":
        """Return the requests at all these steps, as one batch of whole batches."""
        odds = np.stack(self.odds[1:])[first:last]
        odds = odds[:: max(1, odds.size // most)]
        is_greedy = np.broadcast_to(self.is_greedy, odds.shape).ravel()
        text = Text(1, 0, is_greedy=is_greedy, decay=self._decay)
        text.odds = [odds.ravel()]
        return text

    def children(self, nodes: int, topk: int = TOPK) -> np.ndarray:
        """Return [B, nodes, topk] draft probabilities, descending."""
        mean = self.odds[-1][:, None]
        odds = mean + self.rng.normal(size=(len(mean), nodes))
        best = 1.0 / (1.0 + np.exp(-odds))
        others = 0.45 * 0.55 ** np.arange(TOPK - 1)
        rest = np.minimum((1.0 - best)[..., None] * others, best[..., None])
        return np.concatenate((best[..., None], rest), axis=2)[..., :topk]

    def chances(self, probs: np.ndarray, depth: int) -> np.ndarray:
        """Return the true acceptance of nodes given their parent; shape [B, nodes, topk]."""
        best = probs[..., :1]
        surer = GREEDY_ODDS * best / (1.0 + (GREEDY_ODDS - 1.0) * best)
        others = probs[..., 1:] * (1.0 - surer) / np.maximum(1.0 - best, 1e-12)
        greedy = np.concatenate((surer, others), axis=2)
        return np.where(self.is_greedy[:, None, None], greedy, probs) * (0.97 - self._decay * depth)


class Result(NamedTuple):
    tokens: np.ndarray  # per step: expected tokens per request, given the tree
    times: np.ndarray  # per step, units
    prices: np.ndarray
    is_plain: np.ndarray
    layers: np.ndarray  # per step: of the tree, 0 for a plain step
    rows: np.ndarray  # per step: verified per request, in the mean

    def rate(self, first: int = 0, last: int | None = None) -> float:
        return float(self.tokens[first:last].sum() / self.times[first:last].sum())


class Drafted(NamedTuple):
    """A tree that was drafted and verified."""

    tokens: float  # expected per request, given the tree
    accepted: float  # drafts per request, drawn
    widths: list[int]
    mean_rows: float
    extend_rows: int

    def units(self, costs: StepCosts) -> float:
        """Return the time of the step."""
        if self is PLAIN:
            return plain_units(costs)
        return step_units(costs, self.widths, self.mean_rows, self.extend_rows)


PLAIN = Drafted(1.0, 0.0, [], 1.0, 0)


class Server(Protocol):
    """What a closed loop runs its steps on."""

    def costs(self, step: int) -> StepCosts:
        """Return the costs by which a step is decided."""

    def units(self, step: Drafted, costs: StepCosts) -> float:
        """Run a step; return how long such a step takes on average.

        Args:
            costs: by which it was decided.
        """


class ByTable:
    """A server whose passes take what a table says."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs

    def costs(self, step: int) -> StepCosts:
        return self._costs

    def units(self, step: Drafted, costs: StepCosts) -> float:
        return step.units(costs)


def run(
    policy: TreePolicy,
    text: Text,
    server: Server | StepCosts,
    batch_size: int,
    steps: int,
    acceptance: Acceptance | None = None,
    joint: bool = False,
    topk: int = TOPK,
    plans_chains: bool = False,
    max_rows: int = TOKENS,
) -> Result:
    """Run a policy as a worker does: speculate, grow, rerank, verify, observe.

    Args:
        server: costs stand for a server that they are true of.
        joint: share one budget of nodes out among the requests, which may then differ in rows.
        topk: children of a node; 1 for chains.
        plans_chains: as of `Decider`.
        max_rows: the most rows that a step may verify per request.
    """
    if isinstance(server, StepCosts):
        server = ByTable(server)
    decider = Decider(
        policy,
        max_missing=0,
        topk=topk,
        is_ragged=joint,
        shares_out=joint,
        plans_chains=plans_chains,
    )
    rows = []
    for step in range(steps):
        text.advance()
        costs = server.costs(step)
        price = decider.price(batch_size) or math.nan
        facts = StepFacts(
            batch_size=batch_size,
            costs=costs,
            weights=None,
            missing_rows=0,
            max_layers=LAYERS,
            max_rows=max_rows,
        )
        is_plain = not decider.begin_step(facts).drafts
        tree = PLAIN if is_plain else drafted(decider, text, acceptance, topk, max_rows)
        time = server.units(tree, costs)
        if not is_plain:
            decider.end_step(batch_size, tree.accepted, tree.units(costs))
        layers = 0 if is_plain else len(tree.widths) + 1
        rows.append((tree.tokens, time, price, is_plain, layers, tree.mean_rows))
    return Result(*(np.array(column) for column in zip(*rows, strict=True)))


def drafted(
    decider: Decider,
    text: Text,
    acceptance: Acceptance | None,
    topk: int = TOPK,
    max_rows: int = TOKENS,
) -> Drafted:
    """Draft and verify the tree that the decider chooses, by the text's probabilities."""
    batch_size, kinds = len(text.is_greedy), torch.from_numpy(text.kinds)

    def layer(nodes: int, depth: int) -> tuple[torch.Tensor, torch.Tensor, AcceptanceCurve | None]:
        probs = text.children(nodes, topk)
        raw.append(probs.reshape(batch_size, -1))
        true.append(text.chances(probs, depth).reshape(batch_size, -1))
        tokens = torch.zeros(batch_size * nodes, topk, dtype=torch.int64)
        curve = None if acceptance is None else acceptance.curve_at(depth, kinds)
        return tokens, torch.from_numpy(probs.reshape(-1, topk)).float(), curve

    raw: list[np.ndarray] = []
    true: list[np.ndarray] = []
    tokens, probs, curve = layer(1, 1)
    tree = DraftTree(tokens, probs, LAYERS, loops, curve)
    widths: list[int] = []
    while tree.num_layers < tree.max_layers:
        frontier = tree.frontier()
        width = decider.width(frontier.scores)
        if width is None:
            break
        chances = tree.grow(frontier, width, *layer(width, tree.num_layers + 1))
        decider.expanded(frontier.scores, chances)
        widths.append(width)
    ranked = tree.ranked(max_rows - 1)
    size, num_rows = decider.rows(ranked.scores)
    mean_rows = size if num_rows is None else float(num_rows.mean())
    selection = tree.select(ranked, size, None if num_rows is None else torch.from_numpy(num_rows))
    index, parents = selection.top_scores_index.numpy(), tree.parents.numpy()

    # Walk all requests down at once: at each layer the target picks a child, or none.
    true_probs = np.concatenate(true, axis=1)
    # One column more, of a candidate that does not exist.
    paths = np.zeros((batch_size, true_probs.shape[1] + 1))
    accept_index = np.full((batch_size, LAYERS + 1), -1)
    requests = np.arange(batch_size)
    accept_index[:, 0] = requests * size
    at = np.full(batch_size, -1)
    start = 0
    for depth, layer_probs in enumerate(true, 1):
        candidates = np.arange(start, start + layer_probs.shape[1])
        start += layer_probs.shape[1]
        above = parents[:, candidates]
        up = np.where(above < 0, 1.0, np.take_along_axis(paths, np.maximum(above, 0), axis=1))
        paths[:, candidates] = up * layer_probs
        is_child = above == at[:, None]
        odds = np.where(is_child, layer_probs, 0.0).cumsum(axis=1)
        draw = text.rng.random((batch_size, 1))
        picked = candidates[np.minimum((odds <= draw).sum(axis=1), len(candidates) - 1)]
        place = np.array([np.searchsorted(index[b], picked[b]) for b in requests])
        known = index[requests, np.minimum(place, size - 2)] == picked
        alive = known & (odds[:, -1] > draw[:, 0]) & (accept_index[:, depth - 1] >= 0)
        accept_index[alive, depth] = (requests * size + 1 + place)[alive]
        at = np.where(alive, picked, -2)
    expected = 1.0 + np.take_along_axis(paths, index, axis=1).sum() / batch_size
    lens = (accept_index >= 0).sum(axis=1)
    if acceptance is not None:
        drafted = np.concatenate(raw, axis=1).astype(np.float32)
        rows_above = selection.parent_rows.numpy()
        seen = verify_outcomes(rows_above, index, accept_index, drafted, topk)
        acceptance.update(seen, text.kinds)
    rows = min(tree.num_layers, size - 1) + 1
    return Drafted(expected, float(lens.mean()) - 1.0, widths, mean_rows, rows)


def make_costs(
    regime: str, batch_size: int, *, draft: float = 0.06, plain: float = 0.97
) -> StepCosts:
    """Costs of one of four regimes, in units of a target pass over one row per request.

    Args:
        plain: time of a plain step, by which speculation is judged; less than its parts say, as
            serving may find.
    """
    rows = batch_size * np.arange(1, TOKENS + 1)
    nodes = batch_size * np.arange(1, TOPK + 1)
    if regime == "memory":  # a pass streams the weights, whatever the rows
        verify, layer = 1.0 + 1e-4 * rows, 1.0 + 1e-4 * nodes
    elif regime == "compute":  # 64 rows take as long as the weights
        verify, layer = 1.0 + rows / 64, 1.0 + nodes / 64
    elif regime == "knee":  # dear up to 64 rows, and less so beyond
        verify = 1.0 + np.minimum(rows, 64) / 32 + np.maximum(rows - 64, 0) / 64
        layer = 1.0 + nodes / 64
    else:  # tiles of 64 rows
        verify, layer = 1.0 + 0.5 * np.ceil(rows / 64), 1.0 + 0.5 * np.ceil(nodes / 64)
    verify, layer = verify / verify[0], layer / layer[0]
    extend = np.interp(np.arange(1, LAYERS + 2), np.arange(1, TOKENS + 1), verify)
    return StepCosts(
        verify=verify.astype(np.float32),
        draft=(draft * layer).astype(np.float32),
        draft_extend=(1.2 * draft * extend).astype(np.float32),
        unit_us=10_000.0,
        overhead=0.05,
        plain_overhead=plain - 1.0,
    )


def full_trees(text: Text, topk: int = TOPK) -> list[tuple[np.ndarray, np.ndarray]]:
    """Grow trees of full width; return each layer's scores and true path probabilities [B, M]."""
    raw = text.children(1, topk)[:, 0]
    num_requests = len(raw)
    true = text.chances(raw[:, None], 1)[:, 0]
    layers = [(raw, true)]
    for depth in range(2, LAYERS + 1):
        best = np.argsort(-raw, axis=1, kind="stable")[:, :topk]
        probs = text.children(topk, topk)
        raw = (np.take_along_axis(raw, best, 1)[..., None] * probs).reshape(num_requests, -1)
        true = np.take_along_axis(true, best, 1)[..., None] * text.chances(probs, depth)
        true = true.reshape(num_requests, -1)
        layers.append((raw, true))
    return layers


def best_fixed(
    costs: StepCosts,
    text: Text,
    first: int = 0,
    last: int | None = None,
    topks: tuple[int, ...] = (1, 2, 3, 4, 6, 8),
) -> tuple[float, tuple[int, int, int]]:
    """Return the best rate of EAGLE's fixed trees, and its (steps, topk, tokens), in hindsight.

    Args:
        text: the requests that the other policy met.
        first, last: of the steps that count.
        topks: children of a node; (1,) for chains alone.
    """
    best = (0.0, (0, 0, 0))
    requests = text.all_at_once(first=first, last=last)
    for topk in topks:
        layers = full_trees(requests, topk)
        for steps in range(1, LAYERS + 1):
            gains = gains_of(layers[:steps])
            for size in range(2, len(gains) + 2):
                shape = steps, topk, size
                best = max(best, (float(1.0 + gains[size - 2]) / fixed_units(costs, shape), shape))
    return best


def gains_of(layers: list[tuple[np.ndarray, np.ndarray]], max_rows: int = TOKENS) -> np.ndarray:
    """Return the accepted drafts to expect of the 1.. best nodes of full trees."""
    scores, true = (np.concatenate(part, 1) for part in zip(*layers, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max_rows - 1]
    return np.take_along_axis(true, order, axis=1).mean(axis=0).cumsum()


def fixed_units(costs: StepCosts, shape: tuple[int, int, int]) -> float:
    """Return the time of a step with a fixed tree, (steps, topk, tokens)."""
    steps, topk, size = shape
    return step_units(costs, [topk] * (steps - 1), size, min(steps, size - 1) + 1)


def fixed_rate(
    costs: StepCosts,
    text: Text,
    shape: tuple[int, int, int],
    first: int = 0,
    last: int | None = None,
    max_rows: int = TOKENS,
) -> float:
    """Return the rate of a fixed tree, (steps, topk, tokens), on some steps of a text."""
    steps, topk, size = shape
    tokens = 0.0
    requests = text.all_at_once(first=first, last=last)
    repeats = -(-2000 // len(requests.is_greedy))
    for _ in range(repeats):
        tokens += 1.0 + float(gains_of(full_trees(requests, topk)[:steps], max_rows)[size - 2])
    return tokens / repeats / fixed_units(costs, shape)


def best_in_hindsight(costs: StepCosts, text: Text, batch_size: int) -> float:
    """Return the rate of the best depth and size of every step, true probabilities known.

    Every layer that is grown has full width; its candidates are known before it is paid for.
    """
    requests = text.all_at_once()
    true = [torch.from_numpy(part).float() for _, part in full_trees(requests)]
    steps = [
        [layer[i : i + batch_size] for layer in true] for i in range(0, len(true[0]), batch_size)
    ]
    extend_row = float(costs.draft_extend[1] - costs.draft_extend[0])
    growth = [float(costs.draft[TOPK - 1]) + extend_row] * (LAYERS - 1)
    price = 1.0
    for _ in range(4):  # Dinkelbach
        tokens = time = 0.0
        for layers in steps:
            choice = best_choice(layers, growth, costs.verify, SIZES, price)
            cost = sum(growth[: choice.num_layers - 1])
            cost += float(costs.verify[choice.num_draft_tokens - 1])
            tokens += 1.0 + choice.value + price * cost
            time += cost + costs.overhead + float(costs.draft_extend[1])
        price = tokens / time
    return price
