"""The ops of sampled requests as compiled loops, for the CPU; `reference` defines them."""

from __future__ import annotations

import numpy as np
import torch

from cast_sglang.ops.compiled import compiled
from cast_sglang.ops.contract import LEAST_LEFT
from cast_sglang.ops.sampled.contract import (
    Accepted,
    DrawCuts,
    DrawnChildren,
    check_draw_children,
)

__all__ = ["accept_draws", "draw_children"]

_LEAST_LEFT = LEAST_LEFT


def draw_children(
    probs: torch.Tensor, tokens: torch.Tensor, cuts: DrawCuts, noise: torch.Tensor, topk: int
) -> DrawnChildren:
    """Draw K children of each node without replacement, or take the likeliest; see `reference`."""
    check_draw_children(probs, tokens, cuts, noise, topk)
    num_nodes, num_tokens = probs.shape
    drawn_probs = np.empty((num_nodes, topk), np.float32)
    drawn_tokens = np.empty((num_nodes, topk), np.int64)
    proposals = np.zeros((num_nodes, num_tokens), np.float32)
    _draw_children(
        probs.numpy(),
        tokens.numpy(),
        cuts.temperatures.numpy(),
        cuts.top_ks.to(torch.int64).numpy(),
        cuts.top_ps.numpy(),
        cuts.min_ps.numpy(),
        cuts.is_drawn.numpy(),
        noise.numpy(),
        drawn_probs,
        drawn_tokens,
        proposals,
    )
    return DrawnChildren(*map(torch.from_numpy, (drawn_probs, drawn_tokens, proposals)))


@compiled(
    "void(f4[:, :], i8[:, :], f4[:], i8[:], f4[:], f4[:], b1[:], f4[:, :], "
    "f4[:, :], i8[:, :], f4[:, :])"
)
def _draw_children(
    probs: np.ndarray,
    tokens: np.ndarray,
    temperatures: np.ndarray,
    top_ks: np.ndarray,
    top_ps: np.ndarray,
    min_ps: np.ndarray,
    is_drawn: np.ndarray,
    noise: np.ndarray,
    drawn_probs: np.ndarray,
    drawn_tokens: np.ndarray,
    proposals: np.ndarray,
) -> None:
    num_nodes, num_tokens = probs.shape
    topk, width = drawn_probs.shape[1], num_nodes // len(is_drawn)
    keys = np.empty(num_tokens)
    for node in range(num_nodes):
        request, q = node // width, proposals[node]
        if not is_drawn[request]:
            drawn_probs[node], drawn_tokens[node] = probs[node, :topk], tokens[node, :topk]
            continue
        power, most = 1.0 / temperatures[request], max(probs[node, 0], 1e-38)
        total = 0.0
        for m in range(min(num_tokens, top_ks[request])):
            q[m] = (probs[node, m] / most) ** power
            total += q[m]
        before = after = 0.0
        for m in range(num_tokens):
            mass = q[m]
            if m and (before > top_ps[request] * total or mass < min_ps[request]):
                q[m] = 0.0
            before, after = before + mass, after + q[m]
        for m in range(num_tokens):
            q[m] /= after
            keys[m] = q[m] / noise[node, m]
        drafted, least, left = 1.0, 1.0, 1.0
        for k in range(topk):
            best = np.argmax(keys)
            keys[best] = -1.0
            drawn_tokens[node, k] = tokens[node, best]
            least = min(least, q[k] / max(drafted, _LEAST_LEFT))
            drawn_probs[node, k] = least * left
            drafted, left = drafted - q[k], left * (1.0 - least)


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
    nodes = np.full((batch_size, max_nodes), -1)
    ends = np.zeros((2, batch_size), np.int64)
    chances = np.full((batch_size, num_nodes), np.nan, np.float32)
    residual = np.empty((batch_size, target_probs.shape[2]), np.float32)
    _walk_draws(
        target_probs.numpy(),
        candidates.to(torch.int64).numpy(),
        next_token.numpy(),
        next_sibling.numpy(),
        proposers.numpy(),
        proposals.numpy(),
        proposal_tokens.numpy(),
        is_drawn.numpy(),
        coins.numpy(),
        final_coins.numpy(),
        nodes,
        ends[0],
        ends[1],
        chances,
        residual,
    )
    num_drafts, tokens = torch.from_numpy(ends).unbind()
    rest = torch.from_numpy(chances), torch.from_numpy(residual)
    return Accepted(torch.from_numpy(nodes), num_drafts, tokens, *rest)


