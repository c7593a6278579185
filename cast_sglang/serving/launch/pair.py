"""The pair of models of a launch: whether they fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cast_sglang.errors import HostError
from cast_sglang.serving.launch.identity import architecture, is_eagle_config, read_draft_config
from cast_sglang.serving.launch.target import check_target, draft_config

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

__all__ = ["check_pair"]


def check_pair(server_args: ServerArgs, config: ModelConfig) -> None:
    """Refuse a target that CAST cannot serve, and a draft that was not made for it.

    Neither model is loaded. There may be no draft.

    Args:
        config: of the target.

    Raises:
        HostError: names the flag and the fix.
    """
    draft_path = server_args.speculative_draft_model_path
    if draft_path is None:
        check_target(server_args.model_path, config)
        return
    draft = read_draft_config(
        draft_path, server_args.speculative_draft_model_revision, server_args.trust_remote_code
    )
    check_target(server_args.model_path, config)
    target = config.hf_text_config
    if not (is_eagle_config(draft) or _has_mtp_layer(server_args)):
        raise HostError(
            f"--speculative-draft-model-path {draft_path}: {architecture(draft)} is no EAGLE or "
            "EAGLE-3 draft, and has no MTP layer"
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


def _has_mtp_layer(server_args: ServerArgs) -> bool:
    """Return whether SGLang will build the draft as an MTP (NextN) layer of its checkpoint."""
    # So SGLang names the classes of such layers, whatever the checkpoint calls itself.
    return architecture(draft_config(server_args).hf_config).endswith(("NextN", "MTP"))
