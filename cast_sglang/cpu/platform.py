"""The `cast_cpu` platform, an out-of-tree SGLang platform that serves on the CPU in plain torch.

SGLang finds `activate` through the entry-point group `sglang.srt.platforms`, in every process and
before arguments are parsed. The platform is selected only if `SGLANG_PLATFORM=cast_cpu`; it changes
nothing in other processes that have this package installed.
"""

import glob
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from cast_sglang.cpu.names import ATTENTION_BACKEND, LORA_BACKEND, PLATFORM_NAME
from cast_sglang.errors import HostError

logger = logging.getLogger(__name__)

# Without these limits, SGLang would give a tiny model most of the host's memory as KV slots that it
# can never use.
MAX_TOTAL_TOKENS = 131_072
MAX_RUNNING_REQUESTS = 48

SPECULATIVE_ALGORITHMS = ("EAGLE", "EAGLE3", "STANDALONE", "CAST")


def activate() -> str | None:
    """Return the name of the platform class if `SGLANG_PLATFORM` selects it, else None.

    The check is needed because SGLang activates all platforms that it finds if the variable is
    unset.

    Effects: sets environment variables that the CPU platform needs.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    if glob.glob("/dev/nvidia[0-9]*"):
        logger.warning(
            "SGLANG_PLATFORM=%s serves on the CPU; the GPUs of this host are hidden from SGLang. "
            "Unset SGLANG_PLATFORM to use them.",
            PLATFORM_NAME,
        )
        # SGLang picks CUDA-only modules whenever torch sees a GPU, whatever --device says.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Idle OpenMP workers must not spin, because other processes of the engine need the same cores.
    # The processes that SGLang spawns to run the models read these variables.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # SGLang compiles a few pointwise helpers with torch.compile; on a CPU the first call of each
    # would take seconds and need a C++ compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Every pass reads all weights. With 4 KiB pages it spends a sixth of its time on page tables.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return f"{__name__}:CastCpuPlatform"


class CastCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU serving without AMX or sgl_kernel: torch attention, torch speculative helpers."""

    _enum = PlatformEnum.OOT
    device_name = PLATFORM_NAME
    device_type = "cpu"

    def __init__(self) -> None:
        register_attention_choice()
        register_resolution_hook("handle_cpu_backends")(resolve_cpu_backends)

    def get_device(self, device_id: int = 0) -> str:
        # Without an index, because SGLang stores this as the value of --device.
        return self.device_type

    def apply_server_args_defaults(self, server_args: Any) -> None:
        server_args.device = "cpu"
        if server_args.speculative_use_rejection_sampling:
            raise HostError(
                "--speculative-use-rejection-sampling needs a GPU kernel; without it, "
                f"SGLANG_PLATFORM={PLATFORM_NAME} samples along the draft tree exactly as well"
            )
        if not server_args.disable_overlap_schedule:
            # Kernels run on the calling thread, so overlap would only delay results by one step.
            logger.info("SGLANG_PLATFORM=%s schedules without overlap", PLATFORM_NAME)
            server_args.disable_overlap_schedule = True
        # Otherwise an idle scheduler polls without pause and keeps a core busy.
        server_args.sleep_on_idle = True
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = MAX_TOTAL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        share_cores(server_args.tp_size * server_args.pp_size * server_args.dp_size)

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in SPECULATIVE_ALGORITHMS

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        if kind != "mha":
            return None
        from cast_sglang.cpu.kv_pool import FusedRowKVPool

        return FusedRowKVPool

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        from cast_sglang.cpu.kernels import assign_extend_cache_locs

        return assign_extend_cache_locs

    def get_torch_profiler_activity_str(self) -> str:
        # `/start_profile` requires this of an out-of-tree platform.
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_dispatch_key_name(self) -> str:
        return PLATFORM_NAME

    def init_backend(self) -> None:
        """Install the attention backend and the torch helpers; runs once in each model process."""
        from cast_sglang.cpu.install import install

        install()


def register_attention_choice() -> None:
    """Add `cast_cpu` to the choices of `--attention-backend`, before arguments are parsed."""
    from sglang.srt.arg_groups import choices

    if ATTENTION_BACKEND not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([ATTENTION_BACKEND])
        choices.add_draft_attention_backend_choices([ATTENTION_BACKEND])


def resolve_cpu_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Choose this platform's backends; SGLang would choose those of an AMX build."""
    # Imported here, because it needs the platform object, which is built after this module loads.
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    config = resolving_view(server_args)
    fields = {"sampling_backend": "pytorch", "lora_backend": LORA_BACKEND}
    if config.attention_backend is None:
        fields["attention_backend"] = ATTENTION_BACKEND
    declare_resolution(server_args, PLATFORM_NAME, **fields)


def share_cores(num_ranks: int) -> None:
    """Give each rank an equal part of the cores, unless the environment sets them already."""
    cores = sorted(os.sched_getaffinity(0))
    per_rank = max(1, len(cores) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(per_rank))
    groups = [cores[(rank * per_rank) % len(cores) :][:per_rank] for rank in range(num_ranks)]
    # SGLang needs one entry per rank; without any, it assigns NUMA nodes instead of cores.
    os.environ.setdefault(
        "SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, group)) for group in groups)
    )
