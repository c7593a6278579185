"""The ops as compiled loops, for the CPU; `reference` defines and documents them.

Between two passes the caches are cold, so each small tensor operation is slow; a loop is one call.
An op that the CPU does not run in a step (`list_slots`) is the one of `reference`.
"""

from __future__ import annotations

import numpy as np
import torch

from cast_sglang.ops import contract
from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import AcceptanceCurve, GrownLayer
from cast_sglang.ops.reference import list_slots
from cast_sglang.tree import Frontier, RankedNodes

__all__ = [
    "build_tree",
    "grow_layer",
    "list_slots",
    "rank_nodes",
    "select_nodes",
]

_NO_KNOTS, _NO_LINES = np.empty(0, np.float32), np.empty((0, 0), np.float32)
_NO_KINDS = np.empty(0, np.int64)
_ZERO, _ONE, _LEAST_LEFT = np.float32(0.0), np.float32(1.0), np.float32(contract.LEAST_LEFT)


def grow_layer(
    parent_scores: torch.Tensor,
    probs: torch.Tensor,
    tokens: torch.Tensor,
    layer_start: int,
    curve: AcceptanceCurve | None = None,
) -> GrownLayer:
    """Score the children of a layer's expanded nodes and rank the best K; see `reference`."""
    # NumPy arrays, because creating and indexing them is much faster than with tensors.
    above, drafted, children = parent_scores.numpy(), probs.numpy(), tokens.numpy()
    lines: tuple[np.ndarray, ...] = _NO_KNOTS, _NO_LINES, _NO_LINES, _NO_KINDS
    if curve is not None:
        lines = tuple([part.numpy() for part in curve])
    if not _is_layer(above, drafted, children, *lines):
        contract.check_grow_layer(parent_scores, probs, tokens, layer_start, curve)
    batch_size, topk = len(above), drafted.shape[1]
    width, grown = len(drafted) // batch_size, drafted
    if curve is not None:
        grown = np.empty_like(drafted)
        probs = torch.from_numpy(grown)
    scores = np.empty((batch_size, width * topk), np.float32)
    best = np.empty((batch_size, topk), np.float32)
    nodes = np.empty((3, batch_size, topk), np.int64)  # numbers, tokens, parents
    _grow_layer(above, drafted, children, layer_start, *lines, grown, scores, best, nodes)
    frontier = Frontier(torch.from_numpy(best), *torch.from_numpy(nodes).unbind())
    return GrownLayer(probs, torch.from_numpy(scores), frontier)


def _is_layer(
    above: np.ndarray,
    drafted: np.ndarray,
    children: np.ndarray,
    knots: np.ndarray,
    starts: np.ndarray,
    slopes: np.ndarray,
    kinds: np.ndarray,
) -> bool:
    """Return True only if `contract.check_grow_layer` would pass; ten times faster than that."""
    return (
        above.ndim == drafted.ndim == 2
        and above.dtype == drafted.dtype == np.float32
        and children.dtype == np.int64
        and children.shape == drafted.shape
        and 0 < len(drafted) <= above.size
        and len(drafted) % len(above) == 0
        and len(drafted) // len(above) <= drafted.shape[1] <= 64
        and starts.shape == slopes.shape
        and (len(starts) == 0 or len(kinds) == len(above) and len(knots) == starts.shape[1] - 1)
    )


def rank_nodes(scores: torch.Tensor, num_nodes: int) -> RankedNodes:
    """Keep each request's best candidates, best first; see `reference`."""
    contract.check_rank_nodes(scores, num_nodes)
    best = np.empty((len(scores), num_nodes), np.float32)
    index = np.empty((len(scores), num_nodes), np.int64)
    _rank_nodes(scores.numpy(), best, index)
    return RankedNodes(torch.from_numpy(best), torch.from_numpy(index))


