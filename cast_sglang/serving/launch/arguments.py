"""A server's arguments: CAST's defaults, and what it refuses.

Everything that can be wrong with a launch is found here, in the launching process, before a model
is loaded, and raised as a `CastError` that names the flag and the fix.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

import torch

from cast_sglang.config import CastConfig
from cast_sglang.cpu.names import ATTENTION_BACKEND, PLATFORM_NAME
from cast_sglang.errors import HostError
from cast_sglang.serving.launch.identity import read_draft_config

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

__all__ = [
    "check_device",
    "check_flags",
    "check_pair",
    "choose_attention_backend",
    "limit_graphs",
    "set_attention_backends",
    "set_envelope",
    "verify_sizes",
]

logger = logging.getLogger(__name__)

# The envelope when the flags are not given. A step uses as much of it as pays, so it is generous:
# its price is KV reserved per running request (`step_room.step_reserve`).
DEFAULT_NUM_STEPS = 8
DEFAULT_TOPK = 8
DEFAULT_NUM_DRAFT_TOKENS = 32
# Backends of the target by device; the draft runs on the first. It is also the one with graphs.
ATTENTION_BACKENDS = {"cpu": (ATTENTION_BACKEND,), "cuda": ("triton", "flashinfer")}
GRAPH_ATTENTION_BACKEND = "triton"
_NOT_PLAIN = (
    "the states at hand are the ones that the draft reads, not those of plain decoding; "
    "drop the flag"
)
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
    "--page-size": (1, "tree nodes need single-token pages; use --page-size 1"),
    "--enable-two-batch-overlap": (
        False,
        "it splits the batch that CAST decides for; drop the flag",
    ),
    "--speculative-token-map": (None, "use an EAGLE-3 draft, which carries its own"),
    "--speculative-draft-window-size": (None, "CAST's draft reads the whole prefix; drop the flag"),
    "--enable-return-hidden-states": (False, _NOT_PLAIN),
    "--return-hidden-states-mode": (None, _NOT_PLAIN),
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


def limit_graphs(config: CastConfig, server_args: ServerArgs) -> None:
    """Turn decode graphs off where those of CAST's sizes cannot be captured, and say why."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    backend = server_args.cuda_graph_config.decode.backend
    if backend == Backend.DISABLED:
        logger.warning("CAST: decode CUDA graphs are off, as asked")
        return
    target = {
        server_args.attention_backend,
        server_args.prefill_attention_backend or server_args.attention_backend,
        server_args.decode_attention_backend or server_args.attention_backend,
    }
    if config.graphs == "off":
        reason = "--cast-graphs off"
    elif backend != Backend.FULL:
        reason = f"CAST captures whole passes, not {backend} ones"
    elif target != {GRAPH_ATTENTION_BACKEND}:
        reason = (
            f"the target runs on {', '.join(sorted(map(str, target)))}, whose graphs are made for "
            f"one number of rows; pass --attention-backend {GRAPH_ATTENTION_BACKEND}"
        )
    else:
        return
    server_args.cuda_graph_config = with_phase(
        server_args.cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED
    )
    logger.warning("CAST: decode CUDA graphs are off: %s", reason)


def choose_attention_backend(args: argparse.Namespace) -> None:
    """Run the target on the backend whose passes can be captured, where no other is asked for."""
    given = (
        args.attention_backend,
        args.prefill_attention_backend,
        args.decode_attention_backend,
    )
    if torch.cuda.is_available() and not any(given):
        args.attention_backend = GRAPH_ATTENTION_BACKEND
        logger.info("CAST: --attention-backend not given, using %s", GRAPH_ATTENTION_BACKEND)


