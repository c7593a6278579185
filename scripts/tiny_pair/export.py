"""Checkpoints in the layout that SGLang and transformers read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .corpus import END, END_OF_TEXT
from .draft_model import Draft
from .layers import Shape
from .target_model import Target
from .tokenizer import save_tokenizer


def save_target(target: Target, tokenizer: Tokenizer, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer of the target."""
    save_tokenizer(tokenizer, folder)
    _save_weights(target.state_dict(), folder)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = _llama_config(target.shape) | {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": target.shape.num_layers,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    _write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": None,
        "eos_token_id": [end_of_text, tokenizer.token_to_id(END)],
        "pad_token_id": end_of_text,
    }
    _write_json(folder / "generation_config.json", generation)


def save_draft(draft: Draft, folder: Path) -> None:
    """Write bf16 weights and configuration of the draft, which has the target's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = draft.shape.vocab_size
    state = draft.state_dict()
    # Draft id + d2t = target id: the draft's vocabulary is the target's, in the target's order.
    state["d2t"] = torch.zeros(vocab_size, dtype=torch.int64)
    state["t2d"] = torch.ones(vocab_size, dtype=torch.bool)
    _save_weights(state, folder)
    config = _llama_config(draft.shape) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": vocab_size,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(draft.shape.aux_layer_ids),
        },
    }
    _write_json(folder / "config.json", config)


def load_target(folder: Path) -> Target:
    """Read a target that `save_target` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    target = Target(_shape_of(config, num_layers=config["num_hidden_layers"]))
    target.load_state_dict(_load_weights(folder))
    return target


def load_draft(folder: Path, num_target_layers: int) -> Draft:
    """Read a draft that `save_draft` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    aux_layer_ids = tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    draft = Draft(_shape_of(config, num_layers=num_target_layers, aux_layer_ids=aux_layer_ids))
    state = _load_weights(folder)
    del state["d2t"], state["t2d"]
    draft.load_state_dict(state)
    return draft


def _llama_config(shape: Shape) -> dict[str, object]:
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


def _shape_of(config: dict, **overrides: object) -> Shape:
    return Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=config["max_position_embeddings"],
        **overrides,
    )


def _save_weights(state: dict[str, torch.Tensor], folder: Path) -> None:
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


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
