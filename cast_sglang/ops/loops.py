"""The ops of a tree as compiled loops, for the CPU: names, signatures and meaning of `reference`.

Between two passes a chain of small tensor operations finds cold caches at each call; a loop is one
call. What is not on the step path of the CPU is `reference`'s own.
"""

from __future__ import annotations

import numpy as np
import torch

from cast_sglang.compiled import compiled
from cast_sglang.ops import contract, reference
from cast_sglang.ops.contract import CalibrationLines, GrownLayer
from cast_sglang.ops.reference import choose_size, list_slots, mean_utility, select_count
from cast_sglang.tree import Frontier, RankedNodes

__all__ = [
    "build_tree",
    "choose_size",
    "grow_layer",
    "list_slots",
    "mean_utility",
    "rank_nodes",
    "select_count",
    "select_nodes",
]


def grow_layer(
    parent_scores: torch.Tensor,
    probs: torch.Tensor,
    tokens: torch.Tensor,
    layer_start: int,
    lines: CalibrationLines | None = None,
) -> GrownLayer:
    """Score the children of a layer's expanded nodes and rank the best K; see `reference`."""
    if lines is not None:
        return reference.grow_layer(parent_scores, probs, tokens, layer_start, lines)
    contract.check_grow_layer(parent_scores, probs, tokens, layer_start, lines)
    (batch_size, width), topk = parent_scores.shape, probs.shape[1]
    scores = probs.new_empty(batch_size, width * topk)
    best = probs.new_empty(batch_size, topk)
    places = tokens.new_empty(3, batch_size, topk)
    _grow_layer(
        parent_scores.numpy(),
        probs.numpy(),
        tokens.numpy(),
        layer_start,
        scores.numpy(),
        best.numpy(),
        places.numpy(),
    )
    index, best_tokens, parents = places
    return GrownLayer(probs, scores, Frontier(best, index, best_tokens, parents))


def rank_nodes(scores: torch.Tensor, num_nodes: int) -> RankedNodes:
    """Keep each request's best candidates, best first; see `reference`."""
    contract.check_rank_nodes(scores, num_nodes)
    best = scores.new_empty(len(scores), num_nodes)
    index = torch.empty(len(scores), num_nodes, dtype=torch.int64)
    _rank_nodes(scores.numpy(), best.numpy(), index.numpy())
    return RankedNodes(best, index)