@compiled(
    "void(f4[:, :, :], i8[:, :], i8[:, :], i8[:, :], i8[:, :], f4[:, :, :], i8[:, :, :], b1[:], "
    "f4[:, :], f4[:], i8[:, :], i8[:], i8[:], f4[:, :], f4[:, :])"
)
def _walk_draws(
    target_probs: np.ndarray,
    candidates: np.ndarray,
    next_token: np.ndarray,
    next_sibling: np.ndarray,
    proposers: np.ndarray,
    proposals: np.ndarray,
    proposal_tokens: np.ndarray,
    is_drawn: np.ndarray,
    coins: np.ndarray,
    final_coins: np.ndarray,
    nodes: np.ndarray,
    num_drafts: np.ndarray,
    tokens: np.ndarray,
    chances: np.ndarray,
    residual: np.ndarray,
) -> None:
    """Fill the arrays of `Accepted`; chances are nan and nodes -1 before.

    Outside the draft's M tokens nothing is taken from p, so there it stays p times one factor.
    """
    num_kept = proposals.shape[2]
    draft, left = np.empty(num_kept), np.empty(num_kept)  # q and p at these tokens
    for request in range(len(candidates)):
        last, path = 0, 0
        nodes[request, 0] = 0
        while True:
            probs, out = target_probs[request, last], residual[request]
            child = next_token[request, last] if path + 1 < nodes.shape[1] else -1
            uses_draft = child >= 0 and is_drawn[request] and proposers[request, child] >= 0
            # Of p: its sum, the part outside the draft's tokens, and the factor there.
            total = outside = factor = 1.0
            row, mass, accepted = 0, 0.0, -1
            if uses_draft:
                row = proposers[request, child]
                for m in range(num_kept):
                    draft[m], left[m] = proposals[request, row, m], 0.0
                    if draft[m] > 0.0:
                        left[m] = probs[proposal_tokens[request, row, m]]
                    mass, outside = mass + draft[m], outside - left[m]
                outside = max(outside, 0.0)
                total = outside + left.sum()
            else:
                out[:] = probs
            while True:
                if uses_draft and (child < 0 or proposers[request, child] < 0):
                    # All draws are rejected; a copy behind them is a proposal of its own.
                    for token in range(len(probs)):
                        out[token] = probs[token] * factor
                    for m in range(num_kept):
                        if proposals[request, row, m] > 0.0:
                            out[proposal_tokens[request, row, m]] = left[m]
                    uses_draft = False
                if child < 0:
                    break
                token = candidates[request, child]
                place = 0
                if uses_draft:
                    while place < num_kept - 1 and proposal_tokens[request, row, place] != token:
                        place += 1
                    chance = 0.0  # of a token that could not be drawn
                    if draft[place] > 0.0 and proposal_tokens[request, row, place] == token:
                        chance = left[place] / total * mass / draft[place]
                else:
                    chance = out[token] / total if total > 0.0 else 0.0
                chance = min(chance, 1.0)
                chances[request, child] = chance
                if coins[request, child] < chance:
                    accepted = child
                    break
                if uses_draft:
                    after = outside / total
                    for m in range(num_kept):
                        left[m] = max(left[m] / total - draft[m] / max(mass, 1e-300), 0.0)
                        after += left[m]
                    if after <= 0.0:  # only by rounding: then p is q, and any draw of p will do
                        uses_draft, factor = False, 1.0
                        out[:] = probs
                        break
                    outside, factor, total = outside / total, factor / total, after
                    draft[place] = 0.0
                    mass = draft.sum()
                else:
                    total -= out[token]
                    out[token] = 0.0
                child = next_sibling[request, child]
            if accepted < 0:
                break
            path += 1
            nodes[request, path] = last = accepted
        num_drafts[request] = path
        total = 0.0
        for token in range(len(out)):
            total += out[token]
        drawn, running = 0, 0.0
        for token in range(len(out)):
            if out[token] > 0.0:
                # Remembered, because by rounding the sum may never exceed the coin.
                drawn = token
                running += out[token]
                if running > final_coins[request] * total:
                    break
        tokens[request] = drawn
