"""LoRA adapters on the CPU: SGLang pins memory for copies to a device, and here is none.

Without a device torch cannot pin memory and says so with an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["UNPINNED", "without_pinning"]

# What pins memory without asking the platform whether it can.
UNPINNED = tuple(
    f"sglang.srt.lora.lora_manager.LoRAManager.{method}"
    for method in (
        "__init__",
        "load_lora_adapter",
        "load_lora_adapter_from_tensors",
        "prepare_lora_batch",
    )
)


class _Unpinned(TorchFunctionMode):
    """Leaves memory as it is where it is to be pinned."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "pin_memory"})


def without_pinning(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of SGLang; what it pins stays pageable."""
    with _Unpinned():
        return original(*args, **kwargs)
