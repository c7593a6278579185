"""The ops of sampled requests in plain torch: their definition, and what tests compare with.

Shape letters are those of `tree.py`; R nodes whose children are proposed, E of them per request in
all, M tokens that the draft's distribution is kept of, V tokens in all, S nodes of the longest path
with the root.
"""

from __future__ import annotations

import torch

from cast_sglang.ops.contract import LEAST_LEFT
from cast_sglang.ops.sampled.contract import (
    Accepted,
    DrawCuts,
    DrawnChildren,
    check_draw_children,
)

__all__ = ["accept_draws", "draw_children"]


def draw_children(
    probs: torch.Tensor, tokens: torch.Tensor, cuts: DrawCuts, noise: torch.Tensor, topk: int
) -> DrawnChildren:
    """Draw K children of each node without replacement, or take the likeliest.

    Definition: for each node r of a request that is drawn:
        q[m] = (probs[r, m] / probs[r, 0]) ** (1 / temperature), 0 from place top_k on; of sum 1
        q[m] = 0 where sum of q[:m] > top_p, or q[m] < min_p * q[0]; of sum 1 again
        children: the K tokens with the largest q[m] / noise[r, m], largest first
        x[k] = the least of q[i] / (1 - sum of q[:i]) over i <= k
        out.probs[r, k] = x[k] * product of (1 - x[i]) over i < k
    and of the others: out.tokens[r] = tokens[r, :K], out.probs[r] = probs[r, :K], q = 0.

    With exponential noise the order is that of draws without replacement from q (an exponential
    race). `out.probs` depends on the shape of q alone, never on what was drawn: a tree may be
    chosen by it without harm to the law of the output (docs/sampling.md). Its share of what is
    left, x, never increases from one draw to the next, so an earlier draw never scores below a
    later one.

    Args:
        probs: [R, M] float32, the draft's probabilities of its likeliest tokens, descending.
        tokens: [R, M] int64.
        cuts: of B requests; R is a multiple of B, request-major.
        noise: [R, M] float32 > 0, drawn from the exponential distribution.
        topk: K <= M.

    Source: Jeon et al., "Recursive Speculative Decoding" (arXiv 2402.14160), section 3; the noise:
    Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006).
    """
    check_draw_children(probs, tokens, cuts, noise, topk)
    num_nodes, num_tokens = probs.shape
    width = num_nodes // len(cuts.is_drawn)
    temperatures, top_ks, top_ps, min_ps, is_drawn = (
        part.repeat_interleave(width).unsqueeze(1) for part in cuts
    )
    weights = (probs / probs[:, :1].clamp(min=torch.finfo(probs.dtype).tiny)) ** (1 / temperatures)
    proposals = weights.masked_fill(torch.arange(num_tokens, device=probs.device) >= top_ks, 0.0)
    proposals = proposals / proposals.sum(1, keepdim=True)
    before = proposals.cumsum(1) - proposals
    # The first one stays, whatever rounding says.
    is_cut = (before > top_ps) | (weights < min_ps)
    is_cut[:, 0] = False
    proposals = proposals.masked_fill(is_cut, 0.0)
    proposals = proposals / proposals.sum(1, keepdim=True)
    order = (proposals / noise).topk(topk, dim=1).indices
    shares = proposals / (1.0 - (proposals.cumsum(1) - proposals)).clamp(min=LEAST_LEFT)
    shares = shares[:, :topk].clamp(max=1.0).cummin(1).values
    left = torch.cat([torch.ones_like(shares[:, :1]), (1.0 - shares[:, :-1]).cumprod(1)], dim=1)
    return DrawnChildren(
        torch.where(is_drawn, shares * left, probs[:, :topk]),
        torch.where(is_drawn, tokens.gather(1, order), tokens[:, :topk]),
        proposals.masked_fill(~is_drawn, 0.0),
    )


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
    """Walk each request's tree by recursive rejection, and draw the token behind the path.

    Definition, from the root down, at a node with the target's distribution p:
        drawn:   q = proposals of the node's children; for each child c in order
                     accept with chance min(1, p[c] / q[c])
                     else p = max(p - q, 0) of sum 1; q[c] = 0, q of sum 1
        others:  for each child c in order, and for what was copied behind the draws
                     accept with chance p[c]
                     else p[c] = 0, p of sum 1
        continue at the accepted child; if there is none, draw the last token from p
    A child is accepted if its coin is below its chance. The others are the case of a q with all its
    mass on the child. Each token is an exact sample of the target, if the number of a node's drawn
    children that are in the tree was settled without regard to their tokens and to what lies below.

    Args:
        target_probs: [B, N, V] float, of sum 1, of the token behind each node; 0 for tokens that
            the request cuts.
        candidates, next_token, next_sibling: [B, N] int64, the tokens of the nodes and the links of
            the tree, -1 for none; siblings in the order of the draws, none left out before another.
        proposers: [B, N] int64, row of `proposals` that a node was drawn from, -1 for a copy, which
            no draw of the same parent follows; of the root any.
        proposals: [B, E, M] float, 0 for tokens that could not be drawn.
        proposal_tokens: [B, E, M] int64, distinct in a row.
        is_drawn: [B] bool.
        coins: [B, N] float in [0, 1), one a node; of the root not used.
        final_coins: [B] float in [0, 1).
        max_nodes: S, of the longest path; what would be deeper is not tried.

    Waits for the device: this is the definition, and no server runs it.

    Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv
    2211.17192), appendix A.1, and Jeon et al. (arXiv 2402.14160), theorem 3.1.
    """
    batch_size, num_nodes = candidates.shape
    nodes = candidates.new_full((batch_size, max_nodes), -1)
    chances = target_probs.new_full((batch_size, num_nodes), torch.nan)
    residual = torch.empty_like(target_probs[:, 0])
    num_drafts, tokens = candidates.new_zeros(batch_size), candidates.new_zeros(batch_size)
    for b in range(batch_size):
        path, probs = [0], target_probs[b, 0].double()
        while True:
            accepted, child = None, int(next_token[b, path[-1]]) if len(path) < max_nodes else -1
            proposal = torch.zeros_like(probs)
            if child >= 0 and is_drawn[b] and (row := proposers[b, child]) >= 0:
                proposal[proposal_tokens[b, row]] = proposals[b, row].to(probs.dtype)
                proposal /= proposal.sum()
            while child >= 0 and accepted is None:
                token = candidates[b, child]
                if not is_drawn[b] or proposers[b, child] < 0:
                    proposal = torch.zeros_like(probs)
                    proposal[token] = 1.0
                # A token that could not be drawn is not accepted.
                chance = (probs[token] / proposal[token]).clamp(max=1.0) if proposal[token] else 0.0
                chances[b, child] = chance
                if coins[b, child] < chance:
                    accepted = child
                    break
                left = (probs - proposal).clamp(min=0.0)
                if left.sum() <= 0.0:  # only by rounding
                    break
                probs = left / left.sum()
                proposal[token] = 0.0
                proposal = proposal / proposal.sum().clamp(min=torch.finfo(probs.dtype).tiny)
                child = int(next_sibling[b, child])
            if accepted is None:
                break
            path.append(accepted)
            probs = target_probs[b, accepted].double()
        nodes[b, : len(path)] = torch.tensor(path)
        num_drafts[b], residual[b] = len(path) - 1, probs
        reached = (probs.cumsum(0) > final_coins[b] * probs.sum()) & (probs > 0.0)
        tokens[b] = reached.to(torch.int8).argmax() if reached.any() else probs.argmax()
    return Accepted(nodes, num_drafts, tokens, chances, residual)
