"""The Triton kernels of `fused`, one for each op, and their shared helpers.

Names in capitals are compile-time constants, mostly powers of two. All other numbers are run-time
arguments on which Triton does not specialise, so that a server compiles each kernel a few times and
not once for each batch size and width.

A sort key holds the bits of the score, mapped to an integer of the same order, in its upper half
and the inverted candidate number in its lower half. So one integer sort is stable and descending.
"""

import triton
import triton.language as tl

__all__ = [
    "build_tree_kernel",
    "grow_layer_kernel",
    "list_slots_kernel",
    "rank_nodes_kernel",
    "select_nodes_kernel",
]


@triton.jit
def _order(bits):  # type: ignore[no-untyped-def]
    """Map the bits of floats to integers of the same order; it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best(scores, index, is_real, BEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the BEST largest scores and their indexes, descending, ties to the lower index."""
    # Adding 0 turns -0 into 0.
    order = _order((scores + 0.0).to(tl.int32, bitcast=True))
    keys = (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    keys = tl.topk(tl.where(is_real, keys, -0x8000000000000000), BEST)
    bits = _order((keys >> 32).to(tl.int32))
    best = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    return bits.to(tl.float32, bitcast=True), best


@triton.jit(do_not_specialize=["parent_stride", "layer_start", "width", "num_knots"])
def grow_layer_kernel(  # type: ignore[no-untyped-def]
    parent_scores_ptr,
    parent_stride,
    probs_ptr,
    tokens_ptr,
    knots_ptr,
    starts_ptr,
    slopes_ptr,
    kinds_ptr,
    num_knots,
    grown_probs_ptr,
    scores_ptr,
    best_scores_ptr,
    best_index_ptr,
    best_tokens_ptr,
    best_parents_ptr,
    layer_start,
    width,
    TOPK: tl.constexpr,
    LEAST_LEFT: tl.constexpr,
    IS_CALIBRATED: tl.constexpr,
    KNOTS: tl.constexpr,
    CHILDREN: tl.constexpr,
    BEST: tl.constexpr,
):
    """Score the children of one request's expanded nodes and keep the best TOPK."""
    request = tl.program_id(0)
    first = request * width * TOPK
    child = tl.arange(0, CHILDREN)
    is_child = child < width * TOPK
    probs = tl.load(probs_ptr + first + child, mask=is_child, other=0.0)
    if IS_CALIBRATED:
        siblings = probs_ptr + first + child // TOPK * TOPK
        line = tl.load(kinds_ptr + request) * (num_knots + 1)  # the first of the request's kind
        drafted = tl.full([CHILDREN], 1.0, tl.float32)
        left = tl.full([CHILDREN], 1.0, tl.float32)
        # A child's chance depends on its earlier siblings, so each lane repeats their computation.
        for k in range(TOPK):
            prob = tl.load(siblings + k, mask=is_child, other=0.0)
            share = tl.minimum(tl.div_rn(prob, tl.maximum(drafted, LEAST_LEFT)), 1.0)
            piece = tl.zeros([CHILDREN], tl.int32)
            for knot in tl.static_range(KNOTS):
                end = tl.load(knots_ptr + knot, mask=knot < num_knots, other=float("inf"))
                piece += (end <= share).to(tl.int32)
            hazard = tl.load(starts_ptr + line + piece) + tl.load(slopes_ptr + line + piece) * share
            chance = tl.minimum(tl.maximum(hazard, 0.0), 1.0) * left
            probs = tl.where(child % TOPK == k, chance, probs)
            drafted -= prob
            left -= chance
        tl.store(grown_probs_ptr + first + child, probs, mask=is_child)
    parents = parent_scores_ptr + request * parent_stride + child // TOPK
    scores = tl.load(parents, mask=is_child, other=0.0) * probs
    tl.store(scores_ptr + first + child, scores, mask=is_child)

    best_scores, best = _best(scores, child, is_child, BEST)
    rank = tl.arange(0, BEST)
    kept = rank < TOPK
    to = request * TOPK + rank
    tl.store(best_scores_ptr + to, best_scores, mask=kept)
    tl.store(best_index_ptr + to, (layer_start + best).to(tl.int64), mask=kept)
    tl.store(best_parents_ptr + to, (best // TOPK).to(tl.int64), mask=kept)
    tokens = tl.load(tokens_ptr + first + best, mask=kept, other=0)
    tl.store(best_tokens_ptr + to, tokens, mask=kept)


@triton.jit(do_not_specialize=["stride", "n", "num_nodes"])
def rank_nodes_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    stride,
    n,
    best_scores_ptr,
    best_index_ptr,
    num_nodes,
    CANDIDATES: tl.constexpr,
    BEST: tl.constexpr,
):
    """Keep one request's best candidates."""
    request = tl.program_id(0)
    candidate = tl.arange(0, CANDIDATES)
    is_real = candidate < n
    scores = tl.load(scores_ptr + request * stride + candidate, mask=is_real, other=0.0)
    best_scores, best = _best(scores, candidate, is_real, BEST)
    rank = tl.arange(0, BEST)
    to = request * num_nodes + rank
    tl.store(best_scores_ptr + to, best_scores, mask=rank < num_nodes)
    tl.store(best_index_ptr + to, best.to(tl.int64), mask=rank < num_nodes)


@triton.jit(
    do_not_specialize=[
        "index_stride",
        "tokens_stride",
        "parents_stride",
        "num_nodes",
        "num_candidates",
    ]
)
def select_nodes_kernel(  # type: ignore[no-untyped-def]
    node_index_ptr,
    index_stride,
    tokens_ptr,
    tokens_stride,
    parents_ptr,
    parents_stride,
    num_rows_ptr,
    index_ptr,
    draft_tokens_ptr,
    parent_rows_ptr,
    num_nodes,
    num_candidates,
    IS_RAGGED: tl.constexpr,
    NODES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sort one request's nodes by number, and find the row of each node's parent."""
    request = tl.program_id(0)
    node = tl.arange(0, NODES)
    num_kept = num_nodes
    if IS_RAGGED:
        num_kept = tl.load(num_rows_ptr + request).to(tl.int32) - 1
    kept = node_index_ptr + request * index_stride + node
    index = tl.load(kept, mask=(node < num_kept) & (node < num_nodes), other=num_candidates)
    index = tl.sort(index.to(tl.int32))
    to = request * num_nodes + node
    tl.store(index_ptr + to, index.to(tl.int64), mask=node < num_nodes)
    tokens = tokens_ptr + request * tokens_stride + index
    tokens = tl.load(tokens, mask=index < num_candidates, other=0)
    tl.store(draft_tokens_ptr + to, tokens, mask=node < num_nodes)

    above = parents_ptr + request * parents_stride + index
    # Of a node that does not exist a number that no candidate has.
    above = tl.load(above, mask=index < num_candidates, other=num_candidates + 1).to(tl.int32)
    row = tl.where(above < 0, 0, -1)
    for start in range(0, NODES, TILE):
        other = start + tl.arange(0, TILE)
        matches = above[:, None] == tl.gather(index, other, 0)[None, :]
        row = tl.maximum(row, tl.max(tl.where(matches, other[None, :] + 1, -1), axis=1))
    tl.store(parent_rows_ptr + to, row.to(tl.int64), mask=node < num_nodes)


@triton.jit(do_not_specialize=["rows_stride", "num_nodes"])
def build_tree_kernel(  # type: ignore[no-untyped-def]
    parent_rows_ptr,
    rows_stride,
    seq_lens_ptr,
    tree_mask_ptr,
    positions_ptr,
    index_ptr,
    next_token_ptr,
    next_sibling_ptr,
    num_nodes,
    STEPS: tl.constexpr,
    NODES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Link one request's nodes."""
    request = tl.program_id(0)
    node = tl.arange(0, NODES)
    is_node = (node > 0) & (node < num_nodes)
    # Shifted by one, so that node i is at index i. -1 keeps unlinked nodes out of all lists of
    # children.
    parent_rows_ptr += request * rows_stride - 1
    linked_parent = tl.load(parent_rows_ptr + node, mask=is_node, other=-1).to(tl.int32)
    is_linked = linked_parent >= 0
    parent = tl.maximum(linked_parent, 0)

    child = tl.full([NODES], NODES, tl.int32)
    sibling = tl.full([NODES], NODES, tl.int32)
    depth = tl.zeros([NODES], tl.int32)
    for start in range(0, NODES, TILE):
        other = start + tl.arange(0, TILE)
        other_parent = tl.gather(linked_parent, other, 0)
        below = other_parent[None, :] == node[:, None]
        child = tl.minimum(child, tl.min(tl.where(below, other[None, :], NODES), axis=1))
        beside = (other_parent[None, :] == linked_parent[:, None]) & is_linked[:, None]
        beside = beside & (other[None, :] > node[:, None])
        sibling = tl.minimum(sibling, tl.min(tl.where(beside, other[None, :], NODES), axis=1))

        sees = (other[None, :] == node[:, None]) | (other[None, :] == 0)
        ancestor = parent
        for _ in range(STEPS - 1):
            sees = sees | (other[None, :] == ancestor[:, None])
            ancestor = tl.gather(parent, ancestor, 0)
        depth += tl.sum(sees.to(tl.int32), axis=1)
        cells = (request * num_nodes + node[:, None]) * num_nodes + other[None, :]
        is_cell = (node < num_nodes)[:, None] & (other < num_nodes)[None, :]
        tl.store(tree_mask_ptr + cells, sees, mask=is_cell)

    to = request * num_nodes + node
    written = node < num_nodes
    seq_len = tl.load(seq_lens_ptr + request).to(tl.int64)
    tl.store(positions_ptr + to, seq_len + depth - 1, mask=written)
    tl.store(index_ptr + to, to.to(tl.int64), mask=written)
    child = tl.where(child < NODES, child, -1).to(tl.int64)
    tl.store(next_token_ptr + to, child, mask=written)
    sibling = tl.where(sibling < NODES, sibling, -1).to(tl.int64)
    tl.store(next_sibling_ptr + to, sibling, mask=written)


@triton.jit(
    do_not_specialize=["table_stride", "batch_stride", "node_stride", "batch_size", "width"]
)
def list_slots_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    table_stride,
    rows_ptr,
    seq_lens_ptr,
    path_ptr,
    batch_stride,
    node_stride,
    depth_stride,
    depth_ptr,
    indptr_ptr,
    indices_ptr,
    batch_size,
    width,
    REQUESTS: tl.constexpr,
    PATH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write one node's list of slots after the lists of the nodes before it."""
    request = tl.program_id(0)
    node = tl.program_id(1)
    depth = tl.load(depth_ptr)
    other = tl.arange(0, REQUESTS)
    lengths = tl.load(seq_lens_ptr + other, mask=other < batch_size, other=0)
    lengths = tl.where(other < batch_size, lengths + depth, 0)
    seq_len = tl.load(seq_lens_ptr + request)
    before = tl.sum(tl.where(other < request, lengths, 0), axis=0) * width
    start = before + node * (seq_len + depth)
    end = start + seq_len + depth
    row = request * width + node
    tl.store(indptr_ptr + row + 1, end.to(tl.int32))
    if row == 0:
        tl.store(indptr_ptr, 0)

    table_row = table_ptr + tl.load(rows_ptr + request) * table_stride
    for first in range(0, seq_len, TILE):
        column = first + tl.arange(0, TILE)
        is_prefix = column < seq_len
        slots = tl.load(table_row + column, mask=is_prefix, other=0).to(tl.int64)
        tl.store(indices_ptr + start + column, slots, mask=is_prefix)
    step = tl.arange(0, PATH)
    path = path_ptr + request.to(tl.int64) * batch_stride + node * node_stride
    slots = tl.load(path + step * depth_stride, mask=step < depth, other=0)
    tl.store(indices_ptr + start + seq_len + step, slots, mask=step < depth)
