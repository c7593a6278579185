"""Slot lists of a tree layer, against their definition written as loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.serving.draft_attention import tree_kv_indices


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(1, 23), min_size=1, max_size=5),
    width=st.integers(1, 7),
    depth=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_rows_are_prefix_then_path(lens, width, depth, seed):
    generator = torch.Generator().manual_seed(seed)
    batch = len(lens)
    req_to_token = torch.randint(1, 10_000, (batch + 3, 32), generator=generator).to(torch.int32)
    rows = torch.randperm(batch + 3, generator=generator)[:batch]
    path_slots = torch.randint(1, 10_000, (batch, width, depth), generator=generator)
    indptr, indices = tree_kv_indices(req_to_token, rows, torch.tensor(lens), sum(lens), path_slots)
    assert indptr.dtype == indices.dtype == torch.int32
    assert indptr.shape == (batch * width + 1,)
    assert indices.shape == (sum(lens) * width + batch * width * depth,)
    for b in range(batch):
        for w in range(width):
            row = b * width + w
            expected = req_to_token[rows[b], : lens[b]].tolist() + path_slots[b, w].tolist()
            assert indices[indptr[row] : indptr[row + 1]].tolist() == expected


def test_unknown_backend_names_the_flag():
    from types import SimpleNamespace

    from cast_sglang.errors import HostError
    from cast_sglang.serving.draft_attention import create_tree_backend

    with pytest.raises(HostError, match="--speculative-draft-attention-backend triton"):
        create_tree_backend(SimpleNamespace(draft_attention_backend="fa3"), topk=4)
