"""Tree building and greedy verification against their definitions, node by node."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

from cast_sglang.cpu import kernels

SHAPES = st.tuples(
    st.integers(1, 4),  # topk
    st.integers(1, 4),  # steps
    st.integers(2, 14),  # nodes, root included
    st.integers(1, 4),  # requests
    st.integers(0, 10**6),  # seed
)


class DraftedTree:
    """What EAGLE's draft hands to tree building, for one request, with the tree it stands for."""

    def __init__(self, rng, topk, steps, num_nodes):
        parent_of = {candidate: None for candidate in range(topk)}
        parent_list = [-1, *range(topk)]
        kept = list(range(topk))
        for step in range(1, steps):
            base = topk + topk * topk * (step - 1)
            drafted = []
            for position, parent in enumerate(kept):
                for child in range(topk):
                    parent_of[base + position * topk + child] = parent
                    drafted.append(base + position * topk + child)
            kept = rng.sample(drafted, topk)
            if step < steps - 1:
                parent_list += kept
        self.parent_list = parent_list if steps > 1 else []
        selected = set()
        while len(selected) < num_nodes - 1:
            ready = [
                candidate
                for candidate, parent in parent_of.items()
                if candidate not in selected and (parent is None or parent in selected)
            ]
            selected.add(rng.choice(ready))
        self.selected = sorted(selected)
        node_of = {candidate: i + 1 for i, candidate in enumerate(self.selected)}
        self.parent = [None] + [
            0 if parent_of[c] is None else node_of[parent_of[c]] for c in self.selected
        ]

    def path(self, node):
        """Node and its ancestors, root included."""
        nodes = [node]
        while self.parent[nodes[-1]] is not None:
            nodes.append(self.parent[nodes[-1]])
        return nodes

    def children(self, node):
        return [i for i, parent in enumerate(self.parent) if parent == node]


def num_candidates(topk, steps):
    return topk + topk * topk * (steps - 1)


def build(trees, topk, steps, num_nodes, seq_lens, mode, dtype=torch.bool):
    batch = len(trees)
    prefix_cells = int(seq_lens.sum()) * num_nodes if mode == TreeMaskMode.FULL_MASK else 0
    mask = torch.ones(prefix_cells + batch * num_nodes**2, dtype=dtype)
    positions = torch.empty(batch * num_nodes, dtype=torch.long)
    links = torch.full((3, batch, num_nodes), -1)
    kernels.build_tree(
        torch.tensor([tree.parent_list for tree in trees], dtype=torch.long),
        torch.tensor([tree.selected for tree in trees]),
        seq_lens,
        mask,
        positions,
        *links,
        topk,
        steps,
        num_nodes,
        mode,
    )
    return mask, positions.view(batch, num_nodes), links


def drafted_batch(shape):
    topk, steps, num_nodes, batch, seed = shape
    rng = random.Random(seed)
    num_nodes = min(num_nodes, topk * steps + 1)
    trees = [DraftedTree(rng, topk, steps, num_nodes) for _ in range(batch)]
    seq_lens = torch.tensor([rng.randrange(1, 30) for _ in range(batch)])
    return rng, trees, topk, steps, num_nodes, seq_lens


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_tree_links_positions_and_masks(shape):
    _, trees, topk, steps, num_nodes, seq_lens = drafted_batch(shape)
    qlen, positions, links = build(trees, topk, steps, num_nodes, seq_lens, TreeMaskMode.QLEN_ONLY)
    how = topk, steps, num_nodes, seq_lens, TreeMaskMode.FULL_MASK
    full, _, _ = build(trees, *how)
    # SGLang's `triton` has a mask of bytes.
    assert torch.equal(build(trees, *how, torch.uint8)[0].bool(), full)
    rows = full.split([n for n in (seq_lens + num_nodes).tolist() for _ in range(num_nodes)])
    qlen = qlen.view(len(trees), num_nodes, num_nodes)
    for b, tree in enumerate(trees):
        for node in range(num_nodes):
            path = tree.path(node)
            assert positions[b, node] == seq_lens[b] + len(path) - 1
            assert set(qlen[b, node].nonzero().flatten().tolist()) == set(path)
            prefix, own = rows[b * num_nodes + node].tensor_split([int(seq_lens[b])])
            assert prefix.all()
            assert torch.equal(own, qlen[b, node])
            children = [*tree.children(node), -1]
            assert links[0, b, node] == b * num_nodes + node
            assert links[1, b, node] == children[0]
            for child, sibling in zip(children, children[1:], strict=False):
                assert links[2, b, child] == sibling


