"""A server's arguments: CAST's defaults, and what it refuses.

Everything that can be wrong with a launch is found here, in the launching process, before a model
is loaded, and raised as a `CastError` that names the flag and the fix.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from cast_sglang.config import CastConfig
from cast_sglang.cpu.names import PLATFORM_NAME
from cast_sglang.errors import HostError
from cast_sglang.serving.launch.identity import read_config, read_draft_config
from cast_sglang.serving.launch.target import keeps_states, why_chains

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

__all__ = [
    "check_copying",
    "check_device",
    "check_flags",
    "set_draft",
    "set_envelope",
    "verify_sizes",
]

# The envelope when the flags are not given. A step uses as much of it as pays, so it is generous:
# a request reserves no more of the cache for it than for SGLang's default tree
# (`step_room.step_reserve`).
DEFAULT_NUM_STEPS = 8
DEFAULT_TOPK = 8
DEFAULT_NUM_DRAFT_TOKENS = 32
# SGLang's default chain, 3-1-4. Of targets that keep a state for each verified row, in which a row
# takes as much memory as a request does besides (75 MB for Qwen3-Next in float32).
DEFAULT_NUM_STATES = 4
_REPLAYS = "states of linear attention are kept for each row that is verified; drop the flag"
# Flags that CAST cannot run with, the value that stands for not given (None does so as well), and
# what to do instead.
UNSUPPORTED = {
    "--speculative-adaptive": (False, "CAST adapts the tree by itself; drop the flag"),
    "--speculative-use-rejection-sampling": (
        False,
        "it is for chains; drop the flag, sampling stays exact without it",
    ),
    "--speculative-use-block-verification": (False, "it is for chains; drop the flag"),
    "--enable-multi-layer-eagle": (False, "CAST drafts with single-layer heads; drop the flag"),
    "--enable-dp-attention": (
        False,
        "ranks would choose different trees; use one server per GPU behind SGLang's router",
    ),
    "--pp-size": (1, "CAST runs without pipeline parallelism; use 1"),
    "--enable-two-batch-overlap": (
        False,
        "it splits the batch that CAST decides for; drop the flag",
    ),
    "--speculative-draft-window-size": (None, "CAST's draft reads the whole prefix; drop the flag"),
    "--return-hidden-states-mode": (
        "full",
        "verify gives those of all tokens; use --enable-return-hidden-states",
    ),
    "--enable-linear-replayssm": (False, _REPLAYS),
    "--enable-linear-replayssm-spec": (False, _REPLAYS),
    "--disaggregation-mode": ("null", "not supported by CAST yet; use null"),
}
NO_DEVICE = "no NVIDIA GPU that torch can use, and no CPU platform"
NO_DEVICE_FIX = (
    f"to serve on the CPU, set SGLANG_PLATFORM={PLATFORM_NAME}; to serve on a GPU, check its "
    "driver and install a CUDA build of torch"
)
# SGLang's own default under speculative decoding, for the same reserve.
DEFAULT_MAX_RUNNING_REQUESTS = 48


def verify_sizes(config: CastConfig, num_draft_tokens: int) -> tuple[int, ...]:
    """Return the sizes a verify pass may have: those configured, or all within the envelope.

    Raises:
        HostError: a configured size lies outside 2..`num_draft_tokens`.
    """
    if config.verify_sizes is None:
        return tuple(range(2, num_draft_tokens + 1))
    if config.verify_sizes[0] < 2 or config.verify_sizes[-1] > num_draft_tokens:
        raise HostError(
            f"--cast-verify-sizes {','.join(map(str, config.verify_sizes))}: each size must be in "
            f"2..{num_draft_tokens} (--speculative-num-draft-tokens)"
        )
    return config.verify_sizes


def set_envelope(
    server_args: ServerArgs, depth: int | None = None, target: ModelConfig | None = None
) -> None:
    """Fill in the largest tree a step may have, and refuse one that cannot be.

    Without a draft model it is a chain: each node has one copied child. So it is where the target
    or the pages of the cache take chains alone.

    Args:
        depth: tokens ahead that the draft drafts in one pass; None for one that drafts by steps.
        target: config of the target; None for one that takes trees.

    Raises:
        HostError: names the flag and the fix.
    """
    steps, topk, tokens = DEFAULT_NUM_STEPS, DEFAULT_TOPK, DEFAULT_NUM_DRAFT_TOKENS
    if target is not None and keeps_states(target):
        steps, tokens = DEFAULT_NUM_STATES - 1, DEFAULT_NUM_STATES
    steps = min(steps, depth or steps)
    if server_args.speculative_draft_model_path is None:
        steps, topk = max(1, (server_args.speculative_num_draft_tokens or tokens) - 1), 1
        if server_args.speculative_eagle_topk not in (None, topk):
            raise HostError(
                f"--speculative-eagle-topk {server_args.speculative_eagle_topk}: without "
                "--speculative-draft-model-path a node has one child, the copied one; drop the flag"
            )
    elif reason := _why_chains(server_args, target):
        topk = 1
        if server_args.speculative_eagle_topk not in (None, topk):
            raise HostError(
                f"--speculative-eagle-topk {server_args.speculative_eagle_topk}: drafts for this "
                f"target are chains, because {reason}; pass 1, or drop the flag"
            )
    if server_args.speculative_num_steps is None:
        server_args.speculative_num_steps = steps
    if depth is not None and server_args.speculative_num_steps > depth:
        raise HostError(
            f"--speculative-num-steps {server_args.speculative_num_steps}: this head drafts "
            f"{depth} tokens ahead in its one pass; use at most {depth}"
        )
    if server_args.speculative_eagle_topk is None:
        server_args.speculative_eagle_topk = topk
    steps, topk = server_args.speculative_num_steps, server_args.speculative_eagle_topk
    most = 1 + topk + (steps - 1) * topk * topk
    if server_args.speculative_num_draft_tokens is None:
        server_args.speculative_num_draft_tokens = min(DEFAULT_NUM_DRAFT_TOKENS, most)
    tokens = server_args.speculative_num_draft_tokens
    if steps < 1:
        raise HostError(f"--speculative-num-steps {steps}: CAST needs at least 1")
    if topk < 1:
        raise HostError(f"--speculative-eagle-topk {topk}: use 1 for chains, 2 or more for trees")
    if not 2 <= tokens <= most:
        raise HostError(
            f"--speculative-num-draft-tokens {tokens}: {'a tree' if topk > 1 else 'a chain'} of "
            f"{steps} steps and topk {topk} has 2..{most} nodes, root included"
        )


def _why_chains(server_args: ServerArgs, target: ModelConfig | None) -> str | None:
    """Return why drafts are chains; None where they may be trees."""
    if (server_args.page_size or 1) > 1:
        return (
            f"nodes of a tree share their ancestors' slots, so trees need pages of one token, and "
            f"the cache has pages of {server_args.page_size}"
        )
    return None if target is None else why_chains(target)


def check_device() -> None:
    """Refuse a machine on which nothing can serve: SGLang would end with an error of its own.

    Raises:
        HostError: torch sees no NVIDIA GPU, and the CPU platform is not selected.
    """
    from sglang.srt.platforms import current_platform

    if current_platform.device_name == PLATFORM_NAME:
        return
    if not (torch.version.cuda and torch.cuda.is_available()):
        raise HostError(f"{NO_DEVICE}; {NO_DEVICE_FIX}")


def check_flags(args: argparse.Namespace | ServerArgs) -> None:
    """Refuse flags that CAST cannot run with, and a draft that cannot be read.

    Without a draft, and without one in the target's checkpoint, drafts are copied from the text.

    Asked of the flags as given, because SGLang drops some of them on its way, and of the server's
    arguments, which an embedded engine sets without flags.

    Raises:
        HostError: names the flag and the fix.
    """
    draft = args.speculative_draft_model_path, args.speculative_draft_model_revision
    has_draft = draft[0] is not None
    if not has_draft and _has_own_draft(args):
        draft, has_draft = (args.model_path, args.revision), True
    for flag, (unset, advice) in UNSUPPORTED.items():
        given = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if given is not None and given != unset:
            raise HostError(
                f"{flag} cannot be combined with --speculative-algorithm CAST: {advice}"
            )
    if has_draft:
        read_draft_config(*draft, args.trust_remote_code)
    elif args.enable_return_hidden_states:
        raise HostError(
            "--enable-return-hidden-states needs --speculative-draft-model-path: SGLang keeps no "
            "states of prompts for a server without a draft model; drop the flag"
        )


def check_copying(config: CastConfig, server_args: ServerArgs) -> None:
    """Refuse copies in chains that a draft proposes, and a server that has neither.

    SGLang reads what a chain accepts as if it had no siblings.

    Raises:
        HostError: names the flags and the fix.
    """
    if server_args.speculative_draft_model_path is None:
        for flag, value, *allowed in (
            ("--cast-policy", config.policy, "auto"),
            ("--cast-copying", config.copying, "on", "auto"),
            ("--cast-trace", config.trace, "none"),
        ):
            if value not in allowed:
                raise HostError(
                    f"{flag} {value} needs --speculative-draft-model-path, an EAGLE or EAGLE-3 "
                    "draft of the target: without one, and without an MTP layer in the target, "
                    f"drafts are copied from the text, which takes {flag} {allowed[0]}"
                )
    elif config.copying == "on" and server_args.speculative_eagle_topk == 1:
        raise HostError(
            "--cast-copying on cannot be combined with --speculative-eagle-topk 1: a copy beside "
            "the draft's token makes a tree of the chain; use --speculative-eagle-topk 2 or more, "
            "or --cast-copying off"
        )


def set_draft(server_args: ServerArgs) -> None:
    """Draft with the target's own MTP layer where it has one and no draft is given."""
    if server_args.speculative_draft_model_path is None and _has_own_draft(server_args):
        server_args.speculative_draft_model_path = server_args.model_path
        server_args.speculative_draft_model_revision = server_args.revision


def _has_own_draft(args: argparse.Namespace | ServerArgs) -> bool:
    """Return whether the target's checkpoint has MTP (NextN) layers beside its own.

    Qwen3.5 counts them by another name. Qwen3-Next always has one, and its config says nothing.
    """
    config = read_config(args.model_path, args.revision, args.trust_remote_code)
    text = getattr(config, "text_config", config)
    names = "num_nextn_predict_layers", "mtp_num_hidden_layers"
    is_said = any(getattr(each, name, 0) for each in (config, text) for name in names)
    return is_said or getattr(config, "model_type", None) == "qwen3_next"
