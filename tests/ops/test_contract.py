"""The checks that all implementations of the ops share, and the curve that calibrates layers."""

import pytest
import torch

from cast_sglang.ops.contract import (
    MAX_CANDIDATES,
    MAX_DRAFT_TOKENS,
    AcceptanceCurve,
    check_build_tree,
    check_grow_layer,
    check_list_slots,
    check_rank_nodes,
    check_select_nodes,
)
from tests.ops import cases

# Of requests 0 and 2 chance x / 2 up to 1/2, then 1/4 and twice what is beyond: 1 from x = 7/8 on.
# Of request 1 always 1/2.
CURVE = AcceptanceCurve(
    torch.tensor([0.5]),
    torch.tensor([[0.5, 0.5], [0.0, -0.75]]),
    torch.tensor([[0.0, 0.0], [0.5, 2.0]]),
    torch.tensor([1, 0, 1]),
)


def line(start, slope):
    """Return the map of one line, of a batch of one."""
    lines = torch.tensor([[start]]), torch.tensor([[slope]])
    return AcceptanceCurve(torch.zeros(0), *lines, ints(1))


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("parents", "probs", "tokens", "start", "message"),
    [
        ((2,), (2, 3), ints(2, 3), 0, "parent_scores must be 2-d torch.float32 and not empty"),
        ((2, 2), (3, 2), ints(3, 2), 0, r"must both be \[2 \* W, K\], got \(3, 2\) and \(3, 2\)"),
        ((2, 2), (4, 2), ints(4, 3), 0, r"got \(4, 2\) and \(4, 3\)"),
        ((1, 3), (3, 2), ints(3, 2), 0, "W must be in 1..2, got 3"),
        ((1, 1), (2, 2), ints(2, 2), 0, "W must be in 1..1, got 2"),
        ((1, 1), (1, 2), ints(1, 2), -1, "layer_start must be in 0..2147483645, got -1"),
        ((1, 1), (1, 2), ints(1, 2), 2**31 - 2, "layer_start must be in 0..2147483645"),
        ((1, 1), (1, 2), ints(1, 2).int(), 0, "tokens must be 2-d torch.int64.*got torch.int32"),
        ((1, 200), (200, 200), ints(200, 200), 0, "topk must be in 1..16384, got 40000"),
    ],
)
def test_a_layer_that_fits_nowhere_is_refused(parents, probs, tokens, start, message):
    with pytest.raises(ValueError, match=message):
        check_grow_layer(torch.ones(parents), torch.ones(probs), tokens, start, None)


@pytest.mark.parametrize(
    ("shape", "num_nodes", "message"),
    [
        ((0, 3), 1, "scores must be .* not empty"),
        ((2, 3), 0, "num_nodes must be in 1..3, got 0"),
        ((2, 3), 4, "num_nodes must be in 1..3, got 4"),
        ((1, MAX_CANDIDATES + 1), 1, "M must be in 1..16384, got 16385"),
    ],
)
def test_only_what_there_is_can_be_ranked(shape, num_nodes, message):
    with pytest.raises(ValueError, match=message):
        check_rank_nodes(torch.ones(shape), num_nodes)


@pytest.mark.parametrize(
    ("tokens", "num_draft_tokens", "num_rows", "message"),
    [
        (ints(1, 3), 2, None, r"tokens must have 2 rows, got shape \(1, 3\)"),
        (ints(2, 3), 5, None, "num_draft_tokens must be in 2..4, got 5"),
        (ints(2, 3), 1, None, "num_draft_tokens must be in 2..4, got 1"),
        (ints(2, 3), 3, ints(3), r"num_rows must be \[2\] torch.int64, got .* \(3,\)"),
        (ints(2, 3), 3, ints(2).int(), r"got torch.int32 of shape \(2,\)"),
    ],
)
def test_only_ranked_nodes_can_be_selected(tokens, num_draft_tokens, num_rows, message):
    with pytest.raises(ValueError, match=message):
        check_select_nodes(ints(2, 3), tokens, ints(2, 3), num_draft_tokens, num_rows)


def test_each_candidate_has_a_parent():
    with pytest.raises(ValueError, match=r"parents must be \(2, 3\), got shape \(2, 4\)"):
        check_select_nodes(ints(2, 3), ints(2, 3), ints(2, 4), 2, None)
    with pytest.raises(ValueError, match=r"parents must be 2-d torch.int64"):
        check_select_nodes(ints(2, 3), ints(2, 3), ints(2, 3).int(), 2, None)


def test_the_largest_arguments_are_allowed():
    check_rank_nodes(torch.ones(1, MAX_CANDIDATES), MAX_CANDIDATES)
    check_select_nodes(ints(2, 3), ints(2, 3), ints(2, 3), 4, ints(2))
    # W = K of as many parents; the last candidate of the layer has the largest number there is.
    check_grow_layer(torch.ones(3, 3), torch.ones(9, 3), ints(9, 3), 2**31 - 1 - 9, CURVE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knots": torch.zeros(2)}, r"need slopes \[C, P\] .* got \(2, 2\), \(2, 2\) and \(2,\)"),
        ({"knots": torch.zeros(1, 1)}, r"got \(2, 2\), \(2, 2\) and \(1, 1\)"),
        ({"knots": ints(1)}, "knots must be torch.float32, got torch.int64"),
        ({"slopes": torch.zeros(1, 2)}, r"got \(2, 2\), \(1, 2\) and \(1,\)"),
        ({"slopes": torch.zeros(2)}, "slopes must be 2-d torch.float32"),
        ({"starts": torch.zeros(2, 0)}, "starts must be 2-d torch.float32 and not empty"),
        ({"starts": torch.zeros(2, 2).double()}, "starts must be 2-d .* got torch.float64"),
        ({"kinds": ints(2)}, r"kinds must be \[3\] torch.int64, got torch.int64 of shape \(2,\)"),
        ({"kinds": ints(3).int()}, r"kinds must be \[3\] torch.int64, got torch.int32"),
    ],
)
def test_a_curve_of_unequal_parts_is_refused(change, message):
    layer = torch.ones(3, 1), torch.ones(3, 2), ints(3, 2), 0
    check_grow_layer(*layer, CURVE)
    with pytest.raises(ValueError, match=message):
        check_grow_layer(*layer, CURVE._replace(**change))


