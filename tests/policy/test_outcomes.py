"""Outcomes of verify: against a walk down the tree."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.ops import reference
from cast_sglang.policy.outcomes import verify_outcomes
from cast_sglang.tree import DraftTree


def random_selection(seed: int, batch: int, topk: int, layers: int, size: int):
    """A grown tree with a random part of it selected; also each candidate's parent and depth."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    tokens = torch.zeros(batch, topk, dtype=torch.int64)
    probs = rand(batch, topk).sort(dim=1, descending=True).values
    tree = DraftTree(tokens, probs, layers, reference)
    parents = torch.full((batch, topk), -1)
    depths = [1] * topk
    while tree.num_layers < layers:
        frontier = tree.frontier()
        width = int(rand(1) * topk) + 1
        probs = rand(batch * width, topk).sort(dim=1, descending=True).values
        tree.grow(frontier, width, tokens.repeat_interleave(width, 0), probs)
        kept = frontier.node_index[:, :width].repeat_interleave(topk, dim=1)
        parents = torch.cat((parents, kept), dim=1)
        depths += [tree.num_layers] * (width * topk)
    size = min(size, tree.num_candidates + 1)
    return tree.select(tree.ranked(size - 1), size), parents, depths


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    topk=st.integers(1, 4),
    layers=st.integers(1, 5),
    size=st.integers(2, 24),
)
def test_outcomes_are_those_of_a_walk(seed, batch, topk, layers, size):
    selection, parents, depths = random_selection(seed, batch, topk, layers, size)
    index = selection.top_scores_index
    size = index.shape[1] + 1
    rng = np.random.default_rng(seed)
    accept_index = np.full((batch, layers + 1), -1)
    # As a draft gives them: siblings' probabilities fall and sum to less than 1.
    probs = (0.4 / (1 + np.arange(parents.shape[1]) % topk)).astype(np.float32)
    expected = {"shares": [], "depths": [], "is_tried": [], "accepted": []}
    for b in range(batch):
        nodes = index[b].tolist()
        path, at = [], -1
        while True:
            children = [g for g in nodes if int(parents[b, g]) == at]
            if not children or rng.random() < 0.3:
                break
            at = int(rng.choice(children))
            path.append(at)
        accept_index[b, 0] = b * size
        accept_index[b, 1 : 1 + len(path)] = [b * size + 1 + nodes.index(g) for g in path]
        expected["depths"].append([depths[g] for g in nodes])
        expected["accepted"].append([g in path for g in nodes])
        before = [[s for s in range(g // topk * topk, g)] for g in nodes]
        expected["is_tried"].append(
            [
                int(parents[b, g]) in (-1, *path)
                and all(s in nodes and s not in path for s in siblings)
                for g, siblings in zip(nodes, before, strict=True)
            ]
        )
        expected["shares"].append(
            [
                probs[g] / (1 - probs[[s for s in siblings if s in nodes]].sum())
                for g, siblings in zip(nodes, before, strict=True)
            ]
        )
    outcomes = verify_outcomes(
        selection.parent_rows.numpy(),
        index.numpy(),
        accept_index,
        np.tile(probs, (batch, 1)),
        topk,
    )
    for name in ("depths", "is_tried", "accepted"):
        assert getattr(outcomes, name).tolist() == expected[name]
    np.testing.assert_allclose(outcomes.shares, expected["shares"], rtol=1e-5)
