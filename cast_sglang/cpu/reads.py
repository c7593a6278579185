"""Which cache slots each new token of a forward reads, as padded indexes and a visibility mask.

Padding after a request's last slot comes from stale entries of `req_to_token`. These are always
valid slots with finite values, and the mask hides them, so they need no replacement.
"""

from dataclasses import dataclass, field

import torch

# Prefill over a cached prefix needs an explicit mask. Computing it in blocks of this many tokens
# bounds its size for long prompts.
PREFILL_BLOCK_TOKENS = 512


@dataclass
class BatchedRead:
    """What a forward reads that has the same number of new tokens in each request.

    Shapes: B requests, Q new tokens each, L slots read per request (padded).
    """

    slots: torch.Tensor
    """[B * L] int32 or int64, request-major."""

    visible: torch.Tensor | None
    """[B, Q, L] bool, or [B, 1, L] if a request's tokens see the same; None if they see all."""

    num_requests: int
    width: int
    length: int
    _biases: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def bias_for(self, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the additive bias [B, 1, group * Q, L], or [B, 1, 1, L], or None; it is cached.

        Args:
            group: number of query heads that share a KV head; the bias is repeated for each.
        """
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
    """What one request of a prefill reads: its slots, and the masks of its new tokens."""

    slots: torch.Tensor
    """[prefix + new]"""

    blocks: list[tuple[int, int, torch.Tensor | None]]
    """(start, stop, bias): rows start to stop of the batch's queries, and their additive bias
    [stop - start, slots seen]; None for plain causal attention over all slots."""


@dataclass
class DraftPrefix:
    """The committed prefix of each request. All layers and steps of a draft share it."""

    slots: torch.Tensor
    """[B, P] padded slots of the committed tokens."""

    visible: torch.Tensor
    """[B, P] bool, False on padding."""

    @classmethod
    def of(
        cls, req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor
    ) -> "DraftPrefix":
        """Look up the slots of each request's first `seq_lens` tokens.

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
    """Return the read of one new token per request, the last of its `seq_lens` tokens."""
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
    """Return the read of `width` new tokens after each request's prefix.

    Args:
        prefix_lens: [B] tokens before the window.
        window_visible: [B or 1, width, width] bool, which of the new tokens each of them sees.

    The new tokens have their own columns after the padded prefix, so one mask layout serves
    requests of any length.
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
    """Return the read of each request's last `width` of `seq_lens` tokens, with a causal mask."""
    causal = torch.ones(1, width, width, dtype=torch.bool).tril()
    return window_read(req_to_token, req_pool_indices, seq_lens - width, width, causal)


def verify_read(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    num_draft_tokens: int,
    custom_mask: torch.Tensor | None,
) -> BatchedRead:
    """Return the read of a draft tree after each request's `seq_lens` committed tokens.

    Args:
        custom_mask: flat bool, true where a row sees a column. In the layout QLEN_ONLY, B blocks
            of N x N; in FULL_MASK, for each request N rows of (seq_len + N). None for a chain.

    Raises:
        ValueError: a mask of neither size.
    """
    batch, width = seq_lens.shape[0], num_draft_tokens
    if width == 1:  # gives results bitwise equal to plain decoding
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
    """Return [B, N, N] int64, flat indexes of the tree cells in a FULL_MASK; see `verify_read`."""
    row_lens = seq_lens.long() + width
    ends = torch.cumsum(row_lens * width, dim=0)
    steps = torch.arange(width)
    first_row = ends - row_lens * width + seq_lens
    return (first_row.unsqueeze(1) + row_lens.unsqueeze(1) * steps).unsqueeze(2) + steps


def tree_decode_read(prefix: DraftPrefix, ancestor_slots: torch.Tensor) -> BatchedRead:
    """Return the read of one draft layer: W nodes per request, each with its own path.

    Definition: node w of request b sees the prefix of b and ancestor_slots[b, w, :], nothing else.

    Args:
        prefix: of the same B requests; gathered once per request, not once per node.
        ancestor_slots: [B, W, D] int64, the KV slots of the node's D draft ancestors, itself
            included. Both W and D may differ from one layer to the next.

    The B * W rows of the forward are request-major. A node also reads its own keys, so
    `forward_decode` writes `out_cache_loc` before it reads.
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
    """Return one read per request, each with `extend_lens` new tokens after its prefix."""
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
    """Join masks [B, P] of the prefix and [B or 1, width, C] of the window to [B, width, P + C]."""
    return torch.cat(
        (
            prefix.unsqueeze(1).expand(-1, width, -1),
            window.expand(batch, -1, -1),
        ),
        dim=2,
    )
