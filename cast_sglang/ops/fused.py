"""The ops as Triton kernels, one kernel each, for GPUs; `reference` defines and documents them.

One program handles one request, so that its whole row stays in registers. The kernels use no
atomics and no fused multiply-add. So ranks get bitwise equal results, and the scores of a layer are
bitwise equal to the reference's.
Sizes that change from step to step are run-time arguments. A kernel is compiled again only when a
size passes a power of two, or for another K or depth.
"""

from __future__ import annotations

import torch
import triton

from cast_sglang.ops import contract, kernels
from cast_sglang.ops.contract import AcceptanceCurve, GrownLayer
from cast_sglang.tree import Frontier, RankedNodes

__all__ = [
    "build_tree",
    "grow_layer",
    "list_slots",
    "rank_nodes",
    "select_nodes",
]

# Cells of the [nodes, others] tile that `select_nodes` and `build_tree` compare at a time.
_TILE = 4096
# Slots that a program of `list_slots` copies at a time.
_SLOT_TILE = 512


def grow_layer(
    parent_scores: torch.Tensor,
    probs: torch.Tensor,
    tokens: torch.Tensor,
    layer_start: int,
    curve: AcceptanceCurve | None = None,
) -> GrownLayer:
    """Score the children of a layer's expanded nodes and rank the best K; see `reference`."""
    contract.check_grow_layer(parent_scores, probs, tokens, layer_start, curve)
    batch_size, topk = len(parent_scores), probs.shape[1]
    width = len(probs) // batch_size
    parent_scores, probs, tokens = _rows(parent_scores), probs.contiguous(), tokens.contiguous()
    scores = probs.new_empty(batch_size, width * topk)
    best_scores = probs.new_empty(batch_size, topk)
    best_index, best_tokens, best_parents = (tokens.new_empty(batch_size, topk) for _ in range(3))
    grown_probs = probs if curve is None else torch.empty_like(probs)
    # Without a curve the kernel reads none of these, but it still needs valid pointers.
    knots, starts, slopes, kinds = curve if curve is not None else (probs, probs, probs, tokens)
    num_children = _padded(width * topk)
    kernels.grow_layer_kernel[(batch_size,)](
        parent_scores,
        parent_scores.stride(0),
        probs,
        tokens,
        knots.contiguous(),
        starts.contiguous(),
        slopes.contiguous(),
        kinds.contiguous(),
        0 if curve is None else len(knots),
        grown_probs,
        scores,
        best_scores,
        best_index,
        best_tokens,
        best_parents,
        layer_start,
        width,
        TOPK=topk,
        LEAST_LEFT=contract.LEAST_LEFT,
        IS_CALIBRATED=curve is not None,
        KNOTS=1 if curve is None else triton.next_power_of_2(max(1, len(knots))),
        CHILDREN=num_children,
        BEST=_padded(topk),
        num_warps=_num_warps(num_children, 128),
        enable_fp_fusion=False,
    )
    frontier = Frontier(best_scores, best_index, best_tokens, best_parents)
    return GrownLayer(grown_probs, scores, frontier)


def rank_nodes(scores: torch.Tensor, num_nodes: int) -> RankedNodes:
    """Keep each request's best candidates, best first; see `reference`."""
    contract.check_rank_nodes(scores, num_nodes)
    scores = _rows(scores)
    batch_size, n = scores.shape
    best = scores.new_empty(batch_size, num_nodes)
    index = torch.empty(batch_size, num_nodes, dtype=torch.int64, device=scores.device)
    candidates = _padded(n)
    kernels.rank_nodes_kernel[(batch_size,)](
        scores,
        scores.stride(0),
        n,
        best,
        index,
        num_nodes,
        CANDIDATES=candidates,
        BEST=_padded(num_nodes),
        num_warps=_num_warps(candidates, 256),
    )
    return RankedNodes(best, index)


def select_nodes(
    node_index: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_draft_tokens: int,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take each request's best nodes in the order in which they were drafted; see `reference`."""
    contract.check_select_nodes(node_index, tokens, parents, num_draft_tokens, num_rows)
    node_index, tokens, parents = _rows(node_index), _rows(tokens), _rows(parents)
    num_nodes = num_draft_tokens - 1
    index, draft_tokens, parent_rows = (tokens.new_empty(len(tokens), num_nodes) for _ in range(3))
    nodes = triton.next_power_of_2(num_nodes)
    kernels.select_nodes_kernel[(len(tokens),)](
        node_index,
        node_index.stride(0),
        tokens,
        tokens.stride(0),
        parents,
        parents.stride(0),
        tokens if num_rows is None else num_rows.contiguous(),
        index,
        draft_tokens,
        parent_rows,
        num_nodes,
        tokens.shape[1],
        IS_RAGGED=num_rows is not None,
        NODES=nodes,
        TILE=_tile(nodes),
        num_warps=_num_warps(nodes, 16),
    )
    return index, draft_tokens, parent_rows


def list_slots(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    path_slots: torch.Tensor,
    depth: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
) -> None:
    """List the cache slots that each node of a layer attends to; see `reference`."""
    contract.check_list_slots(
        req_to_token, req_pool_indices, seq_lens, path_slots, depth, kv_indptr, kv_indices
    )
    req_to_token = _rows(req_to_token)
    batch_size, width, max_depth = path_slots.shape
    kernels.list_slots_kernel[(batch_size, width)](
        req_to_token,
        req_to_token.stride(0),
        req_pool_indices.contiguous(),
        seq_lens.contiguous(),
        path_slots,
        *path_slots.stride(),
        depth,
        kv_indptr,
        kv_indices,
        batch_size,
        width,
        REQUESTS=_padded(batch_size),
        PATH=triton.next_power_of_2(max_depth),
        TILE=_SLOT_TILE,
        num_warps=4,
    )


def build_tree(
    parent_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    num_steps: int,
) -> None:
    """Link the selected candidates into a tree below the bonus token; see `reference`."""
    links = (retrieve_index, retrieve_next_token, retrieve_next_sibling)
    contract.check_build_tree(parent_rows, seq_lens, tree_mask, positions, links, num_steps)
    parent_rows = _rows(parent_rows)
    batch_size, num_nodes = retrieve_index.shape
    nodes = triton.next_power_of_2(num_nodes)
    kernels.build_tree_kernel[(batch_size,)](
        parent_rows,
        parent_rows.stride(0),
        seq_lens.contiguous(),
        tree_mask,
        positions,
        *links,
        num_nodes,
        STEPS=num_steps,
        NODES=nodes,
        TILE=_tile(nodes),
        num_warps=_num_warps(nodes, 16),
    )


def _padded(n: int) -> int:
    # At least 2, because `tl.topk` with k = 1 returns a scalar.
    return max(2, triton.next_power_of_2(n))


def _tile(nodes: int) -> int:
    return min(nodes, max(1, _TILE // nodes))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _num_warps(cells: int, cells_per_warp: int) -> int:
    return max(1, min(8, cells // cells_per_warp))
