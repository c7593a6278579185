"""Attention over padded slots and over a prefill's blocks; the forward modes: `test_reads.py`."""

import pytest
import torch

from cast_sglang.cpu.compute import attend_batched, attend_prefill
from cast_sglang.cpu.reads import BatchedRead, PrefillRead, causal_read

HEAD_DIM = 8
SCALING = 0.3


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def dense(q, rows, slots, kv_heads):
    """[heads * D] output of one token of [heads, D] queries over the slots that it sees."""
    kv = rows[slots.long()].double().view(len(slots), 2, kv_heads, HEAD_DIM)
    k, v = kv.repeat_interleave(len(q) // kv_heads, dim=2).unbind(1)
    weights = (torch.einsum("hd,lhd->hl", q.double(), k) * SCALING).softmax(dim=1)
    return torch.einsum("hl,lhd->hd", weights, v).flatten()


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("sees", ["all", "as its request", "by itself"])
def test_query_heads_read_the_head_that_they_share(heads, kv_heads, sees, generator):
    """Heads of one group and rows of one request are folded together, and come back in place."""
    batch, width, length = 3, 4, 5
    rows = torch.randn(20, 2 * kv_heads * HEAD_DIM, generator=generator)
    slots = torch.randint(20, (batch, length), generator=generator)
    q = torch.randn(batch * width, heads, HEAD_DIM, generator=generator)
    shape = (batch, 1 if sees == "as its request" else width, length)
    visible = torch.rand(shape, generator=generator) < 0.5
    visible[:, :, 2] = True
    read = BatchedRead(slots.flatten(), None if sees == "all" else visible, batch, width, length)
    out = attend_batched(q, rows, read, kv_heads, SCALING)
    assert out.shape == (batch * width, heads * HEAD_DIM)
    seen = torch.ones_like(visible) if sees == "all" else visible
    seen = seen.expand(batch, width, length)
    for row in range(batch * width):
        b, i = divmod(row, width)
        expected = dense(q[row], rows, slots[b, seen[b, i]], kv_heads)
        torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=0)


def test_a_hidden_slot_changes_nothing(generator):
    rows = torch.randn(9, 2 * HEAD_DIM, generator=generator)
    q = torch.randn(1, 1, HEAD_DIM, generator=generator)
    visible = torch.tensor([[[True, True, False]]])
    read = BatchedRead(torch.tensor([4, 2, 7]), visible, 1, 1, 3)
    before = attend_batched(q, rows, read, 1, SCALING)
    rows[7] = 1e6
    assert torch.equal(attend_batched(q, rows, read, 1, SCALING), before)
    rows[2] = 1e6
    assert not torch.equal(attend_batched(q, rows, read, 1, SCALING), before)


def test_precision_is_that_of_the_queries(generator):
    rows = torch.randn(9, 2 * HEAD_DIM, generator=generator).bfloat16()
    q = torch.randn(2, 1, HEAD_DIM, generator=generator).bfloat16()
    read = BatchedRead(torch.arange(6), torch.ones(2, 1, 3).bool(), 2, 1, 3)
    assert attend_batched(q, rows, read, 1, SCALING).dtype == torch.bfloat16
    prefill = [PrefillRead(torch.arange(2), [(0, 2, None)])]
    assert attend_prefill(q, rows, prefill, 1, SCALING).dtype == torch.bfloat16


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (6, 2)])
def test_blocks_of_a_prefill_fill_their_own_rows(heads, kv_heads, generator):
    """A whole prompt, and one in two blocks behind a prefix of two, the first of one row."""
    rows = torch.randn(20, 2 * kv_heads * HEAD_DIM, generator=generator)
    fresh, continued = torch.tensor([9, 3, 12]), torch.tensor([1, 15, 6, 0, 8])

    def bias(new, seen):
        return torch.full((new, seen), float("-inf")).triu(seen - new + 1)

    blocks = [(3, 4, bias(1, 3)), (4, 6, bias(2, 5))]
    reads = [PrefillRead(fresh, [(0, 3, None)]), PrefillRead(continued, blocks)]
    q = torch.randn(6, heads, HEAD_DIM, generator=generator)
    out = attend_prefill(q, rows, reads, kv_heads, SCALING)
    sees = [fresh[:1], fresh[:2], fresh, continued[:3], continued[:4], continued]
    for row, slots in enumerate(sees):
        expected = dense(q[row], rows, slots, kv_heads)
        torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=0)


def test_a_token_does_not_depend_on_the_rest_of_its_batch(generator):
    lens, width, heads, kv_heads = torch.tensor([37, 190, 80]), 5, 4, 2
    rows = torch.randn(3 * 200 + 1, 2 * kv_heads * HEAD_DIM, generator=generator)
    table = (torch.randperm(3 * 200, generator=generator) + 1).view(3, 200).int()
    q = torch.randn(3 * width, heads, HEAD_DIM, generator=generator)

    def attend(b, requests):
        read = causal_read(table, torch.arange(3)[requests], lens[requests], width)
        return attend_batched(q[b * width :][: read.num_requests * width], rows, read, 2, SCALING)

    together = attend(0, slice(0, 3))
    alone = [attend(b, slice(b, b + 1)) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-6, rtol=0)
