"""Attention backends of a launch: which of them runs what, and whether passes are captured."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, NamedTuple

from cast_sglang.cpu.names import ATTENTION_BACKEND
from cast_sglang.errors import HostError
from cast_sglang.serving.launch.target import has_latent_attention, keeps_states, target_config

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from cast_sglang.config import CastConfig

__all__ = [
    "VERIFY_BACKENDS",
    "VerifyBackend",
    "limit_graphs",
    "set_attention_backends",
    "verify_backend",
]

logger = logging.getLogger(__name__)


class VerifyBackend(NamedTuple):
    """What one of SGLang's attention backends verifies, and how it is told the number of rows."""

    # `each`: an object lays passes out for one number of rows, and another one is built for each
    # other number. `batch`: by the batch, but it keeps captured passes by batch size alone, so each
    # number has a copy of the object. `any`: one object serves all.
    rows: Literal["any", "batch", "each"]
    trees: bool = True  # else chains alone, by a causal mask, and no other is ever read
    windows: bool = True  # also where layers attend to a window or a sink


# Those that verify, captured at every number of rows (`graphs.backends`), and run plain steps as
# their decode passes; the draft runs on the first. Where layers have a window, the trees of `fa3`
# are other passes than those it merges here, and `flashinfer` reads the beginning of the prefix.
VERIFY_BACKENDS = {
    "triton": VerifyBackend("any"),
    "fa3": VerifyBackend("each", windows=False),
    "flashinfer": VerifyBackend("batch", windows=False),
    "trtllm_mha": VerifyBackend("each", trees=False),
}
# Prompts are no trees, so these may prefill beside `triton`: their cache holds a token as its does.
PREFILL_BACKENDS: tuple[str, ...] = ("triton", "flashinfer", "fa3", "fa4", "trtllm_mha")
# The same for multi-head latent attention (MLA), whose kernels are others.
MLA_VERIFY_BACKENDS: tuple[str, ...] = ("triton", "fa3")
MLA_PREFILL_BACKENDS: tuple[str, ...] = ("triton", "flashinfer", "fa3", "trtllm_mla")


def set_attention_backends(server_args: ServerArgs) -> None:
    """Keep the backend of prompts; choose those of verify, plain steps and the draft.

    Called when SGLang has settled `attention_backend`, by a flag or by itself: prompts stay on it.
    So it makes no difference whether the arguments came from a command or from an engine.

    Raises:
        HostError: a backend cannot do its part; names the flag and the fix.
    """
    is_cpu = server_args.device == "cpu"
    verifies, prefills = tuple(VERIFY_BACKENDS), PREFILL_BACKENDS
    if is_cpu:
        verifies = prefills = _backends_of_the_cpu(server_args)
    else:
        target = target_config(server_args)
        if has_latent_attention(target):
            verifies, prefills = MLA_VERIFY_BACKENDS, MLA_PREFILL_BACKENDS
        if keeps_states(target):
            _set_linear_attention(server_args)
    flag, prefill = "--prefill-attention-backend", server_args.prefill_attention_backend
    if prefill is None:
        flag, prefill = "--attention-backend", server_args.attention_backend
    if prefill is not None and prefill not in prefills:
        raise HostError(
            f"{flag} {prefill}: beside CAST's verify prompts run here on {', '.join(prefills)} "
            f"alone; pass {flag} {prefills[0]}"
        )
    decode = server_args.decode_attention_backend
    if decode is None:
        verifies_too = prefill in verifies and _why_not(prefill, server_args) is None
        decode = prefill if verifies_too else verifies[0]
    if decode not in verifies:
        raise HostError(
            f"--decode-attention-backend {decode}: CAST verifies here on {', '.join(verifies)} "
            f"alone; pass {verifies[0]}, or drop the flag"
        )
    if (reason := _why_not(decode, server_args)) is not None:
        raise HostError(
            f"--decode-attention-backend {decode}: CAST does not verify on it where {reason}; pass "
            f"{verifies[0]}, or drop the flag"
        )
    draft = server_args.speculative_draft_attention_backend
    if draft not in (None, verifies[0]):
        raise HostError(
            f"--speculative-draft-attention-backend {draft}: CAST drafts here on {verifies[0]} "
            f"alone; pass {verifies[0]}, or drop the flag"
        )
    if {prefill, decode} != {verifies[0]}:
        server_args.speculative_draft_attention_backend = verifies[0]
    # SGLang decodes on `attention_backend` where no other backend is named.
    if is_cpu or prefill == decode == (server_args.attention_backend or decode):
        return
    server_args.prefill_attention_backend = prefill
    server_args.decode_attention_backend = decode
    if prefill != decode:
        server_args.speculative_attention_mode = "decode"  # the backend that SGLang verifies on
    logger.info("CAST: prompts run on %s, verify and plain steps on %s", prefill, decode)


def _why_not(name: str, server_args: ServerArgs) -> str | None:
    """Return why the target's verify passes do not run on this backend; None where they do."""
    backend = VERIFY_BACKENDS.get(name)
    if backend is None:  # the CPU platform's own
        return None
    if not backend.trees and server_args.speculative_eagle_topk != 1:
        return "drafts are trees (chains: --speculative-eagle-topk 1)"
    if backend.windows:
        return None
    config = target_config(server_args)
    if backend.rows == "batch" and keeps_states(config):
        return "the target has linear attention"
    has_window = config.sliding_window_size is not None and getattr(
        config.hf_text_config, "use_sliding_window", True
    )
    if config.is_hybrid_swa or has_window or config.attention_chunk_size is not None:
        return "the target has layers that attend to a window"
    if config.has_attention_sinks:
        return "the target has attention sinks"
    return None


def _set_linear_attention(server_args: ServerArgs) -> None:
    """Verify on the kernels that find a row's state at any number of rows.

    Raises:
        HostError: another was asked for.
    """
    name = server_args.linear_attn_verify_backend
    if name not in (None, "triton"):
        raise HostError(
            f"--linear-attn-verify-backend {name}: CAST verifies another number of rows in every "
            "step, which was tried with triton alone; pass triton, or drop the flag"
        )
    server_args.linear_attn_verify_backend = "triton"


def _backends_of_the_cpu(server_args: ServerArgs) -> tuple[str, ...]:
    """Return the CPU platform's own backend, or `triton` where it runs in its interpreter."""
    from triton import knobs

    is_interpreted = knobs.runtime.interpret and server_args.attention_backend == "triton"
    return ("triton",) if is_interpreted else (ATTENTION_BACKEND,)


def verify_backend(server_args: ServerArgs) -> str:
    """Return the backend of verify and plain steps, once backends are set."""
    return str(server_args.decode_attention_backend or server_args.attention_backend)


def limit_graphs(config: CastConfig, server_args: ServerArgs) -> None:
    """Turn decode graphs off where those of CAST's sizes cannot be captured, and say why."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    backend = server_args.cuda_graph_config.decode.backend
    if backend == Backend.DISABLED:
        logger.warning("CAST: decode CUDA graphs are off, as asked")
        return
    if config.graphs == "off":
        reason = "--cast-graphs off"
    elif server_args.enable_lora or server_args.lora_paths:
        reason = "adapters are captured for one number of rows"
    elif backend != Backend.FULL:
        reason = f"CAST captures whole passes, not {backend} ones"
    else:
        return
    server_args.cuda_graph_config = with_phase(
        server_args.cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED
    )
    logger.warning("CAST: decode CUDA graphs are off: %s", reason)
