"""Sampling for verification at temperature > 0, and seeded random numbers, in plain torch."""

import torch

Tensor = torch.Tensor

_MASK32 = 0xFFFFFFFF


def top_k_renorm(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Keep each row's `top_ks` likeliest tokens and renormalise.

    Args:
        probs: [R, V] float32.
        top_ks: [R] int; values of V and more keep everything.

    Ties go to the lower token, as argmax breaks them: a row with top_k 1 is a greedy request.
    """
    vocab_size = probs.shape[1]
    limit = int(top_ks.clamp(max=vocab_size).max())
    if limit >= vocab_size:
        values, tokens = probs.sort(dim=1, descending=True, stable=True)
    else:
        # One more than needed decides whether a tie crosses the limit; only then sort stably.
        values, tokens = probs.topk(limit + 1, dim=1)
        if (values[:, 1:] == values[:, :-1]).any():
            values, tokens = probs.sort(dim=1, descending=True, stable=True)
    values = values.masked_fill(torch.arange(values.shape[1]) >= top_ks.unsqueeze(1), 0.0)
    values /= values.sum(dim=1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, tokens, values)


def top_p_renorm(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Keep each row's likeliest tokens until their mass reaches `top_ps`, and renormalise.

    Definition: with tokens sorted by probability, keep token i while sum(p[:i]) <= top_p.

    Args:
        probs: [R, V] float32.
        top_ps: [R] float32 in (0, 1].
    """
    values, tokens = probs.sort(dim=1, descending=True, stable=True)
    mass_before = values.cumsum(dim=1) - values
    values.masked_fill_(mass_before > top_ps.unsqueeze(1), 0.0)
    values /= values.sum(dim=1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, tokens, values)


def tree_speculative_sampling(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Sample from the target along each request's tree, using target probabilities only.

    Definition: at the current node, add up the target probabilities of its children in sibling
    order; accept the first child with coin < sum / threshold_acc or probability >= threshold_single
    (never one of probability 0) and go on with that node's coin; if none is accepted, sample from
    the target with the rejected children's mass removed. With both thresholds 1 each token is an
    exact sample of the target.

    Args:
        predicts: [B * N] int32, written at accepted nodes: the token that follows the node.
        accept_index: [B, S] int32, -1 filled; written with the accepted nodes' flat indexes.
        accept_token_num: [B] int32, written: accepted drafts, the root not counted.
        candidates, retrive_*: [B, N] int64.
        uniform_samples: [B, N] in [0, 1), the coin thrown at each node.
        uniform_samples_for_final_sampling: [B] in [0, 1).
        target_probs: [B, N, V] float32, renormalised.
        draft_probs: [B, N, V] float32 zeros; rejected children's mass is written here.
        deterministic: this implementation always is.

    Source: contract of SGLang 0.5.23 `tree_speculative_sampling_target_only`.
    """
    batch, width = candidates.shape
    rows = torch.arange(batch)
    max_accepted = accept_index.shape[1] - 1
    threshold_acc = max(threshold_acc, 1e-9)
    last = torch.zeros_like(rows)
    num_accepted = torch.zeros_like(rows)
    mass = torch.zeros(batch)
    accept_index[:, 0] = retrive_index[:, 0]
    node = retrive_next_token[:, 0]
    while True:
        active = (node >= 0) & (num_accepted < max_accepted)
        if not active.any():
            break
        here = node.clamp(min=0)
        token = candidates[rows, here]
        prob = target_probs[rows, last, token]
        mass = mass + prob
        coin = uniform_samples[rows, last]
        wins = (coin < mass / threshold_acc) | (prob >= threshold_single)
        accepted = active & (prob > 0) & wins
        rejected = active & ~accepted
        draft_probs[rows, last, token] = torch.where(rejected, prob, draft_probs[rows, last, token])
        # The accepted node's token follows the node accepted before it.
        before = retrive_index[rows, last]
        predicts[before] = torch.where(accepted, token.to(predicts.dtype), predicts[before])
        num_accepted = num_accepted + accepted
        last = torch.where(accepted, here, last)
        mass = mass.masked_fill(accepted, 0.0)
        accept_index[rows, num_accepted] = retrive_index[rows, last].to(accept_index.dtype)
        node = torch.where(
            accepted, retrive_next_token[rows, here], retrive_next_sibling[rows, here]
        ).masked_fill_(~active, -1)
    accept_token_num.copy_(num_accepted)

    residual = target_probs[rows, last]
    # A full path has no rejected children below its last node.
    open_path = (num_accepted < max_accepted).unsqueeze(1)
    residual = torch.where(open_path, residual - draft_probs[rows, last], residual).clamp_(min=0)
    final = sample_from_mass(residual, uniform_samples_for_final_sampling)
    predicts[retrive_index[rows, last]] = final.to(predicts.dtype)


def sample_from_mass(mass: Tensor, coins: Tensor) -> Tensor:
    """Draw one token per row with probability proportional to `mass`, by inverting its CDF.

    Args:
        mass: [R, V] float32 >= 0; a row of zeros gives the last token.
        coins: [R] in [0, 1).

    Returns:
        [R] int64; always a token of positive mass where there is one.
    """
    vocab_size = mass.shape[1]
    cdf = mass.cumsum(dim=1)
    token = torch.searchsorted(cdf, (coins * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    # Rounding can put the coin past the last bucket.
    positive = torch.where(mass > 0, torch.arange(vocab_size), -1).amax(dim=1)
    last_positive = torch.where(positive < 0, vocab_size - 1, positive)
    return torch.minimum(token, last_positive)


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """MurmurHash3 of (seed, position, column) as four 32-bit blocks.

    Args:
        seed: [R] uint64.
        positions: [R] integer, low 32 bits used.
        col_indices: [C] integer, low 32 bits used.

    Returns:
        [R, C] uint32.
    """
    seed = seed.to(torch.int64)
    state = torch.zeros_like(seed)
    for block in (seed & _MASK32, (seed >> 32) & _MASK32, positions.to(torch.int64) & _MASK32):
        state = _murmur_mix(state, block)
    state = _murmur_mix(state.unsqueeze(1), (col_indices.to(torch.int64) & _MASK32).unsqueeze(0))
    state = state ^ 16  # bytes hashed
    state = (state ^ (state >> 16)) * 0x85EBCA6B & _MASK32
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & _MASK32
    return (state ^ (state >> 16)).to(torch.uint32)


def _murmur_mix(state: Tensor, block: Tensor) -> Tensor:
    # int64 products wrap, which leaves the low 32 bits, all that is kept, exact.
    block = block * 0xCC9E2D51 & _MASK32
    block = (block << 15 | block >> 17) & _MASK32
    state = state ^ (block * 0x1B873593 & _MASK32)
    state = (state << 13 | state >> 19) & _MASK32
    return (state * 5 + 0xE6546B64) & _MASK32