def select_nodes(
    node_index: torch.Tensor,
    tokens: torch.Tensor,
    num_draft_tokens: int,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take each request's best nodes in the order in which they were drafted; see `reference`."""
    contract.check_select_nodes(node_index, tokens, num_draft_tokens, num_rows)
    index, draft_tokens = tokens.new_empty(2, len(tokens), num_draft_tokens - 1)
    if num_rows is None:
        num_rows = torch.full((len(tokens),), num_draft_tokens)
    _select_nodes(
        node_index.numpy(), tokens.numpy(), num_rows.numpy(), index.numpy(), draft_tokens.numpy()
    )
    return index, draft_tokens


def build_tree(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    num_steps: int,
) -> None:
    """Link the selected candidates into a tree below the bonus token; see `reference`."""
    links = (retrieve_index, retrieve_next_token, retrieve_next_sibling)
    contract.check_build_tree(
        parent_list, top_scores_index, seq_lens, tree_mask, positions, links, topk, num_steps
    )
    _build_tree(
        parent_list.numpy(),
        top_scores_index.numpy(),
        seq_lens.to(torch.int64).numpy(),
        topk,
        tree_mask.numpy(),
        positions.numpy(),
        *(link.numpy() for link in links),
    )


@compiled("void(f4[:], f4[:], i8[:])")
def _rank(scores: np.ndarray, best: np.ndarray, index: np.ndarray) -> None:
    """Write the largest scores of one request, as many as `best` holds, and where they stand."""
    kept, num_best = 0, len(best)
    for candidate in range(len(scores)):
        score = scores[candidate]
        if kept < num_best:
            place = kept
            kept += 1
        elif score > best[num_best - 1]:
            place = num_best - 1
        else:
            continue
        # Past smaller ones only, so that of equal scores the first stays first.
        while place > 0 and best[place - 1] < score:
            best[place], index[place] = best[place - 1], index[place - 1]
            place -= 1
        best[place], index[place] = score, candidate


@compiled("void(f4[:, :], f4[:, :], i8[:, :], i8, f4[:, :], f4[:, :], i8[:, :, :])")
def _grow_layer(
    parent_scores: np.ndarray,
    probs: np.ndarray,
    tokens: np.ndarray,
    layer_start: int,
    scores: np.ndarray,
    best: np.ndarray,
    places: np.ndarray,
) -> None:
    """Write scores, the best of them, and their numbers, tokens and parents as `places`."""
    batch_size, width = parent_scores.shape
    topk = probs.shape[1]
    for request in range(batch_size):
        for row in range(width):
            for child in range(topk):
                prob = probs[request * width + row, child]
                scores[request, row * topk + child] = parent_scores[request, row] * prob
        _rank(scores[request], best[request], places[0, request])
        for rank in range(topk):
            child = places[0, request, rank]
            row = child // topk
            places[0, request, rank] = layer_start + child
            places[1, request, rank] = tokens[request * width + row, child % topk]
            places[2, request, rank] = row


@compiled("void(f4[:, :], f4[:, :], i8[:, :])")
def _rank_nodes(scores: np.ndarray, best: np.ndarray, index: np.ndarray) -> None:
    for request in range(len(scores)):
        _rank(scores[request], best[request], index[request])


@compiled("void(i8[:, :], i8[:, :], i8[:], i8[:, :], i8[:, :])")
def _select_nodes(
    node_index: np.ndarray,
    tokens: np.ndarray,
    num_rows: np.ndarray,
    index: np.ndarray,
    draft_tokens: np.ndarray,
) -> None:
    num_nodes, absent = index.shape[1], tokens.shape[1]
    for request in range(len(index)):
        ours, kept = index[request], num_rows[request] - 1
        for node in range(num_nodes):
            ours[node] = node_index[request, node] if node < kept else absent
        ours.sort()
        for node in range(num_nodes):
            is_absent = ours[node] == absent
            draft_tokens[request, node] = 0 if is_absent else tokens[request, ours[node]]


@compiled("void(i8[:, :], i8[:, :], i8[:], i8, b1[:], i8[:], i8[:, :], i8[:, :], i8[:, :])")
def _build_tree(
    parent_list: np.ndarray,
    top_scores_index: np.ndarray,
    seq_lens: np.ndarray,
    topk: int,
    tree_mask: np.ndarray,
    positions: np.ndarray,
    retrieve_index: np.ndarray,
    retrieve_next_token: np.ndarray,
    retrieve_next_sibling: np.ndarray,
) -> None:
    batch_size, num_nodes = retrieve_index.shape
    parent = np.empty(num_nodes, dtype=np.int64)
    is_linked = np.empty(num_nodes, dtype=np.bool_)
    for request in range(batch_size):
        numbers, first = top_scores_index[request], request * num_nodes
        parent[0], is_linked[0] = 0, False
        for node in range(1, num_nodes):
            number = numbers[node - 1]
            parent[node], is_linked[node] = 0, number < topk
            if number >= topk and number // topk < parent_list.shape[1]:
                above = parent_list[request, number // topk]
                place = np.searchsorted(numbers, above)
                if place < num_nodes - 1 and numbers[place] == above:
                    parent[node], is_linked[node] = place + 1, True
        for node in range(num_nodes):
            row = (first + node) * num_nodes
            tree_mask[row : row + num_nodes] = False
            tree_mask[row] = tree_mask[row + node] = True
            depth, ancestor = 0, node
            while ancestor != 0:
                tree_mask[row + ancestor] = True
                depth, ancestor = depth + 1, parent[ancestor]
            positions[first + node] = seq_lens[request] + depth
            retrieve_index[request, node] = first + node
            retrieve_next_token[request, node] = -1
            retrieve_next_sibling[request, node] = -1
        # From the last to the first, so that a parent ends up with its first child.
        for node in range(num_nodes - 1, 0, -1):
            if is_linked[node]:
                retrieve_next_sibling[request, node] = retrieve_next_token[request, parent[node]]
                retrieve_next_token[request, parent[node]] = node
