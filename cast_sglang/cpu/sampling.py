"""Sampling for verification at temperature > 0, and SGLang's hash for seeded sampling."""

import numpy as np
import torch

from cast_sglang.ops.compiled import compiled

Tensor = torch.Tensor

_MASK32 = 0xFFFFFFFF


def top_k_renorm(probs: Tensor, top_ks: Tensor) -> Tensor:
    """Keep each row's `top_ks` most probable tokens and renormalise.

    Args:
        probs: [R, V] float32.
        top_ks: [R] int; V or more keeps all tokens.

    Ties go to the lower token, as with argmax, so a row with top_k 1 is greedy.
    """
    is_cut = top_ks < probs.shape[1]
    result = probs / probs.sum(dim=1, keepdim=True)
    if is_cut.any():
        result[is_cut] = _cut_to_top_k(probs[is_cut], top_ks[is_cut])
    return result


def _cut_to_top_k(probs: Tensor, top_ks: Tensor) -> Tensor:
    limit = int(top_ks.max())
    # One more token than needed shows whether there are ties, which need a stable sort.
    values, tokens = probs.topk(limit + 1, dim=1)
    if (values[:, 1:] == values[:, :-1]).any():
        values, tokens = probs.sort(dim=1, descending=True, stable=True)
    values = values.masked_fill(torch.arange(values.shape[1]) >= top_ks.unsqueeze(1), 0.0)
    values /= values.sum(dim=1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, tokens, values)


def top_p_renorm(probs: Tensor, top_ps: Tensor) -> Tensor:
    """Keep each row's most probable tokens until their sum exceeds `top_ps`, and renormalise.

    Definition: with tokens sorted by probability, keep token i while sum(p[:i]) <= top_p.

    Args:
        probs: [R, V] float32.
        top_ps: [R] float32 in (0, 1]; 1 keeps all tokens.
    """
    is_cut = top_ps < 1.0
    result = probs / probs.sum(dim=1, keepdim=True)
    if is_cut.any():
        # Sorting is what takes time, so only rows that need it are sorted.
        values, tokens = probs[is_cut].sort(dim=1, descending=True, stable=True)
        mass_before = values.cumsum(dim=1) - values
        values.masked_fill_(mass_before > top_ps[is_cut].unsqueeze(1), 0.0)
        values /= values.sum(dim=1, keepdim=True)
        result[is_cut] = torch.zeros_like(values).scatter_(1, tokens, values)
    return result


@compiled("i8(f4[:], f4[:], f8)")
def _draw(mass: np.ndarray, taken: np.ndarray, coin: float) -> int:
    """Draw a token with probability proportional to max(mass - taken, 0), by inverting its CDF.

    A token with probability 0 is returned only if all have it; then it is the last one.
    """
    total = 0.0
    for token in range(len(mass)):
        total += max(mass[token] - taken[token], 0.0)
    drawn, running = len(mass) - 1, 0.0
    for token in range(len(mass)):
        left = mass[token] - taken[token]
        if left > 0.0:
            # Remembered, because by rounding the sum may never exceed the coin.
            drawn = token
            running += left
            if running > coin * total:
                break
    return drawn


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
    order. Accept the first child with coin < sum / threshold_acc or with probability >=
    threshold_single, but never one of probability 0, and continue with that node and its coin. If
    no child is accepted, sample from the target with the rejected children's probabilities set to
    0. With both thresholds 1 each token is an exact sample of the target.

    Args:
        predicts: [B * N] int32, written at accepted nodes: the token that follows the node.
        accept_index: [B, S] int32, filled with -1; written: b * N + node of the accepted nodes.
        accept_token_num: [B] int32, written: accepted drafts, the root not counted.
        candidates, retrive_*: [B, N] int64, the tokens of the nodes and the links of the tree.
        uniform_samples: [B, N] float32 in [0, 1), the coin of each node.
        uniform_samples_for_final_sampling: [B] float32 in [0, 1), the coin of the last sample.
        target_probs: [B, N, V] float32, renormalised.
        draft_probs: [B, N, V] float32 zeros; written: probabilities of rejected children.
        deterministic: not used; this implementation always is.

    Source: contract of SGLang 0.5.23 `tree_speculative_sampling_target_only`.
    """
    _sample_paths(
        candidates.to(torch.int64).numpy(),
        retrive_index.numpy(),
        retrive_next_token.numpy(),
        retrive_next_sibling.numpy(),
        uniform_samples.numpy(),
        uniform_samples_for_final_sampling.numpy(),
        target_probs.numpy(),
        threshold_single,
        max(threshold_acc, 1e-9),
        draft_probs.numpy(),
        predicts.numpy(),
        accept_index.numpy(),
        accept_token_num.numpy(),
    )


@compiled(
    "void(i8[:, :], i8[:, :], i8[:, :], i8[:, :], f4[:, :], f4[:], f4[:, :, :], f8, f8, "
    "f4[:, :, :], i4[:], i4[:, :], i4[:])"
)
def _sample_paths(
    candidates: np.ndarray,
    retrieve_index: np.ndarray,
    next_token: np.ndarray,
    next_sibling: np.ndarray,
    coins: np.ndarray,
    final_coins: np.ndarray,
    target_probs: np.ndarray,
    threshold_single: float,
    threshold_acc: float,
    rejected_probs: np.ndarray,
    predicts: np.ndarray,
    accept_index: np.ndarray,
    accept_token_num: np.ndarray,
) -> None:
    max_accepted = accept_index.shape[1] - 1
    for request in range(len(candidates)):
        probs, rejected = target_probs[request], rejected_probs[request]
        last, accepted, mass = 0, 0, 0.0
        accept_index[request, 0] = retrieve_index[request, 0]
        node = next_token[request, 0]
        while node >= 0 and accepted < max_accepted:
            token = candidates[request, node]
            prob = probs[last, token]
            mass += prob
            wins = coins[request, last] < mass / threshold_acc or prob >= threshold_single
            if prob > 0.0 and wins:
                # The accepted node's token follows the node accepted before it.
                predicts[retrieve_index[request, last]] = token
                accepted += 1
                accept_index[request, accepted] = retrieve_index[request, node]
                last, mass, node = node, 0.0, next_token[request, node]
            else:
                rejected[last, token] = prob
                node = next_sibling[request, node]
        accept_token_num[request] = accepted
        # If the path is full, `rejected` is 0 at its last node.
        final = _draw(probs[last], rejected[last], final_coins[request])
        predicts[retrieve_index[request, last]] = final


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """Return MurmurHash3 of (seed, position, column), hashed as four 32-bit blocks.

    Args:
        seed: [R] uint64.
        positions: [R] integer, of which the low 32 bits are used.
        col_indices: [C] integer, of which the low 32 bits are used.

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
    # int64 products wrap, but their low 32 bits, which are all that is kept, are exact.
    block = block * 0xCC9E2D51 & _MASK32
    block = (block << 15 | block >> 17) & _MASK32
    state = state ^ (block * 0x1B873593 & _MASK32)
    state = (state << 13 | state >> 19) & _MASK32
    return (state * 5 + 0xE6546B64) & _MASK32
