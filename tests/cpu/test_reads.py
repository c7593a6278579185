"""Batched attention of every forward mode against a dense computation, one request at a time."""

import pytest
import torch

pytest.importorskip("sglang")

from cast_sglang.cpu import reads
from cast_sglang.cpu.compute import attend_batched, attend_prefill

MAX_CONTEXT = 700
GQA = [(4, 4), (6, 2)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Pool:
    """Random KV rows and a request table whose slots are scattered over the pool."""

    def __init__(self, num_requests, num_kv_heads, head_dim, dtype, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        num_slots = num_requests * MAX_CONTEXT + 1
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.rows = self.randn(num_slots, 2 * num_kv_heads * head_dim).to(dtype)
        slots = torch.randperm(num_slots - 1, generator=self.generator) + 1
        self.req_to_token = slots.view(num_requests, MAX_CONTEXT).int()
        self.requests = torch.randperm(num_requests, generator=self.generator)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def slots(self, request, start, stop):
        return self.req_to_token[self.requests[request], start:stop].long()

    def dense(self, q, slots):
        """[heads, D] output of one token of [heads, D] queries over `slots`, in float64."""
        kv = self.rows[slots].double().view(len(slots), 2, self.num_kv_heads, self.head_dim)
        k, v = kv.repeat_interleave(q.shape[0] // self.num_kv_heads, dim=2).unbind(1)
        scores = torch.einsum("hd,lhd->hl", q.double(), k) * self.head_dim**-0.5
        return torch.einsum("hl,lhd->hd", scores.softmax(dim=1), v)


def check(pool, q, read, expected_slots, dtype):
    """`expected_slots[i]`: the slots that row i of the forward may read."""
    attend = attend_prefill if isinstance(read, list) else attend_batched
    scaling = pool.head_dim**-0.5
    out = attend(q, pool.rows, read, pool.num_kv_heads, scaling).view(q.shape)
    # Long prefills check a sample of their tokens; the first and last are always among them.
    for row in {*range(0, len(q), 1 + len(q) // 50), len(q) - 1}:
        expected = pool.dense(q[row], expected_slots[row])
        torch.testing.assert_close(out[row].double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("heads,kv_heads", GQA)
@pytest.mark.parametrize("lens", [[1], [333], [5, 1, 130], [17, 17]])
def test_decode(heads, kv_heads, lens, dtype):
    pool = Pool(len(lens), kv_heads, 16, dtype)
    q = pool.randn(len(lens), heads, 16).to(dtype)
    read = reads.decode_read(pool.req_to_token, pool.requests, torch.tensor(lens))
    check(pool, q, read, [pool.slots(i, 0, n) for i, n in enumerate(lens)], dtype)


@pytest.mark.parametrize("heads,kv_heads", GQA)
@pytest.mark.parametrize("full_mask", [False, True])
@pytest.mark.parametrize("lens,width", [([1], 2), ([300], 8), ([5, 61, 33], 7), ([2, 9], 1)])
def test_verify_reads_prefix_and_masked_tree(heads, kv_heads, full_mask, lens, width, dtype):
    pool = Pool(len(lens), kv_heads, 16, dtype)
    q = pool.randn(len(lens) * width, heads, 16).to(dtype)
    tree = torch.rand(len(lens), width, width, generator=pool.generator) < 0.5
    tree |= torch.eye(width, dtype=torch.bool)
    parts = [
        torch.cat((torch.ones(width, n if full_mask else 0, dtype=torch.bool), rows), dim=1)
        for n, rows in zip(lens, tree, strict=True)
    ]
    mask = torch.cat([part.flatten() for part in parts])
    read = reads.verify_read(pool.req_to_token, pool.requests, torch.tensor(lens), width, mask)
    expected = [
        torch.cat((pool.slots(b, 0, n), pool.slots(b, n, n + width)[tree[b, node]]))
        for b, n in enumerate(lens)
        for node in range(width)
    ]
    check(pool, q, read, expected, dtype)


def test_verify_refuses_a_mask_of_another_size():
    pool = Pool(2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="verify mask has 5 cells"):
        reads.verify_read(
            pool.req_to_token, pool.requests, torch.tensor([3, 4]), 3, torch.ones(5).bool()
        )


@pytest.mark.parametrize("heads,kv_heads", GQA)
@pytest.mark.parametrize("lens,width", [([4], 3), ([300, 9], 8), ([2, 1, 77], 1)])
def test_draft_extend_is_causal(heads, kv_heads, lens, width, dtype):
    pool = Pool(len(lens), kv_heads, 16, dtype)
    q = pool.randn(len(lens) * width, heads, 16).to(dtype)
    ends = torch.tensor(lens) + width
    read = reads.causal_read(pool.req_to_token, pool.requests, ends, width)
    expected = [pool.slots(b, 0, n + i + 1) for b, n in enumerate(lens) for i in range(width)]
    check(pool, q, read, expected, dtype)


@pytest.mark.parametrize("heads,kv_heads", GQA)
@pytest.mark.parametrize("width,depth", [(1, 1), (4, 1), (3, 5), (16, 3)])
def test_tree_decode_reads_prefix_and_own_ancestors(heads, kv_heads, width, depth, dtype):
    lens = [40, 3, 211]
    pool = Pool(len(lens), kv_heads, 16, dtype)
    q = pool.randn(len(lens) * width, heads, 16).to(dtype)
    # Ancestors may be shared between nodes, as they are in a tree.
    pick = torch.randint(0, 60, (len(lens), width, depth), generator=pool.generator)
    draft_slots = torch.stack([pool.slots(b, n, n + 60) for b, n in enumerate(lens)])
    ancestors = draft_slots.gather(1, pick.flatten(1)).view(pick.shape)
    prefix = reads.DraftPrefix.of(pool.req_to_token, pool.requests, torch.tensor(lens))
    read = reads.tree_decode_read(prefix, ancestors)
    expected = [
        torch.cat((pool.slots(b, 0, n), ancestors[b, node]))
        for b, n in enumerate(lens)
        for node in range(width)
    ]
    check(pool, q, read, expected, dtype)


@pytest.mark.parametrize("heads,kv_heads", GQA)
@pytest.mark.parametrize(
    "prefixes,extends",
    [([0], [1]), ([0, 0], [13, 40]), ([5, 0, 60], [9, 7, 1]), ([3], [600]), ([2, 4], [0, 5])],
)
def test_prefill_with_cached_prefix(heads, kv_heads, prefixes, extends, dtype):
    pool = Pool(len(prefixes), kv_heads, 16, dtype)
    q = pool.randn(sum(extends), heads, 16).to(dtype)
    read = reads.prefill_reads(
        pool.req_to_token, pool.requests, torch.tensor(prefixes), torch.tensor(extends), dtype
    )
    expected = [
        pool.slots(b, 0, n + i + 1)
        for b, (n, extend) in enumerate(zip(prefixes, extends, strict=True))
        for i in range(extend)
    ]
    check(pool, q, read, expected, dtype)
