"""Checkpoints in the layout that SGLang and transformers read."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .draft_model import Draft, Head
from .layers import Shape, usual_aux_layers
from .one_pass import CascadeDraft, OnePassDraft, ParallelDraft
from .target_model import Target

# The classes that serve heads: SGLang's own, and those of `cast_sglang.serving.heads`.
ARCHITECTURES: dict[str, type[Head]] = {
    "LlamaForCausalLMEagle3": Draft,
    "LlamaForCausalLMCascadeEagle3": CascadeDraft,
    "LlamaForCausalLMParallelEagle3": ParallelDraft,
}


def save_draft(draft: Head, folder: Path) -> None:
    """Write bf16 weights and configuration of the draft."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = draft.vocabulary
    state = draft.state_dict()
    # Draft id + d2t = target id.
    state["d2t"] = vocabulary - torch.arange(len(vocabulary))
    state["t2d"] = torch.zeros(draft.shape.vocab_size, dtype=torch.bool)
    state["t2d"][vocabulary] = True
    save_weights(state, folder)
    [architecture] = [name for name, kind in ARCHITECTURES.items() if type(draft) is kind]
    config = llama_config(draft.shape) | {
        "architectures": [architecture],
        "num_hidden_layers": 1,
        "draft_vocab_size": len(vocabulary),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(draft.shape.aux_layer_ids),
        },
    }
    if isinstance(draft, OnePassDraft):
        config["num_hidden_layers"] = len(draft.layers)
        config["one_pass_depth"] = draft.num_steps
    if draft.has_norms:
        config["fc_norm"] = True
        config["norm_output"] = isinstance(draft, Draft)
    write_json(folder / "config.json", config)


def load_target(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    aux_layer_ids: tuple[int, ...] | None = None,
) -> Target:
    """Read a Llama checkpoint of one file.

    Args:
        folder: with `config.json` and `model.safetensors`.
        dtype: to compute in.
        aux_layer_ids: layers whose outputs the draft sees; those that SGLang takes by itself if
            None.

    Raises:
        ValueError: the model is of another architecture, or uses what `Target` lacks.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise ValueError(f"{folder}: only LlamaForCausalLM is known, not {config['architectures']}")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: rotary embedding of type {rope['rope_type']} is not known")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{folder}: layers with biases are not known")
    usual = usual_aux_layers(config["num_hidden_layers"])
    target = Target(_shape_of(config, aux_layer_ids or usual))
    state = _load_weights(folder)
    if target.shape.ties_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    target.load_state_dict(state)
    return target.to(dtype).eval()


def load_draft(folder: Path, num_target_layers: int) -> Head:
    """Read a head that `save_draft` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    aux_layer_ids = tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    shape = replace(_shape_of(config, aux_layer_ids), num_layers=num_target_layers)
    state = _load_weights(folder)
    offsets = state.pop("d2t")
    del state["t2d"]
    kind, sizes = ARCHITECTURES[config["architectures"][0]], {}
    if issubclass(kind, OnePassDraft):
        sizes["num_layers"] = config["num_hidden_layers"]
    if kind is ParallelDraft:
        sizes["num_steps"] = config["one_pass_depth"]
    vocabulary, has_norms = offsets + torch.arange(len(offsets)), config.get("fc_norm", False)
    draft = kind(shape, vocabulary, has_norms, **sizes)
    draft.load_state_dict(state)
    return draft.eval()


def llama_config(shape: Shape) -> dict[str, object]:
    return {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": shape.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def _shape_of(config: dict, aux_layer_ids: tuple[int, ...]) -> Shape:
    num_heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config  # transformers 5 keeps it one level down
    return Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        rope_theta=rope["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=config["max_position_embeddings"],
        aux_layer_ids=aux_layer_ids,
        ties_embeddings=config.get("tie_word_embeddings", False),
    )


def save_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
    weights = {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    temporary = folder / "model.safetensors.tmp"
    save_file(weights, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(folder / "model.safetensors")  # a server that reads the old file keeps it


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "model.safetensors")
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
