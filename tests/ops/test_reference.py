"""The reference ops against their definitions as loops, and against the code they stand for."""

import ast
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.ops import ops_for, reference
from cast_sglang.policy.acceptance import GREEDY, SAMPLED, Acceptance
from tests.ops import cases

seeds = st.integers(0, 2**31)
kinds = st.sampled_from(cases.KINDS)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def best_first(scores):
    """Return places by descending score, ties to the lower place."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data(), kinds, seeds)
def test_grow_layer_is_its_loop(batch, topk, data, kind, seed):
    width = data.draw(st.integers(1, topk))
    case = cases.layer(generator(seed), batch, width, topk, kind)
    acceptance = cases.learned(seed % 7)
    bucket = data.draw(st.sampled_from([None, *range(5)]))
    curve = None if bucket is None else cases.curve_at(acceptance, bucket, batch)
    grown = reference.grow_layer(*case, curve)
    for b in range(batch):
        scores, tokens = [], []
        for w in range(width):
            drafted = left = np.float32(1.0)
            for k in range(topk):
                p = case.probs[b * width + w, k].numpy()
                if curve is not None:
                    x = min(p / max(drafted, np.float32(1e-6)), np.float32(1.0))
                    piece = sum(float(knot) <= x for knot in curve.knots)
                    kind = int(curve.kinds[b])
                    line = float(curve.starts[kind, piece])
                    line += float(curve.slopes[kind, piece]) * float(x)
                    chance = np.float32(min(1.0, max(0.0, line))) * left
                    ours = grown.probs[b * width + w, k].numpy()
                    assert float(ours) == pytest.approx(float(chance), abs=2e-6)
                    drafted, left = drafted - p, left - ours
                p = grown.probs[b * width + w, k]
                scores.append(float(case.parent_scores[b, w] * p))
                assert scores[-1] <= float(case.parent_scores[b, w])
                tokens.append(int(case.tokens[b * width + w, k]))
        best = best_first(scores)[:topk]
        assert grown.scores[b].tolist() == scores
        assert grown.frontier.scores[b].tolist() == [scores[i] for i in best]
        assert grown.frontier.tokens[b].tolist() == [tokens[i] for i in best]
        assert grown.frontier.node_index[b].tolist() == [case.layer_start + i for i in best]
        assert grown.frontier.parents[b].tolist() == [i // topk for i in best]


def test_lines_are_the_curves_of_acceptance():
    acceptance = cases.learned(5)
    knots = np.sin(np.linspace(0.0, np.pi / 2, acceptance.curves().shape[2])) ** 2
    probs = torch.rand(120, generator=generator(1))
    probs[:3] = torch.tensor([0.0, 1.0, 1e-40])
    for kind in (GREEDY, SAMPLED):
        kinds, seen = torch.full((120,), kind), []
        for bucket in range(5):
            seen.append(cases.curve_at(acceptance, bucket, 3).at(probs, kinds))
            expected = np.interp(probs.numpy(), knots, acceptance.curves()[kind, bucket])
            np.testing.assert_allclose(seen[-1].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert not any(torch.equal(seen[0], other) for other in (*seen[1:], probs))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), seeds)
def test_chances_of_siblings_sum_to_at_most_one(rows, topk, seed):
    draw = generator(seed)
    probs = torch.rand(rows, topk + 1, generator=draw) ** 3
    probs = (probs / probs.sum(1, True))[:, :topk].sort(1, descending=True).values
    chances = cases.curve_at(cases.learned(seed % 7), seed % 5, rows).chances(probs)
    assert (chances >= 0.0).all() and float(chances.sum(1).max()) <= 1.0 + 1e-5
    # Without data the draft probabilities are not corrected.
    untaught = cases.curve_at(Acceptance(), 0, rows).chances(probs)
    torch.testing.assert_close(untaught, probs, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.data(), kinds, seeds)
def test_rank_nodes_is_its_loop(batch, num_candidates, data, kind, seed):
    num_nodes = data.draw(st.integers(1, num_candidates))
    scores = cases.values(generator(seed), (batch, num_candidates), kind)
    ranked = reference.rank_nodes(scores, num_nodes)
    for row, best, index in zip(scores.tolist(), *(part.tolist() for part in ranked), strict=True):
        assert index == best_first(row)[:num_nodes]
        assert best == [row[i] for i in index]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.data(), seeds)
def test_select_nodes_is_its_loop(batch, num_candidates, data, seed):
    draw, num_nodes = generator(seed), data.draw(st.integers(1, num_candidates))
    node_index = torch.stack([torch.randperm(num_candidates, generator=draw) for _ in range(batch)])
    tokens = torch.randint(1000, node_index.shape, generator=draw)
    parents = cases.parents(draw, batch, num_candidates)
    rows = torch.randint(1, num_nodes + 2, (batch,), generator=draw)
    for num_rows in (None, rows):
        index, draft, above = reference.select_nodes(
            node_index, tokens, parents, num_nodes + 1, num_rows
        )
        for b in range(batch):
            kept = num_nodes if num_rows is None else int(num_rows[b]) - 1
            absent = num_nodes - kept
            expected = sorted(node_index[b, :kept].tolist())
            assert index[b].tolist() == expected + [num_candidates] * absent
            assert draft[b].tolist() == [int(tokens[b, i]) for i in expected] + [0] * absent
            rows_of = {-1: 0} | {node: row for row, node in enumerate(expected, 1)}
            found = [rows_of.get(int(parents[b, i]), -1) for i in expected]
            assert above[b].tolist() == found + [-1] * absent


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.lists(st.integers(1, 5), max_size=4),
    st.integers(2, 24),
    st.sampled_from([*cases.KINDS, "grafted", "ragged"]),
    seeds,
)
def test_build_tree_is_its_loop(batch, topk, widths, num_tokens, kind, seed):
    widths = [min(width, topk) for width in widths]
    case = cases.tree(generator(seed), batch, topk, widths, num_tokens, kind, kind == "ragged")
    n = case.parent_rows.shape[1] + 1
    links = cases.poisoned_links(batch, n)
    beyond = links.tree_mask[batch * n * n :].clone()
    reference.build_tree(*case[:2], *links, case.num_steps)
    assert torch.equal(links.tree_mask[batch * n * n :], beyond)
    mask = links.tree_mask[: batch * n * n].view(batch, n, n)
    for b in range(batch):
        # None for what hangs below no node.
        parents = [None, *(None if p < 0 else p for p in case.parent_rows[b].tolist())]
        children: list[list[int]] = [[] for _ in range(n)]
        for node in range(1, n):
            if parents[node] is not None:
                children[parents[node]].append(node)
        for node in range(n):
            path, up = [node], parents[node]
            while up is not None:
                path.append(up)
                up = parents[up]
            sees = sorted({0, *path})
            assert mask[b, node].nonzero().flatten().tolist() == sees
            assert links.positions[b * n + node] == case.seq_lens[b] + len(sees) - 1
            assert links.retrieve_index[b, node] == b * n + node
            assert links.retrieve_next_token[b, node] == [*children[node], -1][0]
            siblings = [] if parents[node] is None else children[parents[node]]
            later = [other for other in siblings if other > node]
            assert links.retrieve_next_sibling[b, node] == [*later, -1][0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 23), min_size=1, max_size=5),
    st.integers(1, 7),
    st.integers(1, 5),
    st.data(),
    seeds,
)
def test_list_slots_is_its_loop(lens, width, max_depth, data, seed):
    depth = data.draw(st.integers(1, max_depth))
    case = cases.slots(generator(seed), lens, width, max_depth, depth, torch.int32)
    table, rows, _, path, _, indptr, indices = case
    reference.list_slots(*case)
    expected, ends = [], [0]
    for b, length in enumerate(lens):
        for w in range(width):
            expected += table[rows[b], :length].tolist() + path[b, w, :depth].tolist()
            ends.append(len(expected))
    assert indptr.tolist() == ends
    assert indices[: ends[-1]].tolist() == expected
    assert (indices[ends[-1] :] == -7).all()


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="parent_scores must be"):
        reference.grow_layer(torch.ones(2), torch.ones(2, 3), ints(2, 3), 0)
    with pytest.raises(ValueError, match="num_nodes must be in 1..3, got 0"):
        reference.rank_nodes(torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match="tokens must have 2 rows"):
        reference.select_nodes(ints(2, 3), ints(1, 3), ints(1, 3), 2)
    case, links = cases.tree(generator(0), 2, 3, [2], 5), cases.poisoned_links(2, 5)
    with pytest.raises(ValueError, match="tree_mask must be 1-d torch.bool of 50 cells"):
        reference.build_tree(*case[:2], *links._replace(tree_mask=links.tree_mask[:49]), 2)


@pytest.mark.parametrize("name", ["__init__", "contract", "reference", "fused", "kernels"])
def test_all_is_complete_and_documented(name):
    path = Path(reference.__file__).with_name(f"{name}.py")
    module = importlib.import_module(f"cast_sglang.ops.{name}".removesuffix(".__init__"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    public = [n for n in body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert {node.name for node in public} <= set(module.__all__)
    assert all(ast.get_docstring(node) for node in public)
    assert len(module.__all__) == len(set(module.__all__)) and module.__doc__


def test_fused_has_the_names_and_signatures_of_the_reference():
    fused = pytest.importorskip("cast_sglang.ops.fused")
    assert fused.__all__ == reference.__all__
    for op in reference.__all__:
        signatures = [inspect.signature(getattr(module, op)) for module in (fused, reference)]
        assert signatures[0] == signatures[1], op


def test_the_device_chooses_the_module():
    assert ops_for("cpu").__name__ == "cast_sglang.ops.loops"
    pytest.importorskip("triton")
    assert ops_for(torch.device("cuda", 0)).__name__ == "cast_sglang.ops.fused"
