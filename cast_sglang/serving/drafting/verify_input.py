"""The verify input of a step's trees, made by SGLang's builder of masks and links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cast_sglang.serving.launch.backends import VERIFY_BACKENDS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

__all__ = ["build_verify_input", "numbers_by_row"]


def build_verify_input(
    batch: ScheduleBatch,
    parent_rows: torch.Tensor,
    draft_tokens: torch.Tensor,
    depth: int,
    *,
    topk: int,
    target_worker: Any,
    device: torch.device | str,
) -> EagleVerifyInput:
    """Return what SGLang verifies a step's trees by.

    Args:
        batch: the decode batch; its `EagleDraftInput` holds the roots' tokens.
        parent_rows, draft_tokens: [B, N - 1] int64, `tree.Selection`'s.
        depth: of the deepest node that may be accepted, which bounds the accepted path.
        topk: K.
    """
    from sglang.srt.speculative.eagle_utils import TreeMaskMode, default_tree_mask_mode
    from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

    # SGLang makes room for the longest context where it has no lengths on the host.
    backend = VERIFY_BACKENDS.get(target_worker.model_runner.decode_attention_backend_str)
    reads_mask = backend is None or backend.trees
    parent_list, numbers = numbers_by_row(parent_rows)
    num_rows = parent_rows.shape[1] + 1
    verify_input = build_eagle_verify_input(
        batch,
        batch.spec_info,
        parent_list,
        numbers,
        draft_tokens,
        None,
        target_worker=target_worker,
        topk=num_rows,
        num_steps=2,  # so that a list of parents has one entry for each row, and one more
        num_draft_tokens=num_rows,
        tree_mask_mode=default_tree_mask_mode() if reads_mask else TreeMaskMode.QLEN_ONLY,
        device=device,
    )
    verify_input.topk, verify_input.spec_steps = topk, depth
    return verify_input


def numbers_by_row(parent_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return trees in the numbering of SGLang's builder, as if each row had proposed N children.

    The builder takes candidate c for a child of the c // N-th node of its list. Node i of row p has
    number p * N + i here, and the list holds the number of each row.

    Args:
        parent_rows: [B, N - 1] int64, `tree.Selection`'s.

    Returns:
        parent_list [B, N + 1] int64 and top_scores_index [B, N - 1] int64. The list's last entry is
        no candidate; the nodes that hang nowhere are its children.
    """
    num_rows = parent_rows.shape[1] + 1
    rows = torch.arange(1, num_rows, device=parent_rows.device)
    parents = torch.where(parent_rows < 0, num_rows, parent_rows)
    numbers = parents * num_rows + rows
    return torch.nn.functional.pad(numbers, (1, 1), value=-1), numbers
