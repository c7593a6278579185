"""What this server runs on: the identity that a cost profile must match."""

from __future__ import annotations

import functools
import os
import platform
import shlex
from importlib import metadata
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cast_sglang.costs.profiles import config_hash
from cast_sglang.costs.schema import NO_DRAFT, HostIdentity, ModelIdentity
from cast_sglang.errors import HostError
from cast_sglang.serving.heads.registry import register_heads
from cast_sglang.serving.launch.backends import verify_backend
from cast_sglang.serving.launch.target import target_config

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

__all__ = [
    "architecture",
    "captures_decode",
    "command_without_local_paths",
    "device_facts",
    "host_identity",
    "is_draft_path",
    "is_eagle3_config",
    "is_eagle_config",
    "read_config",
    "read_draft_config",
    "without_local_paths",
]


def read_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the Hugging Face config of a checkpoint.

    Raises:
        HostError: it cannot be read.
    """
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        return get_config(path, trust_remote_code=trust_remote_code, revision=revision)
    # The path may come from a client, and transformers checks a config by errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise HostError(f"{path}: no readable config.json: {reason[:300]}") from error


@functools.cache
def read_draft_config(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return the draft's Hugging Face config, as it was when first read.

    Raises:
        HostError: it cannot be read.
    """
    try:
        return read_config(path, revision, trust_remote_code)
    except HostError as error:
        raise HostError(f"--speculative-draft-model-path {error}") from error


def is_eagle_config(draft_config: Any) -> bool:
    """Return whether the draft is an EAGLE or EAGLE-3 head."""
    return "eagle" in architecture(draft_config).lower()


def is_eagle3_config(draft_config: Any) -> bool:
    """Return whether the draft is an EAGLE-3 head, which reads several layers of the target.

    SGLang's classes of such heads, and no others, map a vocabulary of their own to the target's.

    Effects: imports SGLang's models, as loading one does.
    """
    from sglang.srt.models.registry import ModelRegistry

    register_heads()
    model_class, _ = ModelRegistry.resolve_model_cls([architecture(draft_config)])
    return hasattr(model_class, "get_hot_token_id")


def is_draft_path(path: str) -> bool:
    """Return whether a checkpoint is an EAGLE or EAGLE-3 draft, by its config."""
    from sglang.srt.runtime_context import get_model

    try:
        config = read_config(path, None, get_model().trust_remote_code)
    except HostError:
        return False
    return is_eagle_config(config)


def architecture(hf_config: Any) -> str:
    """Return the name of the model class that the config asks for."""
    return (getattr(hf_config, "architectures", None) or ["unknown"])[0]


def host_identity(server_args: ServerArgs, target: ModelConfig | None = None) -> HostIdentity:
    """Describe device, pair and settings, as far as they change the time of a forward pass.

    Args:
        target: config of the target, where it has been read.
    """
    if target is None:
        target = target_config(server_args)
    draft = server_args.speculative_draft_model_path
    return HostIdentity(
        **device_facts(server_args.device),
        target=_model(server_args.model_path, server_args.revision),
        draft=NO_DRAFT
        if draft is None
        else _model(draft, server_args.speculative_draft_model_revision),
        dtype=str(target.dtype).removeprefix("torch."),
        tp_size=server_args.tp_size,
        attention_backend=verify_backend(server_args),
        cuda_graph=captures_decode(server_args),
        page_size=server_args.page_size or 1,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "sglang": metadata.version("sglang"),
            "cast_sglang": metadata.version("cast-sglang"),
        },
        quantization=server_args.quantization,
        kv_cache_dtype=server_args.kv_cache_dtype,
        overlap=not server_args.disable_overlap_schedule,
    )


def captures_decode(server_args: ServerArgs) -> bool:
    """Return whether a server with these arguments runs its steps as CUDA graphs."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    graphs = server_args.cuda_graph_config
    is_cuda = server_args.device.startswith("cuda")
    return is_cuda and graphs is not None and graphs.decode.backend != Backend.DISABLED


def without_local_paths(identity: HostIdentity) -> HostIdentity:
    """Return the identity as a profile carries it: of local paths only the last two parts."""

    def short(model: ModelIdentity) -> ModelIdentity:
        return msgspec.structs.replace(model, name=_end_of_path(model.name))

    return msgspec.structs.replace(
        identity, target=short(identity.target), draft=short(identity.draft)
    )


def command_without_local_paths(command: str) -> str:
    """Return a command line as a profile carries it: of absolute paths only the last two parts."""
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.rpartition("=")
        if os.path.isabs(os.path.expanduser(value)):
            value = _end_of_path(value)
        words.append(flag + equals + value)
    return shlex.join(words)


def _end_of_path(path: str) -> str:
    return "/".join(path.rstrip("/").rsplit("/", 2)[-2:])


def _model(path: str, revision: str | None) -> ModelIdentity:
    from transformers import PretrainedConfig

    # The checkpoint's own file: into the config it runs with, SGLang writes settings of the server.
    config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    return ModelIdentity(
        name=path,
        config_hash=config_hash(config),
        architectures=list(config.get("architectures") or ["unknown"]),
    )


def device_facts(device: str) -> dict[str, Any]:
    """Return the fields of `HostIdentity` that describe the device, "cuda" or "cpu"."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        return {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            **_nvidia_facts(),
            "runtime": f"cuda {torch.version.cuda}",
            "device_count": torch.cuda.device_count(),
        }
    import psutil

    return {
        "device_name": f"{_cpu_name()}, {os.cpu_count()} cores",
        "device_memory_bytes": psutil.virtual_memory().total,
        "driver": f"{platform.system()} {platform.machine()}",
        "runtime": "cpu",
        "device_count": 1,
    }


def _nvidia_facts() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    # By its UUID: NVML does not know CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    return {
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        "clock_mhz": int(pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_SM)),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
