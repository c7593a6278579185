"""The tree: it is one at every cut, and with EAGLE's choices it is SGLang's own, node for node."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.ops import reference
from cast_sglang.policy.fixed import EaglePolicy
from cast_sglang.tree import DraftTree, parents_of


def children(generator, rows, topk, vocab=1000, certain=False):
    """Draw the K best children of each row: descending probabilities that sum to at most 1."""
    probs = torch.rand(rows, topk, generator=generator).sort(dim=1, descending=True).values
    probs = probs / probs.sum(dim=1, keepdim=True) * 0.9
    if certain:
        probs[:, 0] = 1.0
    tokens = torch.stack([torch.randperm(vocab, generator=generator)[:topk] for _ in range(rows)])
    return tokens, probs


def grown(generator, batch, topk, widths, max_layers=None, certain=False, is_drawn=None):
    tree = DraftTree(
        *children(generator, batch, topk, certain=certain),
        max_layers or len(widths) + 1,
        reference,
        is_drawn=is_drawn,
    )
    for width in widths:
        kept = tree.frontier()
        tree.grow(kept, width, *children(generator, batch * width, topk, certain=certain))
    return tree


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 4),
    topk=st.integers(2, 5),
    seed=st.integers(0, 2**31),
    shape=st.data(),
    certain=st.booleans(),
)
def test_every_cut_of_the_ranking_is_a_tree(batch, topk, seed, shape, certain):
    """Also where children have probability 1, so that scores tie with their parents'."""
    generator = torch.Generator().manual_seed(seed)
    widths = shape.draw(st.lists(st.integers(1, topk), max_size=5))
    tree = grown(generator, batch, topk, widths, max_layers=7, certain=certain)
    assert tree.num_candidates == topk + topk * sum(widths)
    num_draft_tokens = shape.draw(st.integers(2, tree.num_candidates + 1))
    ranked = tree.ranked(tree.num_candidates)
    assert (ranked.scores.diff(dim=1) <= 0).all()
    selection = tree.select(ranked, num_draft_tokens)
    assert tree.parents.shape == tree.tokens.shape
    for row in range(batch):
        expanded = np.concatenate([np.empty(0, int), *(nodes[row] for nodes in tree.expanded)])
        parents = parents_of(expanded, topk)
        assert tree.parents[row].tolist() == parents.tolist()
        chosen = selection.top_scores_index[row].tolist()
        assert chosen == sorted(set(chosen))
        for index in range(num_draft_tokens - 1):
            above = int(selection.parent_rows[row, index])
            assert [-1, *chosen][above] == parents[chosen[index]] and above <= index


@settings(max_examples=80, deadline=None)
@given(batch=st.integers(1, 4), topk=st.integers(2, 4), seed=st.integers(0, 2**31), shape=st.data())
def test_requests_of_unequal_numbers_of_nodes(batch, topk, seed, shape):
    """A request has the nodes it would have alone, and no link leads to a row behind them."""
    from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

    from cast_sglang.cpu.kernels import build_tree
    from cast_sglang.serving.drafting.verify_input import numbers_by_row

    generator = torch.Generator().manual_seed(seed)
    widths = shape.draw(st.lists(st.integers(1, topk), max_size=4))
    tree = grown(generator, batch, topk, widths)
    ranked = tree.ranked(tree.num_candidates)
    counts = st.integers(1, tree.num_candidates + 1)
    num_rows = shape.draw(st.lists(counts, min_size=batch, max_size=batch))
    width = max(2, *num_rows)
    selection = tree.select(ranked, width, torch.tensor(num_rows))
    seq_lens = torch.randint(0, 9, (batch,), generator=generator)
    mask = torch.zeros(batch * width**2, dtype=torch.bool)
    positions = torch.zeros(batch * width, dtype=torch.int64)
    links = torch.zeros((3, batch, width), dtype=torch.int64)
    build_tree(
        *numbers_by_row(selection.parent_rows),
        seq_lens,
        mask,
        positions,
        *links,
        width,
        2,
        width,
        TreeMaskMode.QLEN_ONLY,
    )
    for row, count in enumerate(num_rows):
        alone = tree.select(ranked, max(2, count))
        assert torch.equal(
            selection.top_scores_index[row, : count - 1], alone.top_scores_index[row, : count - 1]
        )
        assert torch.equal(
            selection.draft_tokens[row, : count - 1], alone.draft_tokens[row, : count - 1]
        )
        assert (links[1:, row] < count).all()
        reached, todo = set(), [0]
        while todo:
            node = todo.pop()
            reached.add(node)
            child = int(links[1, row, node])
            while child >= 0:
                todo.append(child)
                child = int(links[2, row, child])
        assert reached == set(range(count))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 4),
    topk=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    least_score=st.sampled_from([0.0, 1e-3, 0.02, 0.2, 2.0]),
    max_nodes=st.integers(1, 40),
    shape=st.data(),
)
def test_what_hangs_below_a_draw_does_not_decide_about_it(
    batch, topk, seed, least_score, max_nodes, shape
):
    """And the draws of a node that are verified are the first ones, and form a tree."""
    widths = shape.draw(st.lists(st.integers(1, topk), min_size=1, max_size=4))
    is_drawn = torch.arange(batch) % 2 == 0

    def settled(num_equal_layers):
        generator = torch.Generator().manual_seed(seed)
        tree = grown(generator, batch, topk, widths[:num_equal_layers], 6, is_drawn=is_drawn)
        generator.manual_seed(seed + num_equal_layers)  # other children from here on
        for width in widths[num_equal_layers:]:
            tree.grow(tree.frontier(), width, *children(generator, batch * width, topk))
        scores = tree.settled_scores(least_score, max_nodes)
        ranked = tree.ranked_settled(scores, tree.num_candidates)
        return tree, [
            set(nodes[scores > 0.0].tolist())
            for nodes, scores in zip(ranked.node_index, ranked.scores, strict=True)
        ]

    tree, whole = settled(len(widths))
    for equal in range(len(widths)):
        end = topk + topk * sum(widths[:equal])
        for b, (ours, theirs) in enumerate(zip(whole, settled(equal)[1], strict=True)):
            if is_drawn[b]:
                assert {n for n in ours if n < end} == {n for n in theirs if n < end}
    expanded = torch.cat(tree.expanded, dim=1)
    for b, nodes in enumerate(whole):
        if not is_drawn[b]:
            assert len(nodes) == tree.num_candidates
            continue
        assert len(nodes) <= max_nodes
        parents = parents_of(expanded[b].numpy(), topk)
        for node in nodes:
            assert parents[node] == -1 or parents[node] in nodes
            assert node % topk == 0 or node - 1 in nodes


