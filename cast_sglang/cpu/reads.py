"""What each new token of a forward reads: padded slot indexes and visibility, built once.

Slots past a request's length come from stale `req_to_token` entries: always inside the pool, always
finite, and hidden by the bias, so padding never needs a second index.
"""

from dataclasses import dataclass, field

import torch

# Prefill over a cached prefix needs an explicit mask; blocks bound its size for long prompts.
PREFILL_BLOCK_TOKENS = 512


@dataclass
class BatchedRead:
    """Slots and visibility of a forward with the same number of new tokens in each request.

    Shapes: B requests, Q new tokens each, L slots read per request (padded).
    """

    slots: torch.Tensor
    """[B * L] int32 or int64, request-major."""

    visible: torch.Tensor | None
    """[B, Q, L] bool, or [B, 1, L] when a request's tokens see the same; None when they see all."""

    num_requests: int
    width: int
    length: int
    _biases: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def bias_for(self, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive bias [B, 1, group * Q, L] (or [B, 1, 1, L]), repeated for each query group."""
        if self.visible is None:
            return None
        bias = self._biases.get((group, dtype))
        if bias is None:
            bias = torch.zeros(self.visible.shape, dtype=dtype)
            bias.masked_fill_(~self.visible, float("-inf"))
            bias = bias.unsqueeze(1)
            if bias.shape[2] > 1:
                bias = bias.repeat(1, 1, group, 1)
            self._biases[group, dtype] = bias
        return bias


@dataclass
class PrefillRead:
    """One request of a prefill: the slots of its whole sequence and the mask of its new tokens."""

    slots: torch.Tensor
    """[prefix + new]"""

    blocks: list[tuple[int, int, torch.Tensor | None]]
    """(start, stop, bias): rows of the batch's queries, and the additive bias
    [stop - start, slots seen] they need; None means plain causal over all slots."""


@dataclass
class DraftPrefix:
    """The committed prefix of each request, shared by all layers and steps of one draft."""

    slots: torch.Tensor
    """[B, P] padded slots of the committed tokens."""

    visible: torch.Tensor
    """[B, P] bool, False on padding."""

    @classmethod
    def of(
        cls, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor
    ) -> "DraftPrefix":
        """Read the slots of `seq_lens` committed tokens of each request.

        Args:
            req_to_token: [pool size, max context] int32.
            req_pool_indices: [B] rows of `req_to_token`.
            seq_lens: [B] tokens committed before the draft.
        """
        length = int(seq_lens.max())
        slots = req_to_token[:, :length].index_select(0, req_pool_indices)
        return cls(slots=slots, visible=torch.arange(length) < seq_lens.unsqueeze(1))


def decode_read(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor
) -> BatchedRead:
    """One new token per request, the last of `seq_lens`."""
    prefix = DraftPrefix.of(req_to_token, req_pool_indices, seq_lens)
    batch, length = prefix.slots.shape
    # A single request has no padding.
    visible = prefix.visible.unsqueeze(1) if batch > 1 else None
    return BatchedRead(prefix.slots.flatten(), visible, batch, 1, length)


def window_read(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    width: int,
    window_visible: torch.Tensor,
) -> BatchedRead:
    """`width` new tokens after each request's prefix, in the slots that follow it.

    Args:
        prefix_lens: [B] tokens before the window.
        window_visible: [B or 1, width, width] bool; which tokens of the window each one sees.

    The window keeps its own columns behind the padded prefix, so one mask layout serves requests
    of any length.
    """
    prefix = DraftPrefix.of(req_to_token, req_pool_indices, prefix_lens)
    batch = prefix_lens.shape[0]
    positions = prefix_lens.unsqueeze(1) + torch.arange(width)
    window = req_to_token[req_pool_indices.unsqueeze(1), positions]
    return BatchedRead(
        slots=torch.cat((prefix.slots, window), dim=1).flatten(),
        visible=join_visible(prefix.visible, window_visible, batch, width),
        num_requests=batch,
        width=width,
        length=prefix.slots.shape[1] + width,
    )


def causal_read(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor, width: int
) -> BatchedRead:
    """The last `width` of each request's `seq_lens` tokens are new and see what precedes them."""
    causal = torch.ones(1, width, width, dtype=torch.bool).tril()
    return window_read(req_to_token, req_pool_indices, seq_lens - width, width, causal)


def verify_read(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    num_draft_tokens: int,
    custom_mask: torch.Tensor | None,
) -> BatchedRead:
    """A draft tree after each request's `seq_lens` committed tokens.

    Args:
        custom_mask: flat bool; QLEN_ONLY, B blocks of N x N (row sees column), or FULL_MASK, for
            each request N rows of (seq_len + N). None is a chain.

    Raises:
        ValueError: a mask of neither size.
    """
    batch, width = seq_lens.shape[0], num_draft_tokens
    if width == 1:  # as in plain decoding, to the bit
        return decode_read(req_to_token, req_pool_indices, seq_lens + 1)
    if custom_mask is None:
        tree = torch.ones(1, width, width, dtype=torch.bool).tril()
    elif custom_mask.numel() == batch * width * width:
        tree = custom_mask.view(batch, width, width)
    elif custom_mask.numel() >= width * int(seq_lens.sum()) + batch * width * width:
        tree = custom_mask[full_mask_cells(seq_lens, width)]
    else:
        raise ValueError(
            f"verify mask has {custom_mask.numel()} cells; {batch} trees of {width} nodes need "
            f"{batch * width * width} without their prefixes"
        )
    return window_read(req_to_token, req_pool_indices, seq_lens, width, tree)


def full_mask_cells(seq_lens: torch.Tensor, width: int) -> torch.Tensor:
    """[B, N, N] flat positions of the tree cells in a FULL_MASK of N rows of (seq_len + N) each."""
    row_lens = seq_lens.long() + width
    ends = torch.cumsum(row_lens * width, dim=0)
    steps = torch.arange(width)
    first_row = ends - row_lens * width + seq_lens
    return (first_row.unsqueeze(1) + row_lens.unsqueeze(1) * steps).unsqueeze(2) + steps


def tree_decode_read(prefix: DraftPrefix, ancestor_slots: torch.Tensor) -> BatchedRead:
    """One draft layer: W nodes per request, each seeing the prefix and its own path.

    Definition: node w of request b reads prefix slots of b and ancestor_slots[b, w, :], no other.

    Args:
        prefix: of the same B requests; gathered once per request, not once per node.
        ancestor_slots: [B, W, D] int64, the KV slots of the node's D draft ancestors, itself
            included. Both W and D may differ from one layer to the next.

    The B * W rows of the forward are request-major. Each node's keys must be in its own slot by the
    time it reads, which `forward_decode` ensures by writing `out_cache_loc` first.
    """
    batch, width, depth = ancestor_slots.shape
    own = torch.eye(width, dtype=torch.bool).repeat_interleave(depth, dim=1).unsqueeze(0)
    return BatchedRead(
        slots=torch.cat((prefix.slots, ancestor_slots.reshape(batch, -1)), dim=1).flatten(),
        visible=join_visible(prefix.visible, own, batch, width),
        num_requests=batch,
        width=width,
        length=prefix.slots.shape[1] + width * depth,
    )


def prefill_reads(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    dtype: torch.dtype,
) -> list[PrefillRead]:
    """Requests of different lengths, each with `extend_lens` new tokens after its prefix."""
    reads = []
    start = 0
    for row, prefix, extend in zip(
        req_pool_indices.tolist(), prefix_lens.tolist(), extend_lens.tolist(), strict=True
    ):
        slots = req_to_token[row, : prefix + extend]
        blocks: list[tuple[int, int, torch.Tensor | None]] = []
        if prefix == 0:
            blocks.append((start, start + extend, None))
        else:
            for first in range(0, extend, PREFILL_BLOCK_TOKENS):
                last = min(first + PREFILL_BLOCK_TOKENS, extend)
                bias = torch.full((last - first, prefix + last), float("-inf"), dtype=dtype)
                blocks.append((start + first, start + last, bias.triu_(prefix + first + 1)))
        if extend:
            reads.append(PrefillRead(slots, blocks))
        start += extend
    return reads


def join_visible(
    prefix: torch.Tensor, window: torch.Tensor, batch: int, width: int
) -> torch.Tensor:
    """[B, width, P + C] from the prefix's [B, P] and the window's [B or 1, width, C]."""
    return torch.cat(
        (
            prefix.unsqueeze(1).expand(-1, width, -1),
            window.expand(batch, -1, -1),
        ),
        dim=2,
    )
