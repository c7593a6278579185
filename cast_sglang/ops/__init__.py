"""Tensor ops of a CAST step, in plain torch (`reference`), Triton (`fused`) and loops (`loops`).

All three modules define the same functions. `reference` documents them, and `contract` checks their
arguments.
"""

from importlib import import_module
from types import ModuleType

import torch

__all__ = ["implementation_for", "ops_for"]

_NAMES = {"cuda": "fused", "cpu": "loops"}


def ops_for(device: torch.device | str) -> ModuleType:
    """Return the module whose ops run best on `device`: `fused` on a GPU, `loops` on the CPU."""
    return implementation_for(__name__, device)


def implementation_for(package: str, device: torch.device | str) -> ModuleType:
    """Return the module of a package of ops that runs best on `device`; imports no other."""
    return import_module(f"{package}.{_NAMES.get(torch.device(device).type, 'reference')}")
