"""Replace the Triton and CUDA helpers of SGLang by the platform's torch implementations.

`install` runs once per model process, when SGLang initialises the platform, and only if
`SGLANG_PLATFORM=cast_cpu`.
"""

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.speculative.draft_utils import DraftBackendFactory

from cast_sglang.cpu import kernels, sampling
from cast_sglang.cpu.adapters import UNPINNED, without_pinning
from cast_sglang.cpu.attention import CastCpuAttnBackend, CastCpuMultiStepDraftBackend
from cast_sglang.cpu.layers import register_layers
from cast_sglang.cpu.names import ATTENTION_BACKEND, PLATFORM_NAME

_OPS = "sglang.kernels.ops"

# SGLang chooses these by device and has no branch for an out-of-tree platform.
REPLACED: dict[str, Callable[..., Any]] = {
    f"{_OPS}.speculative.spec_tree.build_tree_kernel_efficient_func": kernels.build_tree,
    f"{_OPS}.speculative.spec_tree.verify_tree_greedy_func": kernels.verify_tree_greedy,
    f"{_OPS}.speculative.cache_locs.assign_draft_cache_locs_contiguous_func": (
        kernels.assign_draft_cache_locs
    ),
    f"{_OPS}.speculative.cache_locs.fill_front_out_cache_loc_func": kernels.fill_front_cache_locs,
    f"{_OPS}.speculative.eagle.fill_bonus_tokens_func": kernels.fill_bonus_tokens,
    f"{_OPS}.speculative.eagle.fill_accept_out_cache_loc_func": kernels.fill_accepted_cache_locs,
    f"{_OPS}.sampling.murmur_hash.murmur_hash32": sampling.murmur_hash32,
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": kernels.assign_req_to_token,
    "sglang.srt.mem_cache.allocation.get_last_loc": kernels.get_last_loc,
    # SGLang's version loops over the requests in every draft extend, which is slow.
    "sglang.srt.model_executor.forward_batch_info.compute_position_torch": kernels.compute_position,
}

# Where SGLang has no kernel, these names are None, so they cannot be hooked.
FILLED: dict[str, tuple[str, Callable[..., Any]]] = {
    "top_k_renorm_prob": (f"{_OPS}.sampling.renorm", sampling.top_k_renorm),
    "top_p_renorm_prob": (f"{_OPS}.sampling.renorm", sampling.top_p_renorm),
    "tree_speculative_sampling_target_only": (
        f"{_OPS}.speculative.verify_sampling",
        sampling.tree_speculative_sampling,
    ),
}


class CastCpuDraftBackendFactory(DraftBackendFactory):
    """SGLang's factory of draft backends, with `cast_cpu` added to its table."""

    def _create_backend(
        self,
        backend_name: str,
        backend_map: dict[str, Callable[[], tuple[str, Any]]],
        error_template: str,
        stamps_children: bool = False,
    ) -> Any:
        create = self._create_multi_step if stamps_children else self._create_single
        return super()._create_backend(
            backend_name, backend_map | {ATTENTION_BACKEND: create}, error_template, stamps_children
        )

    def _create_multi_step(self) -> tuple[str, CastCpuMultiStepDraftBackend]:
        backend = CastCpuMultiStepDraftBackend(
            self.draft_model_runner, self.topk, self.speculative_num_steps
        )
        return ATTENTION_BACKEND, backend

    def _create_single(self) -> tuple[str, CastCpuAttnBackend]:
        return ATTENTION_BACKEND, CastCpuAttnBackend(self.draft_model_runner)


def install() -> None:
    """Register the attention backend and replace SGLang's device-only helpers."""
    register_attention_backend(ATTENTION_BACKEND)(CastCpuAttnBackend)
    register_layers(PLATFORM_NAME)
    for target, replacement in REPLACED.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)
    for target in UNPINNED:
        HookRegistry.register(target, without_pinning, HookType.AROUND)
    HookRegistry.register("torch.get_device_module", device_module, HookType.AROUND)
    HookRegistry.register(
        f"{DraftBackendFactory.__module__}.{DraftBackendFactory.__qualname__}",
        CastCpuDraftBackendFactory,
        HookType.REPLACE,
    )
    # SGLang logs a line for each replacement, which tells an operator nothing.
    hook_logger = logging.getLogger(HookRegistry.__module__)
    level = hook_logger.level
    hook_logger.setLevel(logging.WARNING)
    HookRegistry.apply_hooks()
    hook_logger.setLevel(level)
    for name, (home, implementation) in FILLED.items():
        fill_missing(name, import_module(home), implementation)
    torch.set_grad_enabled(False)


def device_module(original: Callable[..., Any], device: Any = None) -> Any:
    """Return torch's module of a device, by default of the CPU.

    A torch that is built for GPUs takes one for the default, and SGLang waits for that when memory
    is released.
    """
    return original("cpu" if device is None else device)


def fill_missing(name: str, home: Any, implementation: Callable[..., Any]) -> None:
    """Bind `name` in its home module and in the modules that imported it while it was None."""
    setattr(home, name, implementation)
    for path, module in list(sys.modules.items()):
        if path.startswith("sglang.") and vars(module).get(name, home) is None:
            setattr(module, name, implementation)
