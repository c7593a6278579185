"""The compiled loops against the reference, bit for bit, where the fused ops are compared too."""

import inspect

import pytest
import torch

from cast_sglang.ops import loops, ops_for, reference
from tests.ops import cases
from tests.ops.test_fused import LAYERS, RANKINGS, TREES, assert_same, kinds


def test_names_and_signatures_are_the_reference_ones():
    assert ops_for("cpu") is loops
    assert sorted(loops.__all__) == sorted(reference.__all__)
    for name in loops.__all__:
        ours, theirs = (inspect.signature(getattr(ops, name)) for ops in (loops, reference))
        assert ours == theirs, name


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_grow_layer(is_calibrated):
    acceptance = cases.learned(3)
    for (batch, width, topk), kind, generator in kinds(LAYERS):
        case = cases.layer(generator, batch, width, topk, kind)
        curve = cases.curve_at(acceptance, topk % 5, batch) if is_calibrated else None
        expected = reference.grow_layer(*case, curve)
        assert_same(loops.grow_layer(*case, curve), expected, (batch, width, topk, kind))


def test_rank_nodes():
    for (batch, m, n), kind, generator in kinds(RANKINGS):
        scores = cases.values(generator, (batch, m), kind)
        expected = reference.rank_nodes(scores, n)
        assert_same(loops.rank_nodes(scores, n), expected, (batch, m, n, kind))
    scores = torch.tensor([[0.5, 0.25, 0.0, 0.5, 1.0, 1e-40, 0.5, 1.0]])
    for view in (scores, scores[:, :5], scores[:, ::2]):
        assert_same(loops.rank_nodes(view, 4), reference.rank_nodes(view, 4), view)


def test_select_nodes():
    for (batch, m, n), _, generator in kinds(RANKINGS):
        index = torch.stack([torch.randperm(m, generator=generator) for _ in range(batch)])
        tokens = torch.randint(2**40, (batch, m), generator=generator)
        parents = cases.parents(generator, batch, m)
        rows = torch.randint(1, n + 2, (batch,), generator=generator)
        for num_rows in (None, rows, torch.ones_like(rows)):
            arguments = (index[:, :n], tokens, parents, n + 1, num_rows)
            expected = reference.select_nodes(*arguments)
            assert_same(loops.select_nodes(*arguments), expected, (batch, m, n))


@pytest.mark.parametrize("kind", ["in turn", "grafted", "ragged"])
def test_build_tree(kind):
    for (batch, topk, widths, num_tokens), values, generator in kinds(TREES):
        case = cases.tree(
            generator, batch, topk, widths, num_tokens,
            values if kind == "in turn" else kind, kind == "ragged",
        )  # fmt: skip
        if values in ("ties", "mixed"):
            case = case._replace(seq_lens=case.seq_lens.int())
        expected = cases.poisoned_links(batch, case.parent_rows.shape[1] + 1)
        ours = cases.TreeLinks(*(part.clone() for part in expected))
        arguments = case.parent_rows, case.seq_lens
        reference.build_tree(*arguments, *expected, case.num_steps)
        loops.build_tree(*arguments, *ours, case.num_steps)
        for name, part, theirs in zip(ours._fields, ours, expected, strict=True):
            assert torch.equal(part, theirs), (name, batch, topk, widths, num_tokens, kind)


def test_misuse_is_refused():
    case = cases.layer(torch.Generator().manual_seed(0), 2, 2, 3, "random")
    with pytest.raises(ValueError, match="probs must be 2-d"):
        loops.grow_layer(case.parent_scores, case.probs.double(), case.tokens, 3)
    with pytest.raises(ValueError, match="num_nodes must be in 1..4, got 5"):
        loops.rank_nodes(torch.zeros(1, 4), 5)
