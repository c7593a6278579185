"""CPU versions of SGLang's Triton and CUDA helpers for speculative decoding.

Each has the signature of the SGLang function that it replaces, and handles the whole batch.
"""

import numpy as np
import torch
from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode

from cast_sglang.cpu.reads import full_mask_cells
from cast_sglang.ops import loops
from cast_sglang.ops.compiled import compiled

Tensor = torch.Tensor


def build_tree(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: TreeMaskMode,
) -> None:
    """Link the selected candidates of each request into a tree below its bonus token.

    Definition: `ops.reference.build_tree`, with the mask in the layout that SGLang asks for. Node
    i > 0 is candidate top_scores_index[b, i - 1] = c. Its parent is the root if c // topk is 0,
    else the node of candidate parent_list[b, c // topk]; without that it hangs nowhere.

    Args:
        parent_list: [B, P] int64; may be empty where only the root's children were drafted.
        top_scores_index: [B, N - 1] int64.
        spec_steps: one less than the most layers; not read, as the tree itself shows its depth.

    Effects: writes tree_mask (QLEN_ONLY or FULL_MASK layout; prefix cells stay as they are),
        positions [B * N] and the [B, N] retrieve_* links.

    Raises:
        NotImplementedError: bit-packed mask.
    """
    if tree_mask_mode not in (TreeMaskMode.QLEN_ONLY, TreeMaskMode.FULL_MASK):
        raise NotImplementedError(f"SGLANG_PLATFORM=cast_cpu has no {tree_mask_mode!r} tree mask")
    batch, width = seq_lens.shape[0], num_verify_tokens
    is_full = tree_mask_mode == TreeMaskMode.FULL_MASK
    sees = tree_mask
    if is_full:  # the mask of `triton` is one of bytes
        sees = tree_mask.new_empty(batch * width * width, dtype=torch.bool)
    parent_rows = torch.empty_like(top_scores_index)
    _find_parents(parent_list.numpy(), top_scores_index.numpy(), topk, parent_rows.numpy())
    loops.build_tree(
        parent_rows,
        seq_lens,
        sees,
        positions,
        retrieve_index,
        retrieve_next_token,
        retrieve_next_sibling,
        num_steps=width - 1,
    )
    if is_full:
        cells = sees.view(batch, width, width).to(tree_mask.dtype)
        tree_mask[full_mask_cells(seq_lens, width)] = cells


@compiled("void(i8[:, :], i8[:, :], i8, i8[:, :])")
def _find_parents(
    parent_list: np.ndarray, top_scores_index: np.ndarray, topk: int, parent_rows: np.ndarray
) -> None:
    for request in range(len(top_scores_index)):
        numbers = top_scores_index[request]
        for node in range(len(numbers)):
            proposer = numbers[node] // topk
            parent_rows[request, node] = -1 if proposer else 0
            if proposer and proposer < parent_list.shape[1]:
                above = parent_list[request, proposer]
                for place in range(node):
                    if numbers[place] == above:
                        parent_rows[request, node] = place + 1


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's argmax down each request's tree.

    Definition: from the root, move to the first child whose token is the target's prediction at the
    current node, until there is none.

    Args:
        predicts: [B * N] int32, written at accepted nodes: the token that follows the node.
        accept_index: [B, S] int32, filled with -1; written: b * N + node of the accepted nodes.
        accept_token_num: [B] int32, written: accepted drafts, the root not counted.
        candidates: [B, N] int64, or int32 if N is 1: the tokens of the nodes.
        target_predict: [B, N] int64, the target's most probable token after each node.
        topk: not used; part of SGLang's signature.

    Returns:
        predicts, accept_index, accept_token_num.
    """
    _follow(
        candidates.to(torch.int64).numpy(),
        target_predict.numpy(),
        retrieve_index.numpy(),
        retrieve_next_token.numpy(),
        retrieve_next_sibling.numpy(),
        accept_index.numpy(),
        accept_token_num.numpy(),
    )
    # Written for all nodes, which is simpler; SGLang reads the entries of accepted nodes only.
    predicts.copy_(target_predict.flatten())
    return predicts, accept_index, accept_token_num


@compiled("void(i8[:, :], i8[:, :], i8[:, :], i8[:, :], i8[:, :], i4[:, :], i4[:])")
def _follow(
    candidates: np.ndarray,
    target_predict: np.ndarray,
    retrieve_index: np.ndarray,
    retrieve_next_token: np.ndarray,
    retrieve_next_sibling: np.ndarray,
    accept_index: np.ndarray,
    accept_token_num: np.ndarray,
) -> None:
    for request in range(len(candidates)):
        last, accepted = 0, 0
        accept_index[request, 0] = retrieve_index[request, 0]
        node = retrieve_next_token[request, 0]
        while node >= 0 and accepted < accept_index.shape[1] - 1:
            if candidates[request, node] == target_predict[request, last]:
                accepted += 1
                accept_index[request, accepted] = retrieve_index[request, node]
                last, node = node, retrieve_next_token[request, node]
            else:
                node = retrieve_next_sibling[request, node]
        accept_token_num[request] = accepted


def assign_draft_cache_locs(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Write the `topk * num_cols` slots after each request's `seq_lens` to `out_cache_loc`."""
    if positions is not None or mrope is not None:
        raise NotImplementedError("SGLANG_PLATFORM=cast_cpu writes no draft positions here")
    out_cache_loc.copy_(
        slots_after(req_to_token, req_pool_indices, seq_lens, topk * num_cols).flatten()
    )


