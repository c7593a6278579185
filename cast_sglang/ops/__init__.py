"""Tensor ops of a CAST step, in plain torch (`reference`), Triton (`fused`) and loops (`loops`).

All three modules define the same functions. `reference` documents them, and `contract` checks their
arguments.
"""

from types import ModuleType

import torch

__all__ = ["ops_for"]


def ops_for(device: torch.device | str) -> ModuleType:
    """Return the module whose ops run best on `device`: `fused` on a GPU, `loops` on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        from cast_sglang.ops import fused

        return fused
    if kind == "cpu":
        from cast_sglang.ops import loops

        return loops
    from cast_sglang.ops import reference

    return reference