def test_build_tree_refuses_outputs_that_do_not_fit():
    case = cases.tree(generator(), 2, 3, [2], 5)
    links = cases.poisoned_links(2, 5)

    def check(read=case, written=links):
        check_build_tree(*read[:2], *written[:2], written[2:], *read[2:])

    check()
    check(case._replace(seq_lens=case.seq_lens.int()))
    for change, message in (
        ({"tree_mask": links.tree_mask[:49]}, "tree_mask must be 1-d torch.bool of 50 cells"),
        ({"positions": links.positions.int()}, r"positions must be \[10\]"),
        ({"retrieve_index": ints(2, 4)}, r"retrieve_\* must be \[2, 5\]"),
        ({"retrieve_next_token": ints(5, 2).t()}, "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            check(written=links._replace(**change))
    for change, message in (
        ({"parent_rows": ints(2, 4).int()}, "parent_rows must be 2-d torch.int64"),
        ({"seq_lens": ints(3)}, r"seq_lens must be \[2\] int"),
        ({"num_steps": 0}, "num_steps must be in 1..16384, got 0"),
        ({"parent_rows": ints(2, MAX_DRAFT_TOKENS)}, "num_draft_tokens must be in 2..1024"),
    ):
        with pytest.raises(ValueError, match=message):
            check(case._replace(**change))


def test_list_slots_refuses_what_does_not_fit():
    names = ("req_to_token", "req_pool_indices", "seq_lens", "path_slots", "depth")
    names += ("kv_indptr", "kv_indices")
    for dtype in (torch.int32, torch.int64):
        made = cases.slots(generator(), [3, 1], 3, 4, 2, dtype)
        case = dict(zip(names, made, strict=True))
        check_list_slots(**case)
    for change, message in (
        ({"path_slots": ints(2, 3)}, "path_slots must be 3-d"),
        ({"req_to_token": ints(4, 4).float()}, "req_to_token must be 2-d int"),
        ({"req_pool_indices": ints(3)}, r"req_pool_indices must be \[2\]"),
        ({"seq_lens": ints(2).int()}, r"seq_lens must be \[2\] torch.int64, got torch.int32"),
        ({"depth": torch.tensor(1)}, r"depth must be \[1\]"),
        ({"kv_indptr": ints(7)}, r"kv_indptr must be \[7\] torch.int32"),
        ({"kv_indptr": ints(6).int()}, r"kv_indptr must be \[7\] torch.int32"),
        ({"kv_indices": ints(80)[::2]}, "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            check_list_slots(**{**case, **change})


def test_a_curve_is_linear_in_pieces_and_stays_a_probability():
    at = torch.tensor([0.0, 0.25, 0.499, 0.5, 0.75, 0.875, 1.0])
    expected = [0.0, 0.125, 0.2495, 0.25, 0.75, 1.0, 1.0]
    assert CURVE.at(at, ints(7) + 1).tolist() == pytest.approx(expected)
    assert CURVE.at(at, ints(7)).tolist() == [0.5] * 7
    low = line(-0.5, 1.0)
    assert low.at(torch.tensor([0.2, 0.7]), ints(2)).tolist() == pytest.approx([0.0, 0.2])


def test_a_value_at_a_knot_belongs_to_the_piece_above():
    starts = torch.tensor([[0.1, 0.2, 0.3]])
    steps = AcceptanceCurve(torch.tensor([0.25, 0.5]), starts, torch.zeros(1, 3), ints(1))
    at = torch.tensor([0.249, 0.25, 0.499, 0.5])
    assert steps.at(at, ints(4)).tolist() == pytest.approx([0.1, 0.2, 0.2, 0.3])


def test_chances_of_siblings_are_what_the_earlier_ones_leave():
    """By hand: the curve is asked for a child's share of what the draft has left."""
    probs = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.5]]).repeat(3, 1)
    # First node: g(1/2) = 1/4; of 3/4 left, g(1/2) again; of 9/16 left, g(1) = 1.
    # Second: nothing is left after the first child, whatever the draft says of the others.
    chances = CURVE.chances(probs)
    for request in (0, 2):
        first, second = chances[2 * request : 2 * request + 2]
        assert first.tolist() == pytest.approx([1 / 4, 3 / 16, 9 / 16])
        assert second.tolist() == [1.0, 0.0, 0.0]
    # The request between them goes by its own map, in both of its nodes.
    assert chances[2:4].tolist() == [[1 / 2, 1 / 4, 1 / 8]] * 2
    assert probs[1].tolist() == [1.0, 0.0, 0.5]  # the draft's own stay as they were


def test_a_curve_that_believes_the_draft_gives_its_probabilities():
    identity = line(0.0, 1.0)
    probs = torch.rand(50, 7, generator=generator()) / 7
    assert torch.allclose(identity.chances(probs), probs)
