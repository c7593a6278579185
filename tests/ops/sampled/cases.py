"""Trees of sampled requests for the ops, at odd sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cast_sglang.ops.sampled.contract import DrawCuts

SIZES = [(1, 1, 1, 1, 5), (2, 2, 3, 7, 40), (3, 3, 2, 2, 9), (5, 1, 8, 32, 500), (2, 4, 4, 5, 33)]


class WalkCase(NamedTuple):
    """Arguments of `accept_draws`."""

    target_probs: torch.Tensor
    candidates: torch.Tensor
    next_token: torch.Tensor
    next_sibling: torch.Tensor
    proposers: torch.Tensor
    proposals: torch.Tensor
    proposal_tokens: torch.Tensor
    is_drawn: torch.Tensor
    coins: torch.Tensor
    final_coins: torch.Tensor
    max_nodes: int


def cuts(generator: torch.Generator, batch: int, **changed: Any) -> DrawCuts:
    """Return cuts of `batch` requests, some without any."""
    x = torch.rand((4, batch), generator=generator)
    values = {
        "temperatures": 0.3 + 1.5 * x[0],
        "top_ks": torch.where(x[1] < 0.5, 2 + (8 * x[1]).long(), 1 << 30),
        "top_ps": torch.where(x[2] < 0.5, 0.3 + x[2], 1.0),
        "min_ps": torch.where(x[3] < 0.5, 0.0, x[3] / 4),
        "is_drawn": torch.arange(batch) % 3 != 1,
    }
    return DrawCuts(**(values | changed))


def walk(
    generator: torch.Generator, batch: int, layers: int, topk: int, num_kept: int, vocab: int
) -> WalkCase:
    """Return a tree that expands the first node of each layer, its children drawn at random.

    Behind the draws of each node hangs a copy: of a token that might have been drawn, of one that
    was, and of one that could not be, in turn. The last node expanded has a copy alone.
    """
    num_nodes = 1 + layers * topk + layers + 1
    target = torch.rand((batch, num_nodes, vocab), generator=generator) ** 4
    target[torch.rand(target.shape, generator=generator) < 0.3] = 0.0
    target[..., 0] += 1e-3
    target /= target.sum(-1, keepdim=True)
    num_kept = max(num_kept, topk)
    proposals = torch.rand((batch, layers, num_kept), generator=generator) ** 2 + 1e-3
    proposals[:, :, topk:][torch.rand(proposals[:, :, topk:].shape, generator=generator) < 0.2] = 0
    if topk > 1:  # a child that could not have been drawn
        proposals[0, :, topk - 1] = 0.0
    proposals /= proposals.sum(-1, keepdim=True)
    kept = torch.rand((batch, layers, vocab), generator=generator).argsort(-1)
    everything = kept  # all tokens, those that may be drawn first
    kept = everything[..., :num_kept]
    candidates = torch.zeros((batch, num_nodes), dtype=torch.int64)
    candidates[:, 1 : 1 + layers * topk] = kept[:, :, :topk].reshape(batch, -1)
    next_token = torch.full((batch, num_nodes), -1)
    next_sibling, proposers = next_token.clone(), torch.zeros_like(next_token)
    parent = 0
    for layer in range(layers):
        first = 1 + layer * topk
        next_token[:, parent] = parent = first
        next_sibling[:, first : first + topk - 1] = torch.arange(first + 1, first + topk)
        proposers[:, first : first + topk] = layer
        copy = 1 + layers * topk + layer
        place = (min(topk, vocab - 1), 0, min(num_kept, vocab - 1))[layer % 3]
        next_sibling[:, first + topk - 1] = copy
        candidates[:, copy], proposers[:, copy] = everything[:, layer, place], -1
    next_token[:, parent] = num_nodes - 1
    candidates[:, -1], proposers[:, -1] = everything[:, -1, -1], -1
    return WalkCase(
        target, candidates, next_token, next_sibling, proposers, proposals, kept,
        torch.arange(batch) % 3 != 1,
        torch.rand((batch, num_nodes), generator=generator),
        torch.rand(batch, generator=generator),
        layers + 2,
    )  # fmt: skip
