"""The loss of an output head against a few likely tokens, with its gradient in the same pass.

Logits of a vocabulary are by far the largest tensor of a draft's training, and ordinary autograd
passes over it some twenty times. Here each block of rows is read while it is in the cache.
"""

from typing import NamedTuple

import torch

BLOCK_ROWS = 64  # of 16,384 float32 logits: 4 MB


class HeadLoss(NamedTuple):
    """What a head's logits are worth."""

    total: torch.Tensor  # [], weighted sum of the rows' losses; carries the gradient
    losses: torch.Tensor  # [N] float32, cross-entropy of each row in nats
    is_same: torch.Tensor  # [N] bool, whether the head puts the target's likeliest token first


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    indices: torch.Tensor,
    probs: torch.Tensor,
    weights: torch.Tensor,
) -> HeadLoss:
    """Return the cross-entropy of `hidden @ head.T` against a distribution over a few tokens.

    The same as `(weights * (logsumexp(logits) - (probs * logits[indices]).sum())).sum()`.

    Args:
        hidden: [N, H] bfloat16 or float32.
        head: [V, H], of the same dtype.
        indices: [N, K] int64, into V, the likeliest first.
        probs: [N, K] float32, of sum 1.
        weights: [N] float32 of the rows in the sum.
    """
    return HeadLoss(*_HeadLoss.apply(hidden, head, indices, probs, weights))


class _HeadLoss(torch.autograd.Function):
    """See `head_loss`."""

    @staticmethod
    def forward(ctx, hidden, head, indices, probs, weights):
        num_rows = len(hidden)
        needs_grad = any(ctx.needs_input_grad[:2])
        losses = torch.empty(num_rows)
        is_same = torch.empty(num_rows, dtype=torch.bool)
        # The gradient of the total by the logits.
        slopes = hidden.new_empty(num_rows, len(head)) if needs_grad else None
        for first in range(0, num_rows, BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            logits = (hidden[rows] @ head.T).float()
            expected = logits.gather(1, indices[rows])
            most = logits.amax(1, keepdim=True)
            is_same[rows] = expected[:, 0] >= most[:, 0]
            odds = logits.sub_(most).exp_()
            sums = odds.sum(1, keepdim=True)
            losses[rows] = (most + sums.log())[:, 0] - (probs[rows] * expected).sum(1)
            if slopes is not None:
                share = weights[rows, None]
                odds.mul_(share / sums)
                odds.scatter_add_(1, indices[rows], -share * probs[rows])
                slopes[rows] = odds
        if slopes is not None:
            of_head = slopes.T @ hidden if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(slopes @ head, of_head)
        ctx.mark_non_differentiable(losses, is_same)
        return (weights * losses).sum(), losses, is_same

    @staticmethod
    def backward(ctx, slope, *unused):
        of_hidden, of_head = ctx.saved_tensors
        return slope * of_hidden, None if of_head is None else slope * of_head, None, None, None