def test_a_node_without_its_parent_is_not_reachable():
    # Candidate 4 was drafted under candidate 1, which was not selected.
    tree = type("Tree", (), {"parent_list": [-1, 0, 1], "selected": [0, 4]})
    _, _, links = build([tree], 2, 2, 3, torch.tensor([5]), TreeMaskMode.QLEN_ONLY)
    assert links[1].tolist() == [[1, -1, -1]]
    assert links[2].tolist() == [[-1, -1, -1]]


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_greedy_verification_follows_the_target(shape):
    rng, trees, topk, steps, num_nodes, seq_lens = drafted_batch(shape)
    batch = len(trees)
    _, _, links = build(trees, topk, steps, num_nodes, seq_lens, TreeMaskMode.QLEN_ONLY)
    # Few tokens make acceptance likely; siblings stay distinct.
    candidates = torch.zeros(batch, num_nodes, dtype=torch.long)
    for b, tree in enumerate(trees):
        for node in range(num_nodes):
            children = tree.children(node)
            tokens = rng.sample(range(max(5, len(children))), len(children))
            candidates[b, children] = torch.tensor(tokens, dtype=torch.long)
    if rng.random() < 0.5:  # as where the root stands alone
        candidates = candidates.int()
    target = torch.tensor([[rng.randrange(5) for _ in range(num_nodes)] for _ in range(batch)])
    accept_index = torch.full((batch, steps + 1), -1, dtype=torch.int32)
    predicts = torch.zeros(batch * num_nodes, dtype=torch.int32)
    num_accepted = torch.empty(batch, dtype=torch.int32)
    kernels.verify_tree_greedy(
        predicts, accept_index, num_accepted, candidates, *links, target, topk
    )
    for b, tree in enumerate(trees):
        path = [0]
        while True:
            wanted = int(target[b, path[-1]])
            match = [c for c in tree.children(path[-1]) if candidates[b, c] == wanted]
            if not match or len(path) == steps + 1:
                break
            path.append(match[0])
        flat = [b * num_nodes + node for node in path]
        assert num_accepted[b] == len(path) - 1
        assert accept_index[b].tolist() == flat + [-1] * (steps + 1 - len(path))
        assert predicts[flat].tolist() == target[b, path].tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_cache_location_helpers_match_their_loops(batch, seed):
    rng = random.Random(seed)
    req_to_token = torch.tensor(rng.sample(range(1, 1000), 6 * 40)).view(6, 40).int()
    rows = rng.sample(range(6), batch)
    starts = [rng.randrange(0, 20) for _ in range(batch)]
    counts = [rng.randrange(0, 9) for _ in range(batch)]
    expected = [req_to_token[r, s : s + 8].tolist() for r, s in zip(rows, starts, strict=True)]

    out = torch.zeros(batch * 8, dtype=torch.long)
    kernels.assign_draft_cache_locs(
        torch.tensor(rows), req_to_token, torch.tensor(starts), out, topk=2, num_cols=4
    )
    assert out.view(batch, 8).tolist() == expected
    out = kernels.assign_extend_cache_locs(
        torch.tensor(rows), req_to_token, torch.tensor(starts), None, batch, 8, "cpu"
    )
    assert out.view(batch, 8).tolist() == expected

    packed = torch.zeros(batch * 8, dtype=torch.long)
    kernels.fill_front_cache_locs(torch.tensor(counts), out, packed)
    front = [slot for row, n in zip(expected, counts, strict=True) for slot in row[:n]]
    assert packed.tolist() == front + [0] * (batch * 8 - len(front))

    accept_index = torch.tensor([rng.choice([-1, i]) for i in range(batch * 8)])
    packed = torch.zeros(batch * 8, dtype=torch.long)
    kernels.fill_accepted_cache_locs(accept_index, out, packed, batch * 8)
    accepted = [int(out[i]) for i in accept_index if i >= 0]
    assert packed.tolist() == accepted + [0] * (batch * 8 - len(accepted))

    new_slots = torch.arange(2000, 2000 + sum(counts))
    table = req_to_token.clone()
    for row, start, count in zip(rows, starts, counts, strict=True):
        table[row, start : start + count] = new_slots[:count].int()
        new_slots = new_slots[count:]
    kernels.assign_req_to_token(
        torch.tensor(rows),
        req_to_token,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32) + torch.tensor(counts, dtype=torch.int32),
        torch.arange(2000, 2000 + sum(counts)),
        batch,
    )
    assert torch.equal(table, req_to_token)


def test_bonus_token_is_the_last_accepted():
    accepted = torch.tensor([[7, 8, 9], [1, 2, 3]], dtype=torch.int32).flatten()
    bonus = torch.zeros(2, dtype=torch.int32)
    kernels.fill_bonus_tokens(accepted, torch.tensor([3, 1], dtype=torch.int32), bonus, 3, 2)
    assert bonus.tolist() == [9, 1]


def test_positions_of_new_tokens():
    prefix = torch.tensor([4, 0, 9], dtype=torch.int32)
    extend = torch.tensor([3, 1, 2], dtype=torch.int32)
    positions, starts = kernels.compute_position(prefix, extend)
    assert positions.tolist() == [4, 5, 6, 0, 9, 10]
    assert positions.dtype == torch.int64
    assert starts.tolist() == [0, 3, 4]
    assert starts.dtype == torch.int32


def test_a_request_goes_on_in_the_page_of_its_last_token():
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    table = torch.randint(1, 1000, (5, 9), dtype=torch.int32)
    rows, lens = torch.tensor([3, 1, 4]), torch.tensor([9, 0, 1])
    found = kernels.get_last_loc(table, rows, lens)
    assert found.tolist() == [int(table[3, 8]), -1, int(table[4, 0])]
    assert torch.equal(found, get_last_loc_torch(table, rows, lens)) and found.dtype == lens.dtype
