"""What passes of a model read and multiply, from its config alone.

Known are decoders with multi-head or grouped-query attention and gated projections, of dense layers
or of experts, and the drafts EAGLE and EAGLE-3 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cast_sglang.errors import ProfileError
from cast_sglang.profiling.roofline import ModelSize

__all__ = ["Precision", "draft_sizes", "eagle3_config", "target_size"]

# Kernels of a layer: norm, queries keys and values, rotation and cache, attention and the sum of
# its parts, output, norm, two projections and the product between them.
KERNELS_PER_LAYER = 10
# Beside the layers: embedding, last norm, head; and choosing tokens or accepting them.
KERNELS_PER_PASS = 8
# The published EAGLE-3 drafts propose among so many tokens.
DRAFT_VOCAB_SIZE = 32_000
# States of the target that an EAGLE-3 draft reads.
AUX_STATES = 3
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
UNKNOWN_KINDS = {
    "kv_lora_rank": "MLA",
    "linear_num_key_heads": "linear attention",
    "ssm_state_size": "state space layers",
}


class Precision(NamedTuple):
    """Bytes of what is stored."""

    weight: int = 2
    state: int = 2  # hidden states, keys, values, and what ranks send each other


def target_size(config: Mapping[str, Any], tp_size: int, precision: Precision) -> ModelSize:
    """Return what a pass of a target takes on one of `tp_size` ranks.

    Raises:
        ProfileError: the config lacks a size, or is of a kind that is not known.
    """
    text = _text(config)
    layers = _number(text, "num_hidden_layers")
    attention, dense, experts, share = _layer(text, text_width=1)
    num_dense = int(text.get("first_k_dense_replace") or 0) if experts else layers
    hidden = _number(text, "hidden_size")
    head = hidden * _number(text, "vocab_size")
    shared = _shared_expert(text) if experts else 0
    read = layers * attention + num_dense * dense + (layers - num_dense) * shared + head
    expert_weights = (layers - num_dense) * experts
    return ModelSize(
        num_weights=round((read + share * expert_weights) / tp_size),
        weight_bytes=round(precision.weight * read / tp_size),
        expert_bytes=round(precision.weight * expert_weights / tp_size),
        expert_share=share,
        **_of_layers(text, layers, tp_size, precision),
    )


def draft_sizes(
    draft: Mapping[str, Any], target: Mapping[str, Any], tp_size: int, precision: Precision
) -> tuple[ModelSize, ModelSize]:
    """Return what a layer of the tree and a pass over accepted rows take of a draft.

    An EAGLE-3 draft reads two states a token, the token's and its own, and joins the states of the
    target to one where it gets them, over accepted rows. An EAGLE draft joins its two in every
    pass. What joins states is on every rank whole.

    Raises:
        ProfileError: a config lacks a size, or is of a kind that is not known.
    """
    is_eagle3 = "eagle3" in str(draft.get("architectures") or "").lower()
    attention, dense, experts, _ = _layer(draft, text_width=2 if is_eagle3 else 1)
    if experts:
        raise ProfileError("the draft's config: experts in a draft are not known")
    layers, hidden = _number(draft, "num_hidden_layers"), _number(draft, "hidden_size")
    target_hidden = _number(_text(target), "hidden_size")
    head = hidden * int(draft.get("draft_vocab_size") or _number(draft, "vocab_size"))
    sharded = (layers * (attention + dense) + head) / tp_size
    joins = (0, AUX_STATES * target_hidden * hidden) if is_eagle3 else (2 * hidden * hidden,) * 2
    layer, extend = (
        ModelSize(
            num_weights=round(sharded + join),
            weight_bytes=round(precision.weight * sharded + precision.state * join),
            **_of_layers(draft, layers, tp_size, precision),
        )
        for join in joins
    )
    return layer, extend


def eagle3_config(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an EAGLE-3 draft as they are published for such a target."""
    text = dict(_text(target))
    for name in (*EXPERT_COUNTS, "quantization_config"):
        text.pop(name, None)
    return text | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": min(DRAFT_VOCAB_SIZE, _number(text, "vocab_size")),
    }


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that is about text."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _layer(text: Mapping[str, Any], text_width: int) -> tuple[int, int, int, float]:
    """Return the weights of a layer's attention, dense part and experts, and the share of these.

    Args:
        text_width: states that attention reads, side by side.
    """
    for key, kind in UNKNOWN_KINDS.items():
        if text.get(key):
            raise ProfileError(f"the config has {key!r}: times of {kind} are not known")
    hidden = _number(text, "hidden_size")
    heads, kv_heads, head_dim = _heads(text)
    attention = hidden * head_dim * (text_width * (heads + 2 * kv_heads) + heads)
    num_experts = next((int(text[name]) for name in EXPERT_COUNTS if text.get(name)), 0)
    dense = 3 * hidden * _number(text, "intermediate_size")
    if not num_experts:
        return attention, dense, 0, 1.0
    width = int(text.get("moe_intermediate_size") or _number(text, "intermediate_size"))
    share = _number(text, "num_experts_per_tok") / num_experts
    return attention, dense, num_experts * 3 * hidden * width, share


def _shared_expert(text: Mapping[str, Any]) -> int:
    """Return the weights of a layer that every token takes beside the experts that it chooses."""
    width = text.get("shared_expert_intermediate_size")
    if not width:
        width = int(text.get("n_shared_experts") or 0) * int(text.get("moe_intermediate_size") or 0)
    return 3 * _number(text, "hidden_size") * int(width)


def _of_layers(
    text: Mapping[str, Any], layers: int, tp_size: int, precision: Precision
) -> dict[str, Any]:
    """Return what follows from the number of layers: cache, attention, kernels and exchanges."""
    heads, kv_heads, head_dim = _heads(text)
    own_heads, own_kv_heads = heads / tp_size, max(1.0, kv_heads / tp_size)
    # Of attention and of what follows, in a ring; and the logits.
    states = 2 * layers * _number(text, "hidden_size") * 2
    logits = int(text.get("draft_vocab_size") or _number(text, "vocab_size"))
    sent = precision.state * (states + logits) * (tp_size - 1) / tp_size
    return {
        "kv_bytes_per_token": round(2 * layers * own_kv_heads * head_dim * precision.state),
        "attention_flops": round(4 * layers * own_heads * head_dim),
        "num_kernels": KERNELS_PER_LAYER * layers + KERNELS_PER_PASS,
        "num_exchanges": 2 * layers + 1 if tp_size > 1 else 0,
        "sent_bytes_per_token": sent,
    }


def _heads(text: Mapping[str, Any]) -> tuple[int, int, int]:
    heads = _number(text, "num_attention_heads")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or _number(text, "hidden_size") // heads)
    return heads, kv_heads, head_dim


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProfileError(f"the config has no usable {name!r}: {value!r}")
    return value
