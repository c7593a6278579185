"""What a model takes by its config: per token of the cache, and in results of its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cast_sglang.serving.launch.identity import architecture
from cast_sglang.serving.launch.target import has_latent_attention

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

__all__ = ["KV_SPLITS", "kv_bytes", "kv_splits", "num_layers", "states", "value_dim"]

# Of `triton`'s decode: its partial results are kept for so many parts of a prefix (its default). Of
# latent attention there may be one for each multiprocessor, so many on Hopper and Blackwell, which
# rounds their 132 and 148 up, and at most one for so many tokens.
KV_SPLITS = 8
LATENT_KV_SPLITS, LATENT_SPLIT_TOKENS = 256, 32


def states(draft: Any) -> int:
    """Return the numbers per token that the target hands to the draft."""
    config = draft.hf_config
    eagle = getattr(config, "eagle_config", None) or {}
    width = getattr(config, "target_hidden_size", None) or draft.hidden_size
    if "eagle3" not in architecture(config).lower() or not eagle.get("use_aux_hidden_state", True):
        return int(width)  # the last layer's
    name = "eagle_aux_hidden_state_layer_ids"
    layers = getattr(config, name, None) or eagle.get(name)
    return int(width) * (len(layers) if layers else 3)


def kv_bytes(model: Any, tp_size: int, server_args: ServerArgs) -> int:
    """Return the bytes of keys and values that a token takes on one GPU."""
    import torch

    name = server_args.kv_cache_dtype
    named = {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}
    size = named.get(name, torch.bfloat16 if name in ("bf16", "bfloat16") else model.dtype).itemsize
    per_layer = model.get_num_kv_heads(tp_size) * (model.head_dim + model.v_head_dim)
    if has_latent_attention(model):  # one row for all heads, on every GPU
        per_layer = model.kv_lora_rank + model.qk_rope_head_dim
    return int(num_layers(model) * per_layer * size)


def num_layers(model: Any) -> int:
    """Return the layers that are run; the config of an MTP layer names the target's too."""
    return int((model.is_draft_model and model.num_nextn_predict_layers) or model.num_hidden_layers)


def value_dim(draft: Any) -> int:
    """Return the size of what a head of `triton`'s decode attends to."""
    return int(draft.kv_lora_rank if has_latent_attention(draft) else draft.head_dim)


def kv_splits(draft: Any) -> int:
    """Return for how many parts of a prefix `triton`'s decode keeps results."""
    if not has_latent_attention(draft):
        return KV_SPLITS
    splits = 1 << (draft.context_len // LATENT_SPLIT_TOKENS - 1).bit_length()
    return max(KV_SPLITS, min(LATENT_KV_SPLITS, splits))
