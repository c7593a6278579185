"""Weights that change or go while a server runs.

The target's and the draft's checkpoints are kept apart. When memory is released and resumed, the
draft's buffers come back as the target's do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.runtime_context import get_exec, get_model

from cast_sglang.errors import HostError
from cast_sglang.serving.launch.identity import read_config

__all__ = [
    "release_draft",
    "resume_draft",
    "update_draft_from_disk",
    "why_not",
    "with_rollback",
]

# What a checkpoint must have in common with the one whose weights it replaces.
_SHAPE_KEYS = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "draft_vocab_size",
)

# What the draft's buffers held when its memory was released.
_kept_buffers: list[torch.Tensor] = []

logger = logging.getLogger(__name__)


def why_not(path: str, served: Any) -> str | None:
    """Return why a checkpoint cannot replace the served weights; None if it can.

    SGLang finds that out in the middle of loading, and then loads the same files again to undo it,
    which ends the server.

    Args:
        served: Hugging Face config of the model that is served.
    """
    try:
        new = read_config(path, None, get_model().trust_remote_code)
    except HostError as error:
        return str(error)
    for key in _SHAPE_KEYS:
        theirs, ours = getattr(new, key, None), getattr(served, key, None)
        if theirs != ours:
            return f"{path} does not fit what is served: its {key} is {theirs}, not {ours}"
    return None


def update_draft_from_disk(
    draft_worker: Any, target: Any, path: str, load_format: str
) -> tuple[bool, str]:
    """Load the draft's weights from another checkpoint of the same shape.

    Args:
        target: the target's model, whose embedding the draft reads, and whose head where it brings
            none.

    Returns:
        Whether it succeeded, and a message.
    """
    runner = draft_worker.draft_runner
    shared = {weight.data_ptr() for weight in target.parameters()}
    has_head = runner.model.lm_head.weight.data_ptr() not in shared

    def is_own(name: str) -> bool:
        return "embed_tokens" not in name and (has_head or "lm_head" not in name)

    success, message = runner.weight_updater.update_weights_from_disk(
        path, load_format, weight_name_filter=is_own
    )
    hot_tokens = getattr(runner.model, "hot_token_id", None)
    if success and hot_tokens is not None:
        draft_worker.hot_token_id.copy_(hot_tokens)  # in place, for captured graphs
    return success, message


def with_rollback(
    model_config: Any, path: str, update: Callable[[str], tuple[bool, str]]
) -> tuple[bool, str]:
    """Update a model from a path; where loading fails, load again what was served before.

    Args:
        model_config: SGLang's, of the model; its path stays that of the weights in use.
        update: loads from a path; returns whether it succeeded, and a message.
    """
    served = model_config.model_path
    try:
        success, message = update(path)
    # SGLang's own rollback reads the damaged files again and raises what they raise.
    except Exception as error:
        logger.exception("CAST: loading weights from %s failed", path)
        update(served)
        return False, f"{path} cannot be loaded, the weights are those of before: {error}"
    if not success:
        model_config.model_path = served
    return success, message


def release_draft(manager: Any, tags: Sequence[str] | None) -> None:
    """Keep the draft's buffers, such as a rotary table, which no checkpoint holds.

    SGLang keeps those of the target alone while its memory is released.

    Args:
        manager: SGLang's, of weights.
        tags: what is released; None for all.
    """
    if not tags or GPU_MEMORY_TYPE_WEIGHTS in tags:
        _kept_buffers[:] = [buffer.detach().clone() for buffer in _draft_buffers(manager)]


def resume_draft(manager: Any, tags: Sequence[str] | None) -> None:
    """Put the draft's buffers back; say so if its weights are lost. Arguments as before."""
    if tags and GPU_MEMORY_TYPE_WEIGHTS not in tags:
        return
    with torch.inference_mode():
        for buffer, content in zip(_draft_buffers(manager), _kept_buffers, strict=True):
            buffer.copy_(content)
    _kept_buffers.clear()
    if manager.draft_worker.calibration is not None:
        manager.draft_worker.calibration.last_change = "the weights were released and resumed"
    features = get_exec().features
    has_backup = features.enable_weights_cpu_backup or features.enable_draft_weights_cpu_backup
    has_draft = bool(manager.draft_worker.draft_worker.draft_runners)
    if has_draft and manager.memory_saver_adapter.enabled and not has_backup:
        logger.warning(
            "CAST: the draft's weights were released without a copy, so its drafts are of no use "
            "until /update_weights_from_disk gets its path; --enable-draft-weights-cpu-backup "
            "keeps a copy"
        )


def _draft_buffers(manager: Any) -> list[torch.Tensor]:
    runners = manager.draft_worker.draft_worker.draft_runners
    return [buffer for runner in runners for buffer in runner.model.buffers()]
