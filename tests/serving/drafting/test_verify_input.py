"""SGLang's builder gets any tree, whatever the order of its nodes, and links it as our own op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

from cast_sglang.cpu.kernels import build_tree
from cast_sglang.ops import reference
from cast_sglang.serving.drafting.verify_input import numbers_by_row
from tests.ops import cases


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    num_rows=st.integers(2, 20),
    kind=st.sampled_from(["grafted", "ragged", "random"]),
    seed=st.integers(0, 2**31),
)
def test_numbers_name_each_nodes_parent(batch, num_rows, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    case = cases.tree(generator, batch, 3, [2, 3, 1], num_rows, kind, kind == "ragged")
    num_rows = case.parent_rows.shape[1] + 1
    parent_list, numbers = numbers_by_row(case.parent_rows)
    # As many columns as the builder counts on, of distinct numbers.
    assert parent_list.shape == (batch, num_rows * (2 - 1) + 1)
    assert all(len(set(row)) == num_rows - 1 for row in numbers.tolist())
    expected, ours = (cases.poisoned_links(batch, num_rows) for _ in range(2))
    reference.build_tree(case.parent_rows, case.seq_lens, *expected, case.num_steps)
    build_tree(
        parent_list, numbers, case.seq_lens, *ours, num_rows, 2, num_rows, TreeMaskMode.QLEN_ONLY
    )
    for name, part, theirs in zip(ours._fields, ours, expected, strict=True):
        assert torch.equal(part, theirs), name


@pytest.mark.parametrize("num_rows", [2, 7, 32])
def test_the_root_has_any_number_of_children(num_rows):
    _, numbers = numbers_by_row(torch.zeros((1, num_rows - 1), dtype=torch.int64))
    assert numbers.tolist() == [list(range(1, num_rows))]
    assert int(numbers.max()) // num_rows == 0
