"""Types that all implementations of the ops of sampled requests share."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Accepted", "DrawCuts", "DrawnChildren", "check_draw_children"]


class DrawCuts(NamedTuple):
    """How the requests of a batch sample, [B] each."""

    temperatures: torch.Tensor  # float32 > 0
    top_ks: torch.Tensor  # int, >= 1
    top_ps: torch.Tensor  # float32 in (0, 1]
    min_ps: torch.Tensor  # float32 in [0, 1]
    is_drawn: torch.Tensor  # bool; the likeliest children are proposed to the others


class DrawnChildren(NamedTuple):
    """The proposed children of R nodes."""

    probs: torch.Tensor  # [R, K] float32: what their chances are estimated from
    tokens: torch.Tensor  # [R, K] int64, in the order of the draws
    proposals: torch.Tensor  # [R, M] float32 of sum 1: what they were drawn from; else 0


class Accepted(NamedTuple):
    """The accepted path of each request, and the token behind it."""

    nodes: torch.Tensor  # [B, S] int64, from the root down, -1 for none
    num_drafts: torch.Tensor  # [B] int64, accepted nodes without the root
    tokens: torch.Tensor  # [B] int64, behind the last accepted node
    chances: torch.Tensor  # [B, N]: of each node that was tried, nan for the others
    residual: torch.Tensor  # [B, V]: what `tokens` was drawn from, up to its sum


def check_draw_children(
    probs: torch.Tensor, tokens: torch.Tensor, cuts: DrawCuts, noise: torch.Tensor, topk: int
) -> None:
    """Raise ValueError unless these shapes are those of `draw_children`."""
    num_nodes, num_tokens = probs.shape
    is_whole = num_nodes % len(cuts.is_drawn) == 0 and topk <= num_tokens
    if not is_whole or tokens.shape != probs.shape or noise.shape != probs.shape:
        raise ValueError(
            f"probs, tokens and noise must all be [{len(cuts.is_drawn)} * W, {topk} or more], got "
            f"{tuple(probs.shape)}, {tuple(tokens.shape)} and {tuple(noise.shape)}"
        )