def select_nodes(
    node_index: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_draft_tokens: int,
    num_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take each request's best nodes in the order in which they were drafted; see `reference`."""
    contract.check_select_nodes(node_index, tokens, parents, num_draft_tokens, num_rows)
    selected = tokens.new_empty(3, len(tokens), num_draft_tokens - 1)
    if num_rows is None:
        num_rows = torch.full((len(tokens),), num_draft_tokens)
    candidates = node_index.numpy(), tokens.numpy(), parents.numpy(), num_rows.numpy()
    _select_nodes(*candidates, selected.numpy())
    index, draft_tokens, parent_rows = selected.unbind()
    return index, draft_tokens, parent_rows


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
    _build_tree(
        parent_rows.numpy(),
        seq_lens.to(torch.int64).numpy(),
        tree_mask.numpy(),
        positions.numpy(),
        *(link.numpy() for link in links),
    )


@compiled("void(f4[:], f4[:], i8[:])")
def _rank(scores: np.ndarray, best: np.ndarray, index: np.ndarray) -> None:
    """Write the len(best) largest scores of one request to `best`, their positions to `index`."""
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
        # Move past smaller scores only, so that equal scores keep their order.
        while place > 0 and best[place - 1] < score:
            best[place], index[place] = best[place - 1], index[place - 1]
            place -= 1
        best[place], index[place] = score, candidate


@compiled(
    "void(f4[:, :], f4[:, :], i8[:, :], i8, f4[:], f4[:, :], f4[:, :], i8[:], f4[:, :], "
    "f4[:, :], f4[:, :], i8[:, :, :])"
)
def _grow_layer(
    parent_scores: np.ndarray,
    probs: np.ndarray,
    tokens: np.ndarray,
    layer_start: int,
    knots: np.ndarray,
    starts: np.ndarray,
    slopes: np.ndarray,
    kinds: np.ndarray,
    grown: np.ndarray,
    scores: np.ndarray,
    best: np.ndarray,
    nodes: np.ndarray,
) -> None:
    """Write the calibrated probabilities, where there is a curve, the scores and the frontier."""
    index, best_tokens, parents = nodes[0], nodes[1], nodes[2]
    batch_size, topk = len(parent_scores), probs.shape[1]
    width = len(probs) // batch_size
    for request in range(batch_size):
        kind = kinds[request] if len(starts) else 0
        for row in range(width):
            node = request * width + row
            drafted = left = _ONE
            for child in range(topk):
                chance = prob = probs[node, child]
                if len(starts):
                    share, piece = min(prob / max(drafted, _LEAST_LEFT), _ONE), 0
                    while piece < len(knots) and knots[piece] <= share:
                        piece += 1
                    hazard = starts[kind, piece] + slopes[kind, piece] * share
                    chance = min(max(hazard, _ZERO), _ONE) * left
                    grown[node, child] = chance
                    drafted, left = drafted - prob, left - chance
                scores[request, row * topk + child] = parent_scores[request, row] * chance
        _rank(scores[request], best[request], index[request])
        for rank in range(topk):
            child = index[request, rank]
            row = child // topk
            index[request, rank] = layer_start + child
            best_tokens[request, rank] = tokens[request * width + row, child % topk]
            parents[request, rank] = row


@compiled("void(f4[:, :], f4[:, :], i8[:, :])")
def _rank_nodes(scores: np.ndarray, best: np.ndarray, index: np.ndarray) -> None:
    for request in range(len(scores)):
        _rank(scores[request], best[request], index[request])


@compiled("void(i8[:, :], i8[:, :], i8[:, :], i8[:], i8[:, :, :])")
def _select_nodes(
    node_index: np.ndarray,
    tokens: np.ndarray,
    parents: np.ndarray,
    num_rows: np.ndarray,
    selected: np.ndarray,
) -> None:
    index, draft_tokens, parent_rows = selected[0], selected[1], selected[2]
    num_nodes, absent = index.shape[1], tokens.shape[1]
    for request in range(len(index)):
        ours, kept = index[request], num_rows[request] - 1
        for node in range(num_nodes):
            ours[node] = node_index[request, node] if node < kept else absent
        ours.sort()
        for node in range(num_nodes):
            draft_tokens[request, node], parent_rows[request, node] = 0, -1
            if ours[node] == absent:
                continue
            draft_tokens[request, node] = tokens[request, ours[node]]
            above = parents[request, ours[node]]
            if above < 0:
                parent_rows[request, node] = 0
                continue
            place = np.searchsorted(ours[:node], above)
            if place < node and ours[place] == above:
                parent_rows[request, node] = place + 1


@compiled("void(i8[:, :], i8[:], b1[:], i8[:], i8[:, :], i8[:, :], i8[:, :])")
def _build_tree(
    parent_rows: np.ndarray,
    seq_lens: np.ndarray,
    tree_mask: np.ndarray,
    positions: np.ndarray,
    retrieve_index: np.ndarray,
    retrieve_next_token: np.ndarray,
    retrieve_next_sibling: np.ndarray,
) -> None:
    batch_size, num_nodes = retrieve_index.shape
    for request in range(batch_size):
        parent, first = parent_rows[request], request * num_nodes
        for node in range(num_nodes):
            row = (first + node) * num_nodes
            tree_mask[row : row + num_nodes] = False
            tree_mask[row] = tree_mask[row + node] = True
            depth, ancestor = 0, node
            while ancestor > 0:
                tree_mask[row + ancestor] = True
                depth, ancestor = depth + 1, parent[ancestor - 1]
            positions[first + node] = seq_lens[request] + depth
            retrieve_index[request, node] = first + node
            retrieve_next_token[request, node] = -1
            retrieve_next_sibling[request, node] = -1
        # From the last to the first, so that a parent ends up with its first child.
        for node in range(num_nodes - 1, 0, -1):
            above = parent[node - 1]
            if above >= 0:
                retrieve_next_sibling[request, node] = retrieve_next_token[request, above]
                retrieve_next_token[request, above] = node
