"""Tensor ops of a CAST step, each in plain torch (`reference`) and in Triton (`fused`).

Both modules hold the same names with the same signatures, and `reference` says what they mean. What
both take, return and refuse is in `contract`.
"""

from types import ModuleType

import torch

__all__ = ["ops_for"]


def ops_for(device: torch.device | str) -> ModuleType:
    """Return the module whose ops run best on `device`: `fused` on a GPU, else `reference`."""
    if torch.device(device).type == "cuda":
        from cast_sglang.ops import fused

        return fused
    from cast_sglang.ops import reference

    return reference