def set_attention_backends(server_args: ServerArgs) -> None:
    """Refuse backends that cannot verify or draft CAST's trees; choose the draft's.

    Raises:
        HostError: names the flag and the fix.
    """
    allowed = ATTENTION_BACKENDS["cpu" if server_args.device == "cpu" else "cuda"]
    given = {
        "--attention-backend": server_args.attention_backend,
        "--prefill-attention-backend": server_args.prefill_attention_backend,
        "--decode-attention-backend": server_args.decode_attention_backend,
    }
    for flag, name in given.items():
        if name is not None and name not in allowed:
            raise HostError(
                f"{flag} {name}: CAST verifies trees of every width here on "
                f"{' and '.join(allowed)} alone; pass --attention-backend {allowed[0]}"
            )
    draft = server_args.speculative_draft_attention_backend
    if draft is None and server_args.attention_backend != allowed[0]:
        server_args.speculative_draft_attention_backend = allowed[0]
    elif draft is not None and draft != allowed[0]:
        raise HostError(
            f"--speculative-draft-attention-backend {draft}: CAST drafts trees here on "
            f"{allowed[0]} alone; pass {allowed[0]}, or drop the flag"
        )


def set_envelope(server_args: ServerArgs) -> None:
    """Fill in the largest tree a step may have, and refuse one that cannot be.

    Raises:
        HostError: names the flag and the fix.
    """
    if server_args.speculative_num_steps is None:
        server_args.speculative_num_steps = DEFAULT_NUM_STEPS
    if server_args.speculative_eagle_topk is None:
        server_args.speculative_eagle_topk = DEFAULT_TOPK
    steps, topk = server_args.speculative_num_steps, server_args.speculative_eagle_topk
    most = 1 + topk + (steps - 1) * topk * topk
    if server_args.speculative_num_draft_tokens is None:
        server_args.speculative_num_draft_tokens = min(DEFAULT_NUM_DRAFT_TOKENS, most)
    tokens = server_args.speculative_num_draft_tokens
    if steps < 1:
        raise HostError(f"--speculative-num-steps {steps}: CAST needs at least 1")
    if topk < 2:
        raise HostError(
            f"--speculative-eagle-topk {topk}: CAST reads the draft's probabilities, which SGLang "
            "does not compute for chains; use 2 or more"
        )
    if not 2 <= tokens <= most:
        raise HostError(
            f"--speculative-num-draft-tokens {tokens}: a tree of {steps} steps and topk {topk} "
            f"has 2..{most} nodes, root included"
        )


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

    Asked of the flags as given, because SGLang drops some of them on its way, and of the server's
    arguments, which an embedded engine sets without flags.

    Raises:
        HostError: names the flag and the fix.
    """
    if args.speculative_draft_model_path is None:
        raise HostError(
            "--speculative-algorithm CAST needs --speculative-draft-model-path, "
            "an EAGLE or EAGLE-3 draft of the target"
        )
    for flag, (unset, advice) in UNSUPPORTED.items():
        given = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if given is not None and given != unset:
            raise HostError(
                f"{flag} cannot be combined with --speculative-algorithm CAST: {advice}"
            )
    read_draft_config(
        args.speculative_draft_model_path,
        args.speculative_draft_model_revision,
        args.trust_remote_code,
    )


def check_pair(server_args: ServerArgs) -> None:
    """Refuse a draft that was not made for the target, before either is loaded."""
    from sglang.srt.configs.model_config import ModelConfig

    draft_path = server_args.speculative_draft_model_path
    draft = read_draft_config(
        draft_path, server_args.speculative_draft_model_revision, server_args.trust_remote_code
    )
    target = ModelConfig.from_server_args(server_args).hf_text_config
    names = getattr(draft, "architectures", None) or []
    if not any("eagle" in name.lower() for name in names):
        raise HostError(
            f"--speculative-draft-model-path {draft_path}: {', '.join(names) or 'no architecture'} "
            "is no EAGLE or EAGLE-3 draft"
        )
    expected = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
    # An EAGLE-3 draft of another width says which target width it reads.
    if getattr(draft, "target_hidden_size", None) is not None:
        expected["target_hidden_size"] = expected.pop("hidden_size")
    for key, value in expected.items():
        if getattr(draft, key, None) != value:
            raise HostError(
                f"--speculative-draft-model-path {draft_path}: its {key} is "
                f"{getattr(draft, key, None)}, the target's is {value}; "
                "use a draft made for this target"
            )