def assign_extend_cache_locs(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: str | torch.device,
) -> Tensor:
    """Return [B * draft_token_num] int64, the slots of positions start_offset up to end_offset.

    Every request must have `draft_token_num` of them, as in all of SGLang's calls.
    """
    return slots_after(req_to_token, req_pool_indices, start_offset, draft_token_num).flatten()


def slots_after(
    req_to_token: Tensor, req_pool_indices: Tensor, start: Tensor, count: int
) -> Tensor:
    """Return [B, count] int64, the slots of each request's positions start, start + 1, ...

    Raises:
        IndexError: a position is beyond the end of a row, where another request's slots are.
    """
    slots = np.empty((len(req_pool_indices), count), np.int64)
    rows, first = req_pool_indices.to(torch.int64).numpy(), start.to(torch.int64).numpy()
    _check_end(int(first.max(initial=0)) + count, req_to_token)
    _read_slots(req_to_token.numpy(), rows, first, slots)
    return torch.from_numpy(slots)


@compiled("void(i4[:, :], i8[:], i8[:], i8[:, :])")
def _read_slots(
    req_to_token: np.ndarray, rows: np.ndarray, start: np.ndarray, slots: np.ndarray
) -> None:
    for request in range(len(rows)):
        for column in range(slots.shape[1]):
            slots[request, column] = req_to_token[rows[request], start[request] + column]


def assign_req_to_token(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Record newly allocated slots as positions start_offset up to end_offset of each request.

    Args:
        out_cache_loc: [sum(end_offset - start_offset)] slots, request after request.

    Raises:
        IndexError: a position is beyond the end of a row, where another request's slots are.
    """
    _check_end(int(end_offset.max()), req_to_token)
    _write_slots(
        req_pool_indices.to(torch.int64).numpy(),
        start_offset.to(torch.int64).numpy(),
        end_offset.to(torch.int64).numpy(),
        out_cache_loc.to(torch.int64).numpy(),
        req_to_token.numpy(),
    )


def _check_end(end: int, req_to_token: Tensor) -> None:
    """Refuse positions beyond a row of the table, since compiled loops check no bounds."""
    if end > req_to_token.shape[1]:
        raise IndexError(
            f"position {end - 1} of a request, whose row of req_to_token has "
            f"{req_to_token.shape[1]}"
        )


@compiled("void(i8[:], i8[:], i8[:], i8[:], i4[:, :])")
def _write_slots(
    rows: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    slots: np.ndarray,
    req_to_token: np.ndarray,
) -> None:
    index = 0
    for request in range(len(rows)):
        for column in range(start[request], end[request]):
            req_to_token[rows[request], column] = slots[index]
            index += 1


def get_last_loc(
    req_to_token: Tensor, req_pool_indices_tensor: Tensor, prefix_lens_tensor: Tensor
) -> Tensor:
    """Return the slot of each request's last token, -1 for one without tokens.

    A request goes on in the page of that slot.

    Args:
        req_to_token: [slots, tokens] int32.
        req_pool_indices_tensor, prefix_lens_tensor: [B] int.

    Returns:
        [B], dtype of `prefix_lens_tensor`.
    """
    last = req_to_token[req_pool_indices_tensor, (prefix_lens_tensor - 1).clamp(min=0)].to(
        prefix_lens_tensor.dtype
    )
    return torch.where(prefix_lens_tensor > 0, last, -1)


def fill_bonus_tokens(
    accept_tokens: Tensor,
    accept_lens: Tensor,
    bonus_tokens: Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Write each request's last accepted token, from rows of `accept_stride` tokens."""
    last = (accept_lens - 1).long().unsqueeze(1)
    bonus_tokens.copy_(accept_tokens.view(batch_size, accept_stride).gather(1, last).squeeze(1))


def fill_front_cache_locs(
    num_front: Tensor, out_cache_loc: Tensor, front_out_cache_loc: Tensor
) -> None:
    """Pack the first `num_front[b]` slots of each request; later cells keep their values."""
    window = out_cache_loc.view(num_front.shape[0], -1)
    front = window[torch.arange(window.shape[1]) < num_front.unsqueeze(1)]
    front_out_cache_loc[: front.shape[0]] = front


def fill_accepted_cache_locs(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor, size: int
) -> None:
    """Pack the slots of the accepted nodes, in order; later cells keep their values."""
    flat = accept_index.flatten()
    accepted = out_cache_loc[flat[flat >= 0].long()]
    accept_out_cache_loc[: accepted.shape[0]] = accepted


def compute_position(extend_prefix_lens: Tensor, extend_seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of all new tokens, request after request, and each request's start.

    Definition: positions = concat(range(prefix, prefix + new) for each request).
    """
    ends = torch.cumsum(extend_seq_lens, dim=0)
    starts = ends - extend_seq_lens
    offsets = torch.repeat_interleave(extend_prefix_lens - starts, extend_seq_lens)
    return torch.arange(offsets.shape[0]) + offsets, starts.to(extend_seq_lens.dtype)
