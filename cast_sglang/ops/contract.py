"""Types and argument checks that all implementations of the ops share.

The checks read only shapes, dtypes and layouts on the host, so they never wait for a device. They
do not check the values in the tensors; callers must keep to the documented ranges.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cast_sglang.tree import Frontier

__all__ = [
    "LEAST_LEFT",
    "MAX_CANDIDATES",
    "MAX_DRAFT_TOKENS",
    "AcceptanceCurve",
    "GrownLayer",
    "check_build_tree",
    "check_grow_layer",
    "check_list_slots",
    "check_rank_nodes",
    "check_select_nodes",
]

# Limits of the Triton kernels, where one program ranks all candidates and links all nodes of a
# request.
MAX_CANDIDATES = 16384
MAX_DRAFT_TOKENS = 1024

# Smallest divisor for 1 - (sum of the draft's probabilities of earlier siblings), which may be 0.
LEAST_LEFT = 1e-6


class AcceptanceCurve(NamedTuple):
    """Piecewise linear maps of probabilities: g of `policy.acceptance` at one depth.

    There is one map for each of C kinds of requests.
    """

    knots: torch.Tensor  # [P - 1] float32, ascending; where piece i ends and piece i + 1 begins
    starts: torch.Tensor  # [C, P] float32, value of each piece's line at probability 0
    slopes: torch.Tensor  # [C, P] float32, >= 0
    kinds: torch.Tensor  # [B] int64 in 0..C - 1, the kind of each request

    def at(self, shares: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Return g of each value: starts[i] + slopes[i] * x in piece i, kept within 0..1.

        Args:
            shares: [n] float32.
            kinds: [n] int64, whose map to take for each.
        """
        piece = torch.bucketize(shares, self.knots, right=True)
        # Product and sum are rounded separately, which gives the same bits on every device.
        line = self.starts[kinds, piece], self.slopes[kinds, piece]
        return (line[0] + line[1] * shares).clamp_(0.0, 1.0)

    def chances(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the chances of siblings, as `reference.grow_layer` defines them.

        Args:
            probs: [B * W, K] float32, request-major, the draft's probabilities of each node's
                children, in the order in which it proposed them.
        """
        kinds = self.kinds.repeat_interleave(len(probs) // len(self.kinds))
        chances = torch.empty_like(probs)
        drafted = left = torch.ones_like(probs[:, 0])
        for child in range(probs.shape[1]):
            prob = probs[:, child]
            hazard = self.at((prob / drafted.clamp(min=LEAST_LEFT)).clamp_(max=1.0), kinds)
            chances[:, child] = chance = hazard * left
            drafted, left = drafted - prob, left - chance
        return chances


class GrownLayer(NamedTuple):
    """A new layer of the tree and its best candidates."""

    probs: torch.Tensor  # [B * W, K] float32, after calibration
    scores: torch.Tensor  # [B, W * K] float32, path scores of its candidates
    frontier: Frontier  # [B, K] each


def check_grow_layer(
    parent_scores: torch.Tensor,
    probs: torch.Tensor,
    tokens: torch.Tensor,
    layer_start: int,
    curve: AcceptanceCurve | None,
) -> None:
    """Raise ValueError unless these are arguments of `grow_layer`."""
    _check("parent_scores", parent_scores, torch.float32, 2)
    _check("probs", probs, torch.float32, 2)
    _check("tokens", tokens, torch.int64, 2)
    batch_size, most = parent_scores.shape
    (num_nodes, topk), width = probs.shape, len(probs) // batch_size
    if num_nodes % batch_size or tokens.shape != probs.shape:
        raise ValueError(
            f"probs and tokens must both be [{batch_size} * W, K], got {tuple(probs.shape)} "
            f"and {tuple(tokens.shape)}"
        )
    _check_range("W", width, 1, min(most, topk))
    _check_range("layer_start", layer_start, 0, 2**31 - 1 - width * topk)
    _check_range("width * topk", width * topk, 1, MAX_CANDIDATES)
    if curve is None:
        return
    _check("starts", curve.starts, torch.float32, 2)
    _check("slopes", curve.slopes, torch.float32, 2)
    starts, slopes, knots, kinds = curve.starts, curve.slopes, curve.knots, curve.kinds
    if slopes.shape != starts.shape or knots.shape != (starts.shape[1] - 1,):
        raise ValueError(
            f"starts [C, P] need slopes [C, P] and knots [P - 1], got {tuple(starts.shape)}, "
            f"{tuple(slopes.shape)} and {tuple(knots.shape)}"
        )
    if knots.dtype != torch.float32:
        raise ValueError(f"knots must be torch.float32, got {_describe(knots)}")
    if kinds.dtype != torch.int64 or kinds.shape != (batch_size,):
        raise ValueError(f"kinds must be [{batch_size}] torch.int64, got {_describe(kinds)}")


def check_rank_nodes(scores: torch.Tensor, num_nodes: int) -> None:
    """Raise ValueError unless these are arguments of `rank_nodes`."""
    _check("scores", scores, torch.float32, 2)
    _check_range("M", scores.shape[1], 1, MAX_CANDIDATES)
    _check_range("num_nodes", num_nodes, 1, scores.shape[1])


def check_select_nodes(
    node_index: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    num_draft_tokens: int,
    num_rows: torch.Tensor | None,
) -> None:
    """Raise ValueError unless these are arguments of `select_nodes`."""
    _check("node_index", node_index, torch.int64, 2)
    _check("tokens", tokens, torch.int64, 2)
    _check("parents", parents, torch.int64, 2)
    if tokens.shape[0] != node_index.shape[0]:
        raise ValueError(
            f"tokens must have {node_index.shape[0]} rows, got shape {tuple(tokens.shape)}"
        )
    if parents.shape != tokens.shape:
        raise ValueError(f"parents must be {tuple(tokens.shape)}, got shape {tuple(parents.shape)}")
    most = min(node_index.shape[1] + 1, MAX_CANDIDATES)
    _check_range("num_draft_tokens", num_draft_tokens, 2, most)
    if num_rows is not None:
        if num_rows.dtype != torch.int64 or num_rows.shape != (len(node_index),):
            raise ValueError(
                f"num_rows must be [{len(node_index)}] torch.int64, got {_describe(num_rows)}"
            )


def check_list_slots(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    path_slots: torch.Tensor,
    depth: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
) -> None:
    """Raise ValueError unless these are arguments of `list_slots`."""
    _check("path_slots", path_slots, torch.int64, 3)
    batch_size, width = path_slots.shape[:2]
    if req_to_token.dim() != 2 or req_to_token.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"req_to_token must be 2-d int, got {_describe(req_to_token)}")
    for name, x in (("req_pool_indices", req_pool_indices), ("seq_lens", seq_lens)):
        if x.dtype != torch.int64 or x.shape != (batch_size,):
            raise ValueError(f"{name} must be [{batch_size}] torch.int64, got {_describe(x)}")
    if depth.dtype != torch.int64 or depth.shape != (1,):
        raise ValueError(f"depth must be [1] torch.int64, got {_describe(depth)}")
    if kv_indptr.dtype != torch.int32 or kv_indptr.shape != (batch_size * width + 1,):
        raise ValueError(
            f"kv_indptr must be [{batch_size * width + 1}] torch.int32, got {_describe(kv_indptr)}"
        )
    _check("kv_indices", kv_indices, torch.int64, 1)
    if not (kv_indptr.is_contiguous() and kv_indices.is_contiguous()):
        raise ValueError("tensors that are written must be contiguous")


def check_build_tree(
    parent_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_links: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    num_steps: int,
) -> None:
    """Raise ValueError unless these are arguments of `build_tree`."""
    _check("parent_rows", parent_rows, torch.int64, 2)
    batch_size, width = parent_rows.shape[0], parent_rows.shape[1] + 1
    _check_range("num_draft_tokens", width, 2, MAX_DRAFT_TOKENS)
    if seq_lens.dtype not in (torch.int64, torch.int32) or seq_lens.shape != (batch_size,):
        raise ValueError(f"seq_lens must be [{batch_size}] int, got {_describe(seq_lens)}")
    cells = batch_size * width * width
    _check_range("cells of the mask", cells, 1, 2**31 - 1)
    if tree_mask.dtype != torch.bool or tree_mask.dim() != 1 or len(tree_mask) < cells:
        raise ValueError(
            f"tree_mask must be 1-d torch.bool of {cells} cells or more, got {_describe(tree_mask)}"
        )
    if positions.dtype != torch.int64 or positions.shape != (batch_size * width,):
        raise ValueError(
            f"positions must be [{batch_size * width}] torch.int64, got {_describe(positions)}"
        )
    for links in retrieve_links:
        if links.dtype != torch.int64 or links.shape != (batch_size, width):
            raise ValueError(
                f"retrieve_* must be [{batch_size}, {width}] torch.int64, got {_describe(links)}"
            )
    for written in (tree_mask, positions, *retrieve_links):
        if not written.is_contiguous():
            raise ValueError("tensors that are written must be contiguous")
    _check_range("num_steps", num_steps, 1, MAX_CANDIDATES)


def _check(name: str, x: torch.Tensor, dtype: torch.dtype, dims: int) -> None:
    if x.dtype != dtype or x.dim() != dims or x.numel() == 0:
        raise ValueError(f"{name} must be {dims}-d {dtype} and not empty, got {_describe(x)}")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must be in {least}..{most}, got {value}")


def _describe(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
