"""The ops in plain torch: their definition, and what tests compare `fused` and `loops` with.

Shape letters are those of `tree.py`: B requests, K `topk`, W expanded nodes, M candidates, N
`num_draft_tokens`, root included; C kinds of requests, P pieces of a calibration curve.

Effects of all ops: they write only to the output arguments of `build_tree` and `list_slots`. There
is no host sync unless stated, and output shapes depend only on input shapes, so the ops are safe
under CUDA graphs. All ops are deterministic: equal inputs give equal outputs on every rank. Scores
and probabilities must not be NaN.
"""

from __future__ import annotations

import torch

from cast_sglang.ops import contract
from cast_sglang.ops.contract import AcceptanceCurve, GrownLayer
from cast_sglang.tree import Frontier, RankedNodes

__all__ = [
    "build_tree",
    "grow_layer",
    "list_slots",
    "rank_nodes",
    "select_nodes",
]


def grow_layer(
    parent_scores: torch.Tensor,
    probs: torch.Tensor,
    tokens: torch.Tensor,
    layer_start: int,
    curve: AcceptanceCurve | None = None,
) -> GrownLayer:
    """Score the children of a layer's expanded nodes and rank the best K of them.

    Definition: for b in range(B):
        for w in range(W), k in range(K): scores[b, w * K + k] = parent_scores[b, w] * c[k]
            where p = probs[b * W + w], and c = p without `curve`, and with it
            c[k] = g(p[k] / (1 - sum of p[:k])) * (1 - sum of c[:k]), the argument of g at most 1
            g(x) = min(1, max(0, starts[m, i] + slopes[m, i] * x))
                m = kinds[b], i = number of knots <= x
        best = the K largest of scores[b], descending; ties to the lower index
        frontier.scores[b] = scores[b, best]; frontier.tokens[b] = tokens of b at best
        frontier.node_index[b] = layer_start + best; frontier.parents[b] = best // K

    Args:
        parent_scores: [B, n] float32 in [0, 1], path scores of the layer's nodes, of which the
            first W were expanded; ones [B, 1] for the root. Rows may be strided. W <= n.
        probs: [B * W, K] float32 in [0, 1], request-major; the draft's probabilities of children.
            1 <= W <= K.
        tokens: [B * W, K] int64, the children.
        layer_start: candidate number of the layer's first child.
        curve: g at the children's depth for each kind of request, see `policy.acceptance`. The
            calibrated probabilities of siblings never sum to more than 1. None for no calibration.

    Returns:
        probs [B * W, K] float32, c of the given ones (unchanged without `curve`); scores
        [B, W * K] float32, never above the parent's; and the frontier, [B, K] each.

    Raises:
        ValueError: shape, dtype or width out of range.

    Source: Li et al., "EAGLE-2" (arXiv 2406.16858), section 4.1, expansion phase.
    """
    contract.check_grow_layer(parent_scores, probs, tokens, layer_start, curve)
    batch_size, topk = len(parent_scores), probs.shape[1]
    width = len(probs) // batch_size
    if curve is not None:
        probs = curve.chances(probs)
    scores = parent_scores[:, :width].unsqueeze(2) * probs.view(batch_size, width, topk)
    scores = scores.view(batch_size, width * topk)
    ranked = torch.sort(scores, dim=1, descending=True, stable=True)
    best, index = (part[:, :topk] for part in ranked)
    best_tokens = tokens.view(batch_size, width * topk).gather(1, index)
    frontier = Frontier(best, index + layer_start, best_tokens, index // topk)
    return GrownLayer(probs, scores, frontier)


def rank_nodes(scores: torch.Tensor, num_nodes: int) -> RankedNodes:
    """Keep each request's best candidates, best first.

    Definition: for b in range(B): the num_nodes largest of scores[b], descending; ties to the lower
        candidate number, so that a parent comes before a child that ties with it.

    Args:
        scores: [B, M] float32 in [0, 1]. Rows may be strided.
        num_nodes: n, nodes to keep; 1 <= n <= M.

    Returns:
        scores [B, n] float32, and node_index [B, n] int64, candidate numbers.

    Raises:
        ValueError: shape, dtype or `num_nodes` out of range.

    Source: Li et al., "EAGLE-2" (arXiv 2406.16858), section 4.2, reranking phase.
    """
    contract.check_rank_nodes(scores, num_nodes)
    best, index = torch.sort(scores, dim=1, descending=True, stable=True)
    return RankedNodes(best[:, :num_nodes], index[:, :num_nodes])


def select_nodes(
    node_index: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_draft_tokens: int,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take each request's best nodes, sorted by candidate number (the order of proposal).

    Definition: for b in range(B): n = num_rows[b] - 1, or N - 1 without `num_rows`
        index[b] = sorted(node_index[b, :n]) + [M] * (N - 1 - n)
        draft_tokens[b] = [tokens[b, i] if i < M else 0 for i in index[b]]
        parent_rows[b] = [row(parents[b, i]) if i < M else -1 for i in index[b]]
            where row(-1) = 0, the root's, and row(p) = 1 + place of p in index[b], -1 for none

    Args:
        node_index: [B, n] int64, distinct candidate numbers, best first. Rows may be strided.
        tokens: [B, M] int64, of all candidates. Rows may be strided.
        parents: [B, M] int64, number of each candidate's parent, -1 for the root. Rows may be
            strided.
        num_draft_tokens: N, root included; 2 <= N <= n + 1.
        num_rows: [B] int64 in 1..N, nodes of each request, root included; None for N of each.

    Returns:
        index [B, N - 1] int64, ascending, so parents come before children; entries after a
        request's last node are M, which is no candidate's number. draft_tokens and parent_rows,
        [B, N - 1] int64.

    Raises:
        ValueError: shape, dtype or `num_draft_tokens` out of range.

    Source: contract of SGLang's `organize_draft_results`.
    """
    contract.check_select_nodes(node_index, tokens, parents, num_draft_tokens, num_rows)
    index, absent = node_index[:, : num_draft_tokens - 1], tokens.shape[1]
    if num_rows is not None:
        row = torch.arange(1, num_draft_tokens, device=index.device)
        index = index.masked_fill(row >= num_rows.unsqueeze(1), absent)
        tokens = torch.nn.functional.pad(tokens, (0, 1))
        parents = torch.nn.functional.pad(parents, (0, 1), value=absent + 1)
    index = index.sort(dim=1).values
    above = parents.gather(1, index)
    matches = above.unsqueeze(2) == index.unsqueeze(1)  # [B, child, parent]
    place = torch.where(matches.any(dim=2), matches.to(torch.uint8).argmax(dim=2) + 1, -1)
    return index, tokens.gather(1, index), torch.where(above < 0, 0, place)


def list_slots(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    path_slots: torch.Tensor,
    depth: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
) -> None:
    """List the cache slots that each node of a layer reads: committed prefix, then its own path.

    Definition: row (b, w) of the packed lists =
        req_to_token[req_pool_indices[b], :seq_lens[b]] ++ path_slots[b, w, :depth]

    Args:
        req_to_token: [rows, max_context] int, slot of each request's token. Rows may be strided.
        req_pool_indices: [B] int64, rows of that table. seq_lens: [B] int64, committed lengths.
        path_slots: [B, W, D] int64, from a node's topmost ancestor to itself. May be strided.
        depth: [1] int64 in 1..D, the layer; a tensor, so that a captured graph serves all layers.
        kv_indptr: [B * W + 1] int32, written: list i ends before kv_indptr[i + 1].
        kv_indices: at least sum of W * (seq_lens + depth) int64, written.

    Raises:
        ValueError: shape or dtype out of range.

    Effects: cells after the last list keep their values. Unlike the kernel in `fused`, this one
        reads sizes on the host, which is a host sync.
    """
    contract.check_list_slots(
        req_to_token, req_pool_indices, seq_lens, path_slots, depth, kv_indptr, kv_indices
    )
    batch_size, width, _ = path_slots.shape
    lengths = (seq_lens + depth).repeat_interleave(width)
    kv_indptr[0] = 0
    kv_indptr[1:] = lengths.cumsum(0)
    columns = torch.arange(int(lengths.max()), device=lengths.device)
    request = torch.arange(batch_size, device=lengths.device).repeat_interleave(width)
    # [B * W, columns], from which each row takes its first ones.
    prefix = req_to_token[req_pool_indices[request]][:, : len(columns)].to(torch.int64)
    prefix = torch.nn.functional.pad(prefix, (0, len(columns) - prefix.shape[1]))
    on_path = (columns - seq_lens[request].unsqueeze(1)).clamp(0, path_slots.shape[2] - 1)
    path = path_slots.reshape(batch_size * width, -1).gather(1, on_path)
    slots = torch.where(columns < seq_lens[request].unsqueeze(1), prefix, path)
    listed = slots[columns < lengths.unsqueeze(1)]
    kv_indices[: len(listed)] = listed


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
    """Link the selected candidates of each request into a tree below its bonus token.

    Definition: node 0 is the root, and the parent of node i > 0 is node parent_rows[b, i - 1].
        for b in range(B), i in range(N):
            tree_mask[b, i, j] = j in (0, i, ancestors of i)
            positions[b, i] = seq_lens[b] + number of ancestors of i
            retrieve_index[b, i] = b * N + i
            retrieve_next_token[b, i] = first child of i, -1 for none
            retrieve_next_sibling[b, i] = next node with the parent of i, -1 for none

    A node whose parent is -1 is linked to none, so verification cannot reach it. It sees the root
    and itself.

    Args:
        parent_rows: [B, N - 1] int64, each below its own node; 2 <= N <= MAX_DRAFT_TOKENS.
        seq_lens: [B] int64 or int32, committed tokens.
        tree_mask: at least [B * N * N] bool, written; the layout that SGLang names QLEN_ONLY.
        positions: [B * N] int64, written.
        retrieve_index, retrieve_next_token, retrieve_next_sibling: [B, N] int64, written.
        num_steps: D, the largest depth that a node may have.

    Raises:
        ValueError: shape, dtype or layout out of range.

    Effects: every named cell is overwritten; the rest of `tree_mask` keeps its values.
    Source: contract of SGLang's `build_tree_kernel_efficient` with a QLEN_ONLY mask.
    """
    links = (retrieve_index, retrieve_next_token, retrieve_next_sibling)
    contract.check_build_tree(parent_rows, seq_lens, tree_mask, positions, links, num_steps)
    batch_size, width = parent_rows.shape[0], parent_rows.shape[1] + 1
    device = parent_rows.device
    nodes = torch.arange(width, device=device)

    parent = torch.nn.functional.pad(parent_rows.clamp(min=0), (1, 0))  # [B, N]
    linked = torch.nn.functional.pad(parent_rows >= 0, (1, 0))

    is_child = (parent.unsqueeze(1) == nodes.unsqueeze(1)) & linked.unsqueeze(1)  # [B, parent, i]
    first = torch.where(is_child, nodes, width).amin(dim=2)
    same_parent = is_child.gather(1, parent.unsqueeze(2).expand(-1, -1, width))
    later = same_parent & (nodes > nodes.unsqueeze(1)) & linked.unsqueeze(2)
    following = torch.where(later, nodes, width).amin(dim=2)
    retrieve_next_token.copy_(torch.where(first == width, -1, first))
    retrieve_next_sibling.copy_(torch.where(following == width, -1, following))
    retrieve_index.copy_(torch.arange(batch_size * width, device=device).view(batch_size, width))

    sees = torch.eye(width, dtype=torch.bool, device=device).repeat(batch_size, 1, 1)
    sees[:, :, 0] = True
    ancestor = parent
    for _ in range(num_steps - 1):
        sees.scatter_(2, ancestor.unsqueeze(2), True)
        ancestor = parent.gather(1, ancestor)
    positions.copy_((seq_lens.unsqueeze(1) + sees.sum(dim=2) - 1).flatten())
    tree_mask[: sees.numel()].copy_(sees.flatten())