def test_a_ranking_may_leave_deep_layers_out():
    generator = torch.Generator().manual_seed(1)
    tree = grown(generator, 2, 3, [2, 3])
    shallow = tree.ranked(tree.num_candidates, num_layers=2)
    assert shallow.scores.shape == (2, 3 + 2 * 3)
    assert int(shallow.node_index.max()) == 3 + 2 * 3 - 1


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    topk=st.integers(2, 6),
    steps=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    shape=st.data(),
)
def test_eagle_policy_gives_sglangs_tree_node_for_node(batch, topk, steps, seed, shape):
    from sglang.srt.speculative.eagle_utils import organize_draft_results
    from sglang.srt.speculative.spec_utils import select_top_k_tokens

    # SGLang compiles the function; here that would compile it again for every shape.
    torch.compiler.set_stance("force_eager")
    num_draft_tokens = shape.draw(st.integers(2, 1 + topk + (steps - 1) * topk * topk))
    generator = torch.Generator().manual_seed(seed)
    layers = [children(generator, batch, topk)]
    layers += [children(generator, batch * topk, topk) for _ in range(steps - 1)]

    hidden, scores = torch.zeros(batch, 1), None
    score_list, token_list, parents_list = [], [], []
    for step, (tokens, probs) in enumerate(layers):
        _, hidden, scores, info = select_top_k_tokens(step, probs, tokens, hidden, scores, topk)
        score_list.append(info[0])
        token_list.append(info[1])
        parents_list.append(info[2])
    theirs = organize_draft_results(score_list, token_list, parents_list, num_draft_tokens)

    policy = EaglePolicy(num_draft_tokens)
    tree = DraftTree(*layers[0], steps, reference)
    for tokens, probs in layers[1:]:
        kept = tree.frontier()
        width = policy.breadth(kept.scores)
        assert policy.deepen()
        tree.grow(kept, width, tokens, probs)
    ranked = tree.ranked(num_draft_tokens - 1)
    ours = tree.select(ranked, policy.rerank(ranked.scores))

    assert torch.equal(ours.top_scores_index, theirs[1])
    assert torch.equal(ours.draft_tokens, theirs[2])
    # SGLang leaves the list empty where only the root has children.
    proposers = torch.nn.functional.pad(theirs[0], (0, 1), value=-1)
    above = torch.where(theirs[1] < topk, -1, proposers.gather(1, theirs[1] // topk))
    numbers = torch.nn.functional.pad(theirs[1], (1, 0), value=-1)
    assert torch.equal(numbers.gather(1, ours.parent_rows), above)


def test_frontier_is_the_best_of_the_newest_layer():
    tree = DraftTree(torch.tensor([[7, 8]]), torch.tensor([[0.6, 0.3]]), 3, reference)
    first = tree.frontier()
    assert first.scores.tolist() == [pytest.approx([0.6, 0.3])]
    tree.grow(first, 2, torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.5, 0.1], [0.9, 0.05]]))
    second = tree.frontier()
    assert second.tokens.tolist() == [[1, 3]]
    assert second.scores.tolist() == [pytest.approx([0.3, 0.27])]
    assert second.parents.tolist() == [[0, 1]]
    assert second.node_index.tolist() == [[2, 4]]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"\[B, K\]"):
        DraftTree(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4), 3, reference)
    tree = DraftTree(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2), 1, reference)
    with pytest.raises(ValueError, match="already has 1 layers"):
        tree.grow(tree.frontier(), 1, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    tree = DraftTree(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2), 2, reference)
    with pytest.raises(ValueError, match="children must be"):
        tree.grow(tree.frontier(), 2, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="num_draft_tokens must be in 2..3"):
        tree.select(tree.ranked(2), 4)
