"""Drawn drafts keep the law of the target: all draws and all coins of a step, added up exactly.

The step is that of the server: `draw_children` draws, `Decider` and policy `auto` choose widths,
`graft` hangs copies in, `DraftTree` and the decider choose what is verified, `build_tree` links,
and the walk of `accept_draws` verifies, here as Python in float64. Draws are forced by their noise,
coins by values outside of 0..1.
"""

import copy
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cast_sglang.copying.automaton import SuffixIndex
from cast_sglang.copying.chances import Chances
from cast_sglang.copying.contexts import roots_of
from cast_sglang.copying.graft import graft
from cast_sglang.ops import loops as tree_ops
from cast_sglang.ops import reference as tree_reference
from cast_sglang.ops.sampled import loops
from cast_sglang.ops.sampled.contract import DrawCuts
from cast_sglang.policy.acceptance import DRAWN, GREEDY
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.tree import DraftTree, proposer_of
from tests.support.policies import costs

MAX_ERROR = 1e-9
ROWS = 7


class Pair:
    """A target and a draft whose distributions depend on the whole text so far."""

    def __init__(self, vocab, seed):
        self.vocab, self._seed = vocab, seed
        self._distribution = functools.cache(self._draw_distribution)

    def _draw_distribution(self, path, role):
        generator = np.random.default_rng((self._seed, role, *path))
        # Below some tokens the draft is sure, below others it is not: that is what a rule that
        # looks ahead would react to.
        sharpness = 3.0 if role and path and path[-1] % 2 else 0.7
        x = np.exp(sharpness * generator.normal(size=self.vocab))
        return x / x.sum()

    def target(self, path):
        return self._distribution(path, 0)

    def draft(self, path):
        return self._distribution(path, 1)


class NeedsChoice(Exception):
    """A draw for which no choice is given yet; holds the law of its outcomes."""


