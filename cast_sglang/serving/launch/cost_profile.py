"""The cost profile of a launch: which one is in force, what is said of it, how to measure one."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cast_sglang.config import PENDING
from cast_sglang.costs.profiles import FoundProfile, describe_error, find_profile, user_profile_path
from cast_sglang.cpu.names import PLATFORM_NAME
from cast_sglang.errors import MissingProfileError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from cast_sglang.config import CastConfig
    from cast_sglang.costs.schema import HostIdentity

__all__ = ["announce_profile", "find_server_profile", "in_force", "profile_command"]

logger = logging.getLogger(__name__)

PROGRAM = "cast-sglang"
PATHS = ("model_path", "speculative_draft_model_path", "tokenizer_path", "download_dir")
# The flags of a server that decide which weights are loaded and how, what runs a pass, and which
# shapes are measured. A list, because others carry keys and ports.
FLAGS = (
    *PATHS,
    "revision",
    "speculative_draft_model_revision",
    "trust_remote_code",
    "load_format",
    "speculative_draft_load_format",
    "model_loader_extra_config",
    "json_model_override_args",
    "model_impl",
    "tokenizer_mode",
    "skip_tokenizer_init",
    "dtype",
    "quantization",
    "speculative_draft_model_quantization",
    "kv_cache_dtype",
    "speculative_draft_kv_cache_dtype",
    "device",
    "base_gpu_id",
    "tp_size",
    "cpu_offload_gb",
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
    "moe_runner_backend",
    "disable_cuda_graph",
    "disable_decode_cuda_graph",
    "disable_custom_all_reduce",
    "disable_overlap_schedule",
    "enable_torch_compile",
    "context_length",
    "mem_fraction_static",
    "max_total_tokens",
    "max_running_requests",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
)


def find_server_profile(
    config: CastConfig, server_args: ServerArgs, identity: HostIdentity
) -> FoundProfile | None:
    """Return the profile of this device and pair.

    Args:
        identity: of the server.

    Returns:
        None for a policy that needs none, and where the server is to make one before it serves.

    Raises:
        ProfileError: the named profile is bad or does not fit.
    """
    if config.profile in ("none", "estimate", PENDING):
        return None
    try:
        return _find(config, server_args, identity)
    except MissingProfileError:
        return None


def announce_profile(config: CastConfig, server_args: ServerArgs, identity: HostIdentity) -> None:
    """Log which costs a launch decides by and what comes next; call it once, in the launcher.

    Args:
        identity: of the server.

    Raises:
        ProfileError: the named profile is bad or does not fit.
    """
    is_used = config.policy != "eagle"
    if config.profile == PENDING:
        return
    if config.profile == "none":
        logger.info("CAST: policy eagle decides by no cost profile")
        return
    if config.profile == "estimate":
        logger.warning(
            "CAST: costs are ESTIMATED from the device's bandwidth and peak rate before the first "
            "request, as --cast-profile estimate asks; nothing is measured"
        )
        return
    try:
        found = _find(config, server_args, identity)
    except MissingProfileError as error:
        logger.info("CAST: %s", error)
        next_step = "policy eagle needs none"
        if is_used:
            next_step = (
                "a quick one is measured before the first request (a minute or two) and kept"
            )
            next_step += f" in {user_profile_path(identity)}"
        logger.info("CAST: no cost profile of this device and pair; %s", next_step)
        return
    for warning in found.warnings:
        logger.warning("CAST: %s", warning)
    text = in_force(found) if is_used else f"policy eagle does not decide by {found.path}"
    if found.profile.provenance.estimated:
        text += f"; for better tables run: {found.command}"
        logger.warning("CAST: %s", text)
    else:
        corrects = is_used and config.residuals == "on"
        logger.info("CAST: %s%s", text, "; serving corrects it" if corrects else "")


def in_force(found: FoundProfile) -> str:
    """Say by which tables a server decides, and where and when they were measured."""
    source = found.profile.provenance
    how = "ESTIMATED, not measured," if source.estimated else "measured"
    where = f"on {source.device_name} on {source.date[:10]}"
    took = "" if source.estimated else f" in {source.seconds:.0f} s"
    error = "" if source.estimated else f"; {describe_error(found.profile)}"
    return f"decides by {found.path}, {how} {where}{took}{error}"


def profile_command(server_args: ServerArgs, identity: HostIdentity) -> str:
    """Return the command that measures this server's profile when it is pasted into a shell.

    It repeats those of `FLAGS` that the server was given, and SGLang resolves the others again.
    Local paths are whole, so the command is for logs, not for files.

    Args:
        identity: of the server, which decides where it looks for the profile.
    """
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import ServerArgs

    # SGLang resolves what is not given, and keeps what was.
    given = getattr(server_args, "_raw_input", None) or {}
    defaults = {field.name: field.default for field in msgspec.structs.fields(ServerArgs)}
    words = [f"SGLANG_PLATFORM={PLATFORM_NAME}"]
    words = words if current_platform.device_name == PLATFORM_NAME else []
    words += [_program(), "profile"]
    for name in FLAGS:
        value = given.get(name, getattr(server_args, name, None))
        if value is None or value == defaults[name]:
            continue
        if name in PATHS and os.path.exists(value):
            value = os.path.abspath(value)
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return shlex.join([*words, "--output", str(user_profile_path(identity))])


def _find(config: CastConfig, server_args: ServerArgs, identity: HostIdentity) -> FoundProfile:
    return find_profile(
        identity,
        config.profile,
        allow_foreign=config.allow_foreign_profile,
        command=profile_command(server_args, identity),
    )


def _program() -> str:
    """Return how a shell finds the command of this installation."""
    installed = Path(sys.executable).with_name(PROGRAM)
    on_path = shutil.which(PROGRAM)
    if installed.exists() and (on_path is None or not installed.samefile(on_path)):
        return str(installed)
    return PROGRAM
