"""Grafts: against a look through the whole text, and as trees."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.copying.automaton import SuffixIndex
from cast_sglang.copying.chances import CLASSES_OF_KIND, Chances, class_of
from cast_sglang.copying.contexts import roots_of
from cast_sglang.copying.graft import Seen, graft
from cast_sglang.copying.outcomes import judge
from cast_sglang.copying.reference import Text
from cast_sglang.ops import reference
from cast_sglang.policy.acceptance import DRAWN, GREEDY, SAMPLED
from cast_sglang.tree import DraftTree, layer_ends

VOCAB = 6


def grown(rng, batch, topk, widths):
    """A tree of drafted candidates; siblings have distinct tokens, likeliest first."""

    def children(rows):
        tokens = np.stack([rng.permutation(VOCAB)[:topk] for _ in range(rows)])
        probs = np.sort(rng.dirichlet(np.ones(topk + 1), rows)[:, :topk], axis=1)[:, ::-1]
        return torch.from_numpy(tokens), torch.from_numpy(probs.copy()).float()

    tree = DraftTree(*children(batch), len(widths) + 1, reference)
    for width in widths:
        tree.grow(tree.frontier(), width, *children(batch * width))
    return tree


def indexed(texts):
    index = SuffixIndex(1 << 12)
    for request, text in enumerate(texts):
        if text:
            assert index.add(request, np.array(text, np.int64))
    return index, roots_of(index.ints, index.blocks(range(len(texts))))


def grafted(tree, texts, table, least_score=0.0, kinds=None, **limits):
    index, roots = indexed(texts)
    drafted = tree.tokens.numpy(), tree.scores.numpy(), tree.parents.numpy()
    kinds = np.full(len(texts), GREEDY) if kinds is None else np.array(kinds)
    limits["least_scores"] = np.full(len(texts), least_score, np.float32)
    return graft(index.ints, roots, *drafted, tree.topk, table, kinds, **limits)


def learned(rng):
    chances = Chances()
    for _ in range(5):
        chances.update(rng.integers(0, 2 * CLASSES_OF_KIND, 80), rng.random(80) < rng.random())
    return chances.table()


def expected_tree(tree, text, table, b, num_nodes, max_depth, least_score, kind):
    """What `graft` says it does, node by node, by the text alone.

    Returns each node's score and its copied child's class and token, by candidate number.
    """
    tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
    scores = [float(score) for score in tree.scores[b]]
    size = len(tokens)
    floor = sorted(scores, reverse=True)[num_nodes - 1] if size >= num_nodes else 0.0
    is_drawn = kind == DRAWN
    floor = least_score if is_drawn else max(floor, least_score)
    floor *= 1 + 1e-5  # products are rounded otherwise here
    text, new, classes, copied = Text(text), {}, {}, []

    def copy_below(node, context, is_copied):
        token, length, count, same = text.copy_of(context)
        if token < 0:
            return None
        children = [c for c in range(size) if parents[c] == node and not is_copied]
        said = [tokens[c] for c in children]
        if is_drawn:  # a draw that is not verified may be copied all the same
            said = [t if scores[c] > floor else -1 for c, t in zip(children, said, strict=True)]
            children = [c for c in children if tokens[c] != token or scores[c] > floor]
        has_children = any(parents[c] == node for c in range(size)) and not is_copied
        agreement = 3 if not has_children else 2
        agreement = min(said.index(token), 1) if token in said else agreement
        kind_class = class_of(length, count, same, agreement)
        classes[node] = kind_class + (0 if kind == GREEDY else CLASSES_OF_KIND), token
        return context[len(context) - length :], token, table[classes[node][0]], children

    shares = {c: scores[c] / (scores[p] if p >= 0 else 1.0) for c, p in enumerate(parents)
              if p < 0 or scores[p] > 0}  # fmt: skip
    contexts = {-1: text.longest_match()}
    new[-1], depth = 1.0, {-1: 0}
    for node in range(-1, size):
        if node >= 0:
            above = parents[node]
            new[node], depth[node] = new[above] * shares.get(node, 0.0), depth[above] + 1
            if new[node] <= floor or above not in contexts:
                continue
            contexts[node] = text.descend(contexts[above], tokens[node])
        found, at, score = copy_below(node, contexts[node], False), node, new[node]
        while found is not None:
            context, token, chance, children = found
            match = [c for c in children if tokens[c] == token]
            children = [] if is_drawn else children
            others = sum(shares[c] for c in children if c not in match)
            for c in match if not is_drawn else []:
                shares[c] = chance = max(shares[c], chance)
            if children and others + chance > 1.0:
                for c in children:
                    if c not in match:
                        shares[c] *= (1.0 - chance) / others
            score *= chance
            if match or depth[at] >= max_depth or score <= floor or len(copied) == num_nodes:
                break
            number = size + len(copied)
            copied.append((at, token, score))
            depth[number] = depth[at] + 1
            at, found = number, copy_below(number, text.descend(context, token), True)
    return new, classes, copied


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    topk=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), max_size=3),
    num_nodes=st.integers(1, 12),
    max_depth=st.integers(1, 6),
    least_score=st.sampled_from([0.0, 0.0, 0.01, 0.11]),
    kind=st.sampled_from([GREEDY, SAMPLED, DRAWN]),
)
def test_grafts_are_what_the_text_says(
    seed, batch, topk, sizes, num_nodes, max_depth, least_score, kind
):
    rng = np.random.default_rng(seed)
    tree = grown(rng, batch, topk, [min(size, topk) for size in sizes])
    texts = [rng.integers(0, VOCAB - 1, rng.integers(0, 25)).tolist() for _ in range(batch)]
    table = learned(rng)
    found = grafted(
        tree,
        texts,
        table,
        least_score,
        [kind] * batch,
        num_nodes=num_nodes,
        max_depth=max_depth,
        vocab_size=VOCAB,
    )
    size, deepest = tree.num_candidates, 0
    for b, text in enumerate(texts):
        new, classes, copied = expected_tree(
            tree, text, table, b, num_nodes, max_depth, least_score, kind
        )
        np.testing.assert_allclose(
            found.scores[b], [new[c] for c in range(size)], rtol=2e-5, atol=1e-12
        )
        assert found.counts[b] == len(copied)
        ours = zip(found.parents[b], found.tokens[b], found.copied_scores[b], strict=True)
        for place, (parent, token, score) in enumerate(ours):
            if place < len(copied):
                assert (parent, token) == copied[place][:2]
                np.testing.assert_allclose(score, copied[place][2], rtol=2e-5)
            else:
                assert (parent, token, score) == (-1, 0, 0.0)
        expected = np.full((2, 1 + size + num_nodes), -1)
        for node, pair in classes.items():
            expected[:, node + 1] = pair
        assert found.classes[b].tolist() == expected[0].tolist()
        assert found.child_tokens[b].tolist() == expected[1].tolist()
        depth = {-1: 0}
        for node, parent in enumerate([*tree.parents[b].tolist(), *found.parents[b].tolist()]):
            depth[node] = depth[parent] + 1
        deepest = max([deepest, *(depth[size + place] for place in range(len(copied)))])
    assert found.depth == deepest <= max_depth
    assert found.has_copies == (found.classes >= 0).any()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    topk=st.integers(2, 4),
    sizes=st.lists(st.integers(1, 4), max_size=3),
    num_rows=st.integers(2, 13),
)
def test_every_cut_of_a_grafted_tree_is_a_tree(seed, topk, sizes, num_rows):
    """Siblings have distinct tokens, children score no higher than parents, chances fit into 1."""
    rng = np.random.default_rng(seed)
    tree = grown(rng, 2, topk, [min(size, topk) for size in sizes])
    texts = [rng.integers(0, VOCAB - 1, 30).tolist() for _ in range(2)]
    drafted = tree.num_candidates
    table = learned(rng)
    found = grafted(tree, texts, table, num_nodes=12, max_depth=8, vocab_size=VOCAB)
    arrays = found.scores, found.parents, found.tokens, found.copied_scores
    tree.graft(*map(torch.from_numpy, arrays))
    assert tree.num_candidates == drafted + 12
    num_rows = min(num_rows, drafted + int(found.counts.min()) + 1)
    selection = tree.select(tree.ranked(tree.num_candidates), num_rows)
    scores, parents = tree.scores.numpy(), tree.parents.numpy()
    for b in range(2):
        chosen = [-1, *selection.top_scores_index[b].tolist()]
        seen = set()
        for row, node in enumerate(chosen[1:]):
            above = int(selection.parent_rows[b, row])
            assert chosen[above] == parents[b, node] < node
            token = int(selection.draft_tokens[b, row])
            assert (above, token) not in seen
            seen.add((above, token))
        real = drafted + found.counts[b]
        for node in range(-1, real):
            above = 1.0 if node < 0 else scores[b, node]
            children = scores[b, :real][parents[b, :real] == node]
            assert children.sum() <= above * (1 + 1e-5)
            assert (children <= above).all()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    topk=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    num_nodes=st.integers(1, 12),
    kind=st.sampled_from([GREEDY, DRAWN]),
)
def test_what_was_found_while_a_tree_grew_is_found_again(seed, topk, sizes, num_nodes, kind):
    rng = np.random.default_rng(seed)
    tree = grown(rng, 2, topk, [min(size, topk) for size in sizes])
    texts = [rng.integers(0, VOCAB - 1, 30).tolist() for _ in range(2)]
    table, limits = learned(rng), {"num_nodes": num_nodes, "max_depth": 5, "vocab_size": VOCAB}
    size = tree.num_candidates
    seen = Seen(2, size + 3, 6)
    assert seen.holds(2, size, 5) and seen.holds(2, size + 3, 6)
    for other in ((3, size, 5), (2, size + 4, 5), (2, size, 7)):
        assert not seen.holds(*other)
    index, roots = indexed(texts)
    arrays = tree.tokens.numpy(), tree.scores.numpy(), tree.parents.numpy()
    ends = layer_ends([nodes.shape[1] for nodes in tree.expanded], topk)
    for least in (0.05, 0.0):  # a step, and another one whose limit is lower
        kinds, floors = np.full(2, kind), np.full(2, least, np.float32)
        limits["least_scores"] = floors
        for end in ends.tolist():
            part = [array[:, :end] for array in arrays]
            how = topk, table, kinds
            again = graft(index.ints, roots, *part, *how, **limits, seen=seen)
            once = graft(index.ints, roots, *part, *how, **limits)
            for ours, theirs in zip(again, once, strict=True):
                assert np.array_equal(ours, theirs)
    seen.forget()
    other_text, other_roots = indexed([text[::-1] for text in texts])
    again = graft(other_text.ints, other_roots, *arrays, *how, **limits, seen=seen)
    once = graft(other_text.ints, other_roots, *arrays, *how, **limits)
    assert all(map(np.array_equal, again, once))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 3), max_size=3))
def test_without_copies_a_tree_is_node_for_node_what_it_was(seed, sizes):
    """With no text, with text of a request that wants none, and where nothing was said before."""
    rng = np.random.default_rng(seed)
    tree = grown(rng, 3, 3, sizes)
    before = tree.scores.clone()
    rows = min(9, tree.num_candidates + 1)
    alone = tree.select(tree.ranked(tree.num_candidates), rows)
    limits = {"num_nodes": 8, "max_depth": 6, "vocab_size": VOCAB}
    found = grafted(tree, [[], [], [100, 101, 102]], learned(rng), **limits)
    assert not found.counts.any() and (found.classes < 0).all() and found.depth == 0
    assert not found.has_copies
    assert np.array_equal(found.scores, before.numpy())
    arrays = found.scores, found.parents, found.tokens, found.copied_scores
    tree.graft(*map(torch.from_numpy, arrays))
    for ours, theirs in zip(tree.select(tree.ranked(8), rows), alone, strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 3), max_size=3))
def test_copies_change_nothing_of_drawn_candidates(seed, sizes):
    """Neither their scores nor which of them may be verified; copies are numbered behind them."""
    rng = np.random.default_rng(seed)
    tree = grown(rng, 2, 3, sizes)
    before, drafted = tree.scores.clone(), tree.num_candidates
    texts = [rng.integers(0, VOCAB - 1, 30).tolist() for _ in range(2)]
    limits = {"num_nodes": 8, "max_depth": 6, "vocab_size": VOCAB}
    found = grafted(tree, texts, learned(rng), 0.02, [DRAWN, DRAWN], **limits)
    assert np.array_equal(found.scores, before.numpy())
    arrays = found.scores, found.parents, found.tokens, found.copied_scores
    tree.graft(*map(torch.from_numpy, arrays))
    tree._is_drawn = torch.ones(2, 1, dtype=torch.bool)
    settled = tree.settled_scores(0.02, 9)
    alone = before.masked_fill((before < 0.02) | ((before >= 0.02).cumsum(1) > 9), 0.0)
    assert torch.equal(settled[:, :drafted], alone)


def test_a_token_outside_the_vocabulary_is_not_copied():
    """As the numbers that stand for an image in a prompt."""
    tree = grown(np.random.default_rng(0), 1, 2, [])
    text = [1, 900, 2, 1]
    limits = {"num_nodes": 4, "max_depth": 4}
    table = Chances().table()
    assert grafted(tree, [text], table, vocab_size=6, **limits).classes[0, 0] == -1
    assert grafted(tree, [text], table, vocab_size=901, **limits).child_tokens[0, 0] == 900


def test_a_policy_sees_what_copies_leave_to_the_draft():
    tokens, probs = torch.tensor([[3, 4]]), torch.tensor([[0.5, 0.25]])
    tree = DraftTree(tokens, probs, 3, reference)
    table = np.full(2 * CLASSES_OF_KIND, 0.75, np.float32)
    limits = {"num_nodes": 5, "max_depth": 3, "vocab_size": VOCAB}
    nodes = tree.frontier().node_index.numpy()
    found = grafted(tree, [[3, 5, 2, 3, 5, 9, 2]], table, nodes=nodes, **limits)
    # Token 3 followed 2, and below it 5, and then 9, which is no token.
    np.testing.assert_allclose(found.scores[0], [0.75, 0.25])
    assert found.tokens[0, 0] == 5 and found.counts[0] == 1
    np.testing.assert_allclose(found.best[0], [0.75, 0.75 * 0.75, 0.25, 0, 0])
    # Nothing was said below 4, so all of its score is left.
    np.testing.assert_allclose(found.left[0], [0.75 * 0.25, 0.25])


def test_copies_are_judged_by_how_the_text_goes_on():
    """Also those that were not verified, and no further than the accepted path."""
    tokens, probs = torch.tensor([[3, 4], [3, 4]]), torch.tensor([[0.5, 0.25]] * 2)
    tree = DraftTree(tokens, probs, 3, reference)
    table = np.full(2 * CLASSES_OF_KIND, 0.75, np.float32)
    text = [3, 5, 1, 2, 3, 5, 1, 0, 2]
    found = grafted(tree, [text, []], table, num_nodes=5, max_depth=3, vocab_size=VOCAB)
    assert found.tokens[0, :2].tolist() == [5, 1]
    arrays = found.scores, found.parents, found.tokens, found.copied_scores
    tree.graft(*map(torch.from_numpy, arrays))
    selection = tree.select(tree.ranked(5), 4)
    index = selection.top_scores_index.numpy()
    assert index[0].tolist() == [0, 2, 3]  # 3, then 5 and 1, both copied
    # The first request accepts 3 and 5 and goes on with 0, the second accepts nothing.
    accept_index = np.array([[0, 1, 2, -1], [4, -1, -1, -1]])
    tokens = np.array([[3, 5, 0], [4, 0, 0]])
    seen = judge(found, index, accept_index, tokens, np.array([3, 1]))
    classes, followed, num_copied = seen
    assert classes.tolist() == found.classes[0, [0, 1, 3]].tolist()
    assert followed.tolist() == [True, True, False] and num_copied == 1
    # As many rows as there are nodes, where requests may have unequal numbers.
    assert found.fit(4, None, True)[1].tolist() == [4, 3]
    assert found.fit(4, None, False) == (4, None) and found.fit(3, None, True) == (3, None)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    texts=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=40), min_size=1, max_size=3),
    num_nodes=st.integers(1, 8),
    max_depth=st.integers(1, 8),
)
def test_without_a_draft_copies_are_a_chain(seed, texts, num_nodes, max_depth):
    """Of the text alone: each node is what followed the longest known end of the path to it."""
    table = learned(np.random.default_rng(seed))
    index, roots = indexed(texts)
    nothing = np.empty((len(texts), 0), np.int64)
    kinds = np.full(len(texts), GREEDY)
    found = graft(
        *(index.ints, roots, nothing, nothing.astype(np.float32), nothing, 1, table, kinds),
        num_nodes=num_nodes,
        max_depth=max_depth,
        least_scores=np.full(len(texts), 0.01, np.float32),
        vocab_size=VOCAB,
    )
    rows = num_nodes + 1
    numbers, tokens, parent_rows = found.chains(rows)
    for b, words in enumerate(texts):
        text, expected, scores = Text(words), [], []
        context = text.longest_match() if words else []
        while len(expected) < min(num_nodes, max_depth):
            token, length, count, same = text.copy_of(context) if words else (-1, 0, 0, 0)
            if token < 0:
                break
            score = table[class_of(length, count, same, 3)] * (scores[-1] if scores else 1.0)
            if score <= 0.01:
                break
            expected.append(token)
            scores.append(score)
            context = text.descend(context[len(context) - length :], token)
        size = len(expected)
        assert found.counts[b] == size
        assert tokens[b].tolist() == expected + [0] * (num_nodes - size)
        assert parent_rows[b].tolist() == [*range(size), *[-1] * (num_nodes - size)]
        assert numbers[b].tolist() == [*range(size), *[num_nodes] * (num_nodes - size)]
        np.testing.assert_allclose(found.copied_scores[b, :size], scores, rtol=1e-5)
    assert found.depth == found.counts.max(initial=0)
    assert [part.shape for part in found.chains(1)] == [(len(texts), 0)] * 3
