"""The ops of sampled requests as Triton kernels, for GPUs; `reference` defines them.

One program handles one node, or the path of one request. No kernel uses atomics, and none waits for
the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cast_sglang.ops.contract import LEAST_LEFT
from cast_sglang.ops.sampled.contract import (
    Accepted,
    DrawCuts,
    DrawnChildren,
    check_draw_children,
)

__all__ = ["accept_draws", "draw_children"]

# Tokens of the vocabulary that a program of `accept_draws` copies at a time.
_VOCAB_TILE = 2048


def draw_children(
    probs: torch.Tensor, tokens: torch.Tensor, cuts: DrawCuts, noise: torch.Tensor, topk: int
) -> DrawnChildren:
    """Draw K children of each node without replacement, or take the likeliest; see `reference`."""
    check_draw_children(probs, tokens, cuts, noise, topk)
    num_nodes, num_tokens = probs.shape
    drawn = DrawnChildren(
        probs.new_empty(num_nodes, topk), tokens.new_empty(num_nodes, topk), torch.empty_like(probs)
    )
    _draw_children_kernel[(num_nodes,)](
        probs.contiguous(),
        tokens.contiguous(),
        *(part.contiguous() for part in cuts),
        noise.contiguous(),
        *drawn,
        num_nodes // len(cuts.is_drawn),
        num_tokens,
        topk,
        LEAST_LEFT,
        TOKENS=triton.next_power_of_2(num_tokens),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return drawn


@triton.jit(do_not_specialize=["width", "num_tokens", "topk"])
def _draw_children_kernel(  # type: ignore[no-untyped-def]
    probs_ptr,
    tokens_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    is_drawn_ptr,
    noise_ptr,
    drawn_probs_ptr,
    drawn_tokens_ptr,
    proposals_ptr,
    width,
    num_tokens,
    topk,
    least_left,
    TOKENS: tl.constexpr,
):
    """Draw the children of one node."""
    node = tl.program_id(0)
    request = node // width
    m = tl.arange(0, TOKENS)
    at = node * num_tokens + m
    is_token = m < num_tokens
    probs = tl.load(probs_ptr + at, mask=is_token, other=0.0)
    if tl.load(is_drawn_ptr + request).to(tl.int32) == 0:
        tokens = tl.load(tokens_ptr + at, mask=m < topk, other=0)
        tl.store(drawn_probs_ptr + node * topk + m, probs, mask=m < topk)
        tl.store(drawn_tokens_ptr + node * topk + m, tokens, mask=m < topk)
        tl.store(proposals_ptr + at, tl.zeros([TOKENS], tl.float32), mask=is_token)
        return
    power = 1.0 / tl.load(temperatures_ptr + request)
    most = tl.maximum(tl.max(probs, axis=0), 1e-37)
    weights = tl.exp(tl.log(tl.maximum(probs / most, 1e-37)) * power)
    weights = tl.where(probs > 0.0, weights, 0.0)
    is_kept = is_token & (m < tl.load(top_ks_ptr + request))
    q = tl.where(is_kept, weights, 0.0)
    q = q / tl.sum(q, axis=0)
    before = tl.cumsum(q, axis=0) - q
    is_cut = before > tl.load(top_ps_ptr + request)
    is_cut = is_cut | (weights < tl.load(min_ps_ptr + request))
    q = tl.where(is_cut & (m > 0), 0.0, q)
    q = q / tl.sum(q, axis=0)
    tl.store(proposals_ptr + at, q, mask=is_token)
    keys = q / tl.load(noise_ptr + at, mask=is_token, other=1.0)
    keys = tl.where(is_token, keys, -1.0)
    drafted = 1.0
    least = 1.0
    left = 1.0
    for k in range(topk):
        best = tl.argmax(keys, axis=0)
        keys = tl.where(m == best, -1.0, keys)
        token = tl.load(tokens_ptr + node * num_tokens + best)
        tl.store(drawn_tokens_ptr + node * topk + k, token)
        mass = tl.sum(tl.where(m == k, q, 0.0), axis=0)
        least = tl.minimum(least, mass / tl.maximum(drafted, least_left))
        tl.store(drawn_probs_ptr + node * topk + k, least * left)
        drafted = drafted - mass
        left = left * (1.0 - least)


def accept_draws(
    target_probs: torch.Tensor,
    candidates: torch.Tensor,
    next_token: torch.Tensor,
    next_sibling: torch.Tensor,
    proposers: torch.Tensor,
    proposals: torch.Tensor,
    proposal_tokens: torch.Tensor,
    is_drawn: torch.Tensor,
    coins: torch.Tensor,
    final_coins: torch.Tensor,
    max_nodes: int,
) -> Accepted:
    """Walk each request's tree by recursive rejection; see `reference`."""
    batch_size, num_nodes = candidates.shape
    nodes = next_token.new_full((batch_size, max_nodes), -1)
    num_drafts = next_token.new_empty(batch_size)
    chances = target_probs.new_full((batch_size, num_nodes), torch.nan)
    residual = torch.empty_like(target_probs[:, 0])
    num_rows, num_kept = proposals.shape[1:]
    _accept_draws_kernel[(batch_size,)](
        target_probs.contiguous(),
        candidates.to(torch.int64).contiguous(),
        next_token.contiguous(),
        next_sibling.contiguous(),
        proposers.contiguous(),
        proposals.contiguous(),
        proposal_tokens.contiguous(),
        is_drawn.contiguous(),
        coins.contiguous(),
        nodes,
        num_drafts,
        chances,
        residual,
        num_nodes,
        num_rows,
        num_kept,
        target_probs.shape[2],
        max_nodes,
        KEPT=triton.next_power_of_2(num_kept),
        TILE=_VOCAB_TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    mass = residual.cumsum(1, dtype=torch.float64)
    reached = (mass > final_coins.unsqueeze(1) * mass[:, -1:]) & (residual > 0.0)
    # By rounding the sum may never exceed the coin; then any token that is left will do.
    tokens = torch.where(reached.any(1), reached.to(torch.int8).argmax(1), residual.argmax(1))
    return Accepted(nodes, num_drafts, tokens, chances, residual)


@triton.jit(do_not_specialize=["num_nodes", "num_rows", "num_kept", "vocab_size", "max_nodes"])
def _accept_draws_kernel(  # type: ignore[no-untyped-def]
    target_ptr,
    candidates_ptr,
    next_token_ptr,
    next_sibling_ptr,
    proposers_ptr,
    proposals_ptr,
    proposal_tokens_ptr,
    is_drawn_ptr,
    coins_ptr,
    nodes_ptr,
    num_drafts_ptr,
    chances_ptr,
    residual_ptr,
    num_nodes,
    num_rows,
    num_kept,
    vocab_size,
    max_nodes,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Walk the tree of one request."""
    request = tl.program_id(0).to(tl.int64)
    first = request * num_nodes
    m = tl.arange(0, KEPT)
    is_kept = m < num_kept
    is_drawn = tl.load(is_drawn_ptr + request).to(tl.int32) != 0
    tl.store(nodes_ptr + request * max_nodes, request * 0)
    last = first
    path = 0
    goes_on = True
    # Of the last node, as in `loops.accept_draws`.
    inside = tl.zeros([KEPT], tl.float32)
    places = tl.zeros([KEPT], tl.int64)
    has_place = m < 0
    factor = 1.0
    copied = first * 0 - 1  # token of the copy that was rejected
    while goes_on:
        probs_ptr = target_ptr + last * vocab_size
        child = tl.load(next_token_ptr + last)
        if path + 1 >= max_nodes:
            child = child * 0 - 1
        found = child * 0 - 1
        has_children = child >= 0
        row = request * num_rows
        copied = first * 0 - 1
        has_draws = has_children & is_drawn
        if has_draws:
            proposer = tl.load(proposers_ptr + first + child)
            has_draws = proposer >= 0
            row += tl.maximum(proposer, 0)
        draft = tl.load(proposals_ptr + row * num_kept + m, mask=is_kept, other=0.0)
        places = tl.load(proposal_tokens_ptr + row * num_kept + m, mask=is_kept, other=0)
        has_place = is_kept & (draft > 0.0) & has_draws
        draft = tl.where(has_place, draft, 0.0)
        inside = tl.load(probs_ptr + places, mask=has_place, other=0.0)
        mass = tl.sum(draft, axis=0)
        outside = tl.maximum(1.0 - tl.sum(inside, axis=0), 0.0)
        total = outside + tl.sum(inside, axis=0)
        factor = 1.0
        while child >= 0:
            token = tl.load(candidates_ptr + first + child)
            is_place = has_place & (places == token)
            by_draft = is_drawn & (tl.load(proposers_ptr + first + child) >= 0)
            own = tl.sum(tl.where(is_place, inside, 0.0), axis=0)
            chance = 0.0
            if by_draft:
                drafted = tl.sum(tl.where(is_place, draft, 0.0), axis=0)
                if drafted > 0.0:
                    chance = own / total * mass / drafted
            else:
                if tl.sum(is_place.to(tl.int32), axis=0) == 0:
                    own = tl.load(probs_ptr + token) * factor
                if total > 0.0:
                    chance = own / total
            chance = tl.minimum(chance, 1.0)
            tl.store(chances_ptr + first + child, chance)
            if tl.load(coins_ptr + first + child) < chance:
                found = child
                child = child * 0 - 1
            else:
                if by_draft:
                    left = tl.maximum(inside / total - draft / tl.maximum(mass, 1e-37), 0.0)
                    left = tl.where(has_place, left, 0.0)
                    after = tl.sum(left, axis=0) + outside / total
                    if after <= 0.0:
                        # Only by rounding: then p is q, and any draw of p will do.
                        has_place = has_place & (m < 0)
                        factor = 1.0
                        child = child * 0 - 1
                    else:
                        inside = left
                        outside = outside / total
                        factor = factor / total
                        total = after
                        draft = tl.where(is_place, 0.0, draft)
                        mass = tl.sum(draft, axis=0)
                        child = tl.load(next_sibling_ptr + first + child)
                else:
                    total = total - own
                    inside = tl.where(is_place, 0.0, inside)
                    copied = token
                    child = tl.load(next_sibling_ptr + first + child)
        if found >= 0:
            path += 1
            tl.store(nodes_ptr + request * max_nodes + path, found)
            last = first + found
        else:
            goes_on = False
    tl.store(num_drafts_ptr + request, request * 0 + path)
    probs_ptr = target_ptr + last * vocab_size
    out_ptr = residual_ptr + request * vocab_size
    for start in range(0, vocab_size, TILE):
        token = start + tl.arange(0, TILE)
        part = tl.load(probs_ptr + token, mask=token < vocab_size, other=0.0)
        tl.store(out_ptr + token, part * factor, mask=token < vocab_size)
    tl.debug_barrier()
    tl.store(out_ptr + places, inside, mask=has_place)
    if is_drawn:
        if copied >= 0:
            tl.store(out_ptr + copied, 0.0)
    else:
        # Of the others, nothing is left of the tokens that were tried.
        child = tl.load(next_token_ptr + last)
        if path + 1 >= max_nodes:
            child = child * 0 - 1
        while child >= 0:
            tl.store(out_ptr + tl.load(candidates_ptr + first + child), 0.0)
            child = tl.load(next_sibling_ptr + first + child)
