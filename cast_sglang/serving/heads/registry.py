"""The heads of this package, made known to SGLang."""

from __future__ import annotations

from typing import Any

__all__ = ["one_pass_depth", "register_heads"]


def register_heads() -> None:
    """Make SGLang load checkpoints that name a class of this package in `architectures`.

    Call it in every process before SGLang looks for the class of a draft; again does nothing.

    Effects: imports SGLang's models, as loading one does.
    """
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.register(__package__, overwrite=True, strict=True)


def one_pass_depth(draft_config: Any) -> int | None:
    """Return how many tokens ahead a head drafts in one pass; None for one that drafts by steps.

    Args:
        draft_config: its Hugging Face config.
    """
    depth = getattr(draft_config, "one_pass_depth", None)
    return None if depth is None else int(depth)