class Step:
    """One step of one request, its draws given."""

    def __init__(
        self,
        pair,
        policy,
        topk,
        max_layers,
        anticipates=False,
        rows=ROWS,
        costs=None,
        said=(),
        kind=DRAWN,
        copy_depth=None,
        **cuts,
    ):
        self.pair, self.policy, self.topk, self.max_layers = pair, policy, topk, max_layers
        self.rows, self.costs = rows, COSTS if costs is None else costs
        self.anticipates = anticipates
        self.said, self.kind = said, kind  # the text before the step, and how copies are hung in
        self.max_depth = copy_depth or max_layers
        self.num_copied = self.deepest_copy = 0
        values = {"temperatures": 1.0, "top_ks": 99, "top_ps": 1.0, "min_ps": 0.0, "is_drawn": True}
        self.cuts = DrawCuts(**{k: torch.tensor([v]) for k, v in (values | cuts).items()})

    def run(self, choices: list) -> tuple:
        """Return draws, tree and links; raise `NeedsChoice` where `choices` end."""
        pair, topk = self.pair, self.topk
        left = iter(choices)
        proposals, kept_tokens = [], []

        def children(paths):
            drafted = torch.tensor(np.array([pair.draft(path) for path in paths])).float()
            probs, tokens = drafted.sort(dim=1, descending=True)
            shape = loops.draw_children(probs, tokens, self.cuts, torch.ones_like(probs), topk)
            noise = torch.ones_like(probs)
            for row, q in enumerate(shape.proposals):
                order = next(left, None)
                if order is None:
                    raise NeedsChoice(dict(orders(q.double().numpy(), topk)))
                for place, m in enumerate(order):
                    noise[row, m] = (q[m] / (2.0 + topk - place)).clamp(min=1e-30)
                rest = [m for m in range(len(q)) if m not in order]
                noise[row, rest] = q[rest].clamp(min=1e-30)
            drawn = loops.draw_children(probs, tokens, self.cuts, noise, topk)
            proposals.append(drawn.proposals), kept_tokens.append(tokens)
            return drawn.probs, drawn.tokens

        decider = Decider(
            copy.deepcopy(self.policy), max_missing=4, topk=topk, is_ragged=True, shares_out=False
        )
        assert decider.begin_step(
            StepFacts(1, self.costs, None, 0, self.max_layers, self.rows, np.array([True]))
        ).drafts
        probs, tokens = children([()])
        tree = DraftTree(tokens, probs, self.max_layers, tree_ops, None, torch.tensor([True]))
        paths = {}
        for node, token in enumerate(tokens[0].tolist()):
            paths[node] = (token,)
        index, table = SuffixIndex(1 << 10), Chances().table()
        assert index.add(0, np.array(self.said, np.int64))
        roots = roots_of(index.ints, index.blocks([0]))
        while True:
            frontier = tree.frontier()
            grafts = graft(
                *(index.ints, roots, tree.tokens.numpy(), tree.scores.numpy()),
                *(tree.parents.numpy(), topk, table, np.array([self.kind])),
                num_nodes=self.rows - 1,
                max_depth=self.max_depth,
                least_scores=decider.least_scores(),
                vocab_size=pair.vocab,
                nodes=frontier.node_index.numpy(),
            )
            view = map(torch.from_numpy, (grafts.best, grafts.left))
            width = decider.width(frontier.scores, tuple(view) if grafts.has_copies else None)
            if width is None:
                break
            nodes = frontier.node_index[0, :width].tolist()
            first = tree.num_candidates
            probs, tokens = children([paths[node] for node in nodes])
            for place, token in enumerate(tokens.flatten().tolist()):
                paths[first + place] = (*paths[nodes[place // topk]], token)
            decider.expanded(frontier.scores, tree.grow(frontier, width, tokens, probs))
        num_drafted = tree.num_candidates
        for place, parent in enumerate(grafts.parents[0, : grafts.counts[0]].tolist()):
            above = () if parent < 0 else paths[parent]
            paths[num_drafted + place] = (*above, int(grafts.tokens[0, place]))
        arrays = grafts.scores, grafts.parents, grafts.tokens, grafts.copied_scores
        tree.graft(*map(torch.from_numpy, arrays))
        ranked = tree.ranked(self.rows - 1)
        settled = tree.ranked_settled(tree.settled_scores(*decider.settlement()), self.rows - 1)
        size, num_rows = decider.rows(ranked.scores, settled.scores)
        size, num_rows = grafts.fit(size, num_rows, True)
        num_rows = np.array([size]) if num_rows is None else num_rows
        if self.anticipates:
            # The second draw goes where the draft is not sure of what follows it.
            branch = [node for node, path in paths.items() if path[0] == paths[1][0]]
            if len(branch) > 1:
                scores = tree.scores.clone()
                if scores[0, branch[1:]].max() < 0.5 * scores[0, 1]:
                    scores[0, branch] = 0.0
                settled = tree_ops.rank_nodes(scores, min(self.rows - 1, scores.shape[1]))
                num_rows = np.array([1 + int((settled.scores > 0).sum())])
        ranked = settled
        size = max(2, int(num_rows[0]))
        selection = tree.select(ranked, size, torch.from_numpy(num_rows))
        links = [torch.zeros((1, size), dtype=torch.int64) for _ in range(3)]
        tree_reference.build_tree(
            selection.parent_rows, torch.tensor([9]),
            torch.zeros(size * size, dtype=torch.bool), torch.zeros(size, dtype=torch.int64),
            *links, self.max_depth,
        )  # fmt: skip
        index = selection.top_scores_index.numpy()
        texts = [(), *(paths.get(node, ()) for node in index[0].tolist())]
        joined = torch.cat(proposals).double().numpy()[None], torch.cat(kept_tokens).numpy()[None]
        proposers = np.concatenate([[0], proposer_of(index[0], topk)])
        proposers = np.where(proposers < joined[0].shape[1], proposers, -1)
        copied = [len(paths[node]) for node in index[0].tolist() if num_drafted <= node in paths]
        self.num_copied += len(copied)
        self.deepest_copy = max([self.deepest_copy, *copied])
        return texts, links[1].numpy(), links[2].numpy(), proposers[None], joined

    def outcomes(self, choices: list) -> Iterator[tuple[tuple, float, np.ndarray]]:
        """Yield each path that verify may accept, its chance, and the law of the token behind."""
        texts, next_token, next_sibling, proposers, (proposals, tokens) = self.run(choices)
        size, vocab = len(texts), self.pair.vocab
        target = np.array([[self.pair.target(text) for text in texts]])
        candidates = np.array([[text[-1] if text else 0 for text in texts]])
        for end in range(size):
            if end and not is_linked(end, next_token[0], next_sibling[0]):
                continue
            coins = np.full((1, size), 2.0)
            for node, text in enumerate(texts):
                if node and text == texts[end][: len(text)]:
                    coins[0, node] = -1.0
            nodes = np.full((1, self.max_depth + 1), -1)
            ends, chances = np.zeros((2, 1), np.int64), np.full((1, size), np.nan)
            residual = np.empty((1, vocab))
            loops._walk_draws.py_func(
                target, candidates, next_token, next_sibling, proposers, proposals, tokens,
                np.array([True]), coins, np.zeros(1), nodes, ends[0], ends[1], chances, residual,
            )  # fmt: skip
            path = nodes[0][nodes[0] >= 0]
            if path[-1] != end:
                continue  # a child of chance 0 on the way
            weight = 1.0
            for node in np.flatnonzero(~np.isnan(chances[0])):
                weight *= chances[0, node] if node in path else 1.0 - chances[0, node]
            # Nothing is left where a copy of a token that is sure was to be rejected.
            if weight and residual[0].sum():
                yield texts[end], weight, residual[0] / residual[0].sum()


def is_linked(node, next_token, next_sibling):
    return node in next_token or node in next_sibling


def orders(q, topk):
    """Yield each order of `topk` draws without replacement from q, and its chance."""
    q = q / q.sum()
    possible = np.flatnonzero(q).tolist()
    count = min(topk, len(possible))
    for order in itertools.permutations(possible, count):
        chance, left = 1.0, 1.0
        for m in order:
            chance, left = chance * q[m] / left, left - q[m]
        rest = [m for m in range(len(q)) if m not in order]
        yield (*order, *rest[: topk - count]), chance


def law(step, length):
    """Return the law of the first `length` tokens, [vocab] * length, over all draws and coins.

    Behind what a step brings, tokens follow as the target chooses them.
    """
    vocab = step.pair.vocab
    total = np.zeros((vocab,) * length)

    def add(text, weight):
        if len(text) == length:
            total[text] += weight
        elif weight:
            for token, chance in enumerate(step.pair.target(text)):
                add((*text, token), weight * chance)

    def draw(choices, weight):
        try:
            for text, chance, residual in step.outcomes(choices):
                for token in range(vocab):
                    add((*text, token), weight * chance * residual[token])
        except NeedsChoice as needs:
            for order, chance in needs.args[0].items():
                draw([*choices, order], weight * chance)

    draw([], 1.0)
    return total


def expected_law(pair, length):
    total = np.zeros((pair.vocab,) * length)
    for text in itertools.product(range(pair.vocab), repeat=length):
        total[text] = np.prod([pair.target(text[:i])[token] for i, token in enumerate(text)])
    return total


# Of two nodes a layer is expensive, so that there are few draws to add up; `WIDE` has more.
VERIFY = [1.0 + 0.05 * row for row in range(ROWS)]
COSTS = costs(verify=VERIFY, draft=[0.02, 1.0, 1.0])
WIDE = costs(verify=VERIFY, draft=[0.02, 0.025, 0.03])


def policy(max_layers, cut, price=1.0):
    made = AutoPolicy(tuple(range(2, ROWS + 1)), max_layers, extends_by_accepted=True)
    made.load_state(
        [{"batch_sizes": [1, 1], "tokens": price, "units": 1.0, "steps": 1.0, "account": 32.0}
         | {"is_plain": False}]
    )  # fmt: skip
    made.learn_settlement(1, cut, ROWS)
    return made


CASES = {
    # vocabulary, K, layers, least score of a verified node, cuts
    "wide": (3, 2, 2, 0.01, {"costs": WIDE}),
    "large": (5, 2, 2, 0.01, {}),
    "small cut": (4, 2, 2, 1e-4, {"temperatures": 0.7}),
    "large cut": (4, 3, 2, 0.2, {"temperatures": 1.5}),
    "deep": (3, 2, 3, 0.05, {}),
    "top_k": (4, 3, 2, 0.02, {"top_ks": 2}),
    "top_p": (4, 2, 2, 0.02, {"top_ps": 0.6}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_the_law_is_the_target_s(name, seed):
    vocab, topk, layers, cut, cuts = CASES[name]
    pair = Pair(vocab, seed)
    step = Step(pair, policy(layers, cut), topk, layers, **cuts)
    found = law(step, layers + 1)
    assert abs(found.sum() - 1.0) < MAX_ERROR
    assert abs(found - expected_law(pair, layers + 1)).max() < MAX_ERROR


# Texts before the step, which end with what they said before; and what was said of all tokens.
SAID = ((0, 1, 2, 0, 1), (2, 1, 0, 2, 2, 1), (1, 1, 1, 1), (0, 2, 1, 2, 0, 0, 2))


@pytest.mark.parametrize("said", SAID, ids=str)
@pytest.mark.parametrize("name", ["wide", "small cut", "large cut", "deep", "top_k", "top_p"])
def test_copies_beside_draws_keep_the_law(name, said):
    """Copies hang below the root, below draws and below each other, beside draws and alone."""
    vocab, topk, layers, cut, cuts = CASES[name]
    pair = Pair(vocab, 0)
    step = Step(pair, policy(layers, cut), topk, layers, said=said, **cuts)
    found = law(step, layers + 1)
    assert abs(found.sum() - 1.0) < MAX_ERROR
    assert abs(found - expected_law(pair, layers + 1)).max() < MAX_ERROR
    assert step.num_copied


@pytest.mark.parametrize("said", [*SAID[:3], (0, 1, 2) * 4], ids=str)
@pytest.mark.parametrize("name", ["wide", "deep"])
def test_copies_deeper_than_the_layers_keep_the_law(name, said):
    vocab, topk, layers, cut, cuts = CASES[name]
    pair, deepest = Pair(vocab, 1), layers + 2
    cuts = {"said": said, "copy_depth": deepest, **cuts}
    step = Step(pair, policy(layers, cut), topk, layers, **cuts)
    found = law(step, deepest + 1)
    assert abs(found.sum() - 1.0) < MAX_ERROR
    assert abs(found - expected_law(pair, deepest + 1)).max() < MAX_ERROR
    assert layers < step.deepest_copy <= deepest


def test_copies_that_raise_the_scores_of_draws_are_found_out():
    """As for greedy requests: a draw would then be verified more often for being the copied one."""
    pair, said = Pair(3, 1), SAID[0]
    errors = []
    for kind in (GREEDY, DRAWN):
        step = Step(pair, policy(2, 0.2), 2, 2, costs=WIDE, said=said, kind=kind)
        errors.append(abs(law(step, 3) - expected_law(pair, 3)).max())
    assert errors[0] > 1e-4 and errors[1] < MAX_ERROR


def test_trees_differ_and_some_drafts_are_accepted():
    """The cases above are no empty ones."""
    sizes, accepted = set(), 0.0
    step = Step(Pair(4, 0), policy(2, 0.02), 2, 2)

    def draw(choices, weight):
        nonlocal accepted
        try:
            sizes.add(len(step.run(choices)[0]))
            accepted += weight * sum(len(text) * w for text, w, _ in step.outcomes(choices))
        except NeedsChoice as needs:
            for order, chance in needs.args[0].items():
                draw([*choices, order], weight * chance)

    draw([], 1.0)
    assert len(sizes) > 1 and accepted > 0.7


def test_a_rule_that_looks_ahead_is_found_out():
    pair = Pair(3, 1)
    errors = [
        abs(law(Step(pair, policy(2, 0.01), 2, 2, rule, costs=WIDE), 3) - expected_law(pair, 3))
        for rule in (True, False)
    ]
    assert errors[0].max() > 1e-4 and errors[1].max() < MAX_ERROR
