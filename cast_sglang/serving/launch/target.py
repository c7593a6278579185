"""What SGLang builds for a target, and what CAST can do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cast_sglang.errors import HostError

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

__all__ = [
    "check_target",
    "draft_config",
    "has_latent_attention",
    "keeps_states",
    "target_config",
    "why_chains",
]


def target_config(server_args: ServerArgs) -> ModelConfig:
    """Return SGLang's configuration of the target; no model is loaded."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig.from_server_args(server_args)


def draft_config(server_args: ServerArgs) -> ModelConfig:
    """Return SGLang's configuration of the draft, of a server that has one."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig.from_server_args(
        server_args,
        model_path=server_args.speculative_draft_model_path,
        model_revision=server_args.speculative_draft_model_revision,
        is_draft_model=True,
    )


def check_target(path: str, model_config: ModelConfig | Any) -> None:
    """Refuse a target whose layers cannot verify another number of rows in every step.

    Judged by what SGLang will build for it, not by its name.

    Raises:
        HostError: names the flag, the reason and the fix.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import is_deepseek_dsa

    reason = None
    if mambaish_config(model_config) is not None and not keeps_states(model_config):
        reason = (
            "it has linear-attention layers that are no gated delta nets: SGLang's kernels find "
            "their states by the number of rows of a pass, which is another in every step of CAST, "
            "or CAST has never been run with them"
        )
    elif is_deepseek_dsa(model_config.hf_config):
        reason = "it has sparse attention (DSA), with whose kernels CAST has never been run"
    if reason is not None:
        raise HostError(
            f"--model-path {path}: CAST does not serve this target: {reason}; use SGLang's own "
            "--speculative-algorithm EAGLE, EAGLE3 or NEXTN"
        )


def keeps_states(model_config: ModelConfig | Any) -> bool:
    """Return whether some layers keep a state for each verified row, and any number of them.

    Of gated delta nets (Qwen3-Next, Qwen3.5): SGLang's kernel for Mamba-2 finds a state by the
    number of rows of the pass, not of the pool, and Qwen4 keeps other states beside.
    """
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config
    from sglang.srt.configs.qwen4_exp import Qwen4ExpTextConfig

    config = hybrid_gdn_config(model_config)
    return config is not None and not isinstance(config, Qwen4ExpTextConfig)


def has_latent_attention(model_config: ModelConfig | Any) -> bool:
    """Return whether it has multi-head latent attention (MLA)."""
    from sglang.srt.configs.model_config import AttentionArch

    return bool(model_config.attention_arch == AttentionArch.MLA)


def why_chains(model_config: ModelConfig | Any) -> str | None:
    """Return why drafts for a target are chains; None where they may be trees."""
    if keeps_states(model_config):
        return "its linear-attention layers keep a state for each verified row"
    if has_latent_attention(model_config):
        return "trees were never tried with multi-head latent attention (MLA)"
    return None
