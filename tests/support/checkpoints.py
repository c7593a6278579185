"""Checkpoints of other drafts for the tiny target: an MTP layer and an EAGLE-1 head.

Both hand the target's state on, so they propose the token before once more. That is often wrong and
now and then right, which is enough to see that answers do not depend on it.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_mtp_target(directory: Path, target: Path) -> Path:
    """Write the tiny target as a model of SGLang's MiMo class, with its MTP layer."""
    weights, config = load_file(target / "model.safetensors"), _config(target)
    for layer in range(config["num_hidden_layers"]):
        weights |= _biases(f"model.layers.{layer}.", config)
    size, name = config["hidden_size"], "model.mtp_layers.0."
    ones = torch.ones(size, dtype=torch.bfloat16)
    weights |= {
        **{f"{name}{norm}_layernorm.weight": ones.clone() for norm in ("token", "hidden", "final")},
        f"{name}input_proj.weight": _picked(size, first=True),
        **_idle_layer(name, config),
        **_biases(name, config),
    }
    changes = {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "use_sliding_window": False,
    }
    return write_checkpoint(directory, weights, {**config, **changes}, target)


def write_eagle1_draft(directory: Path, target: Path) -> Path:
    """Write an EAGLE-1 head of the tiny target."""
    config = _config(target)
    size = config["hidden_size"]
    layer = _idle_layer("layers.0.", config)
    del layer["layers.0.input_layernorm.weight"]
    bias = torch.zeros(size, dtype=torch.bfloat16)
    weights = {"fc.weight": _picked(size, first=False), "fc.bias": bias, **layer}
    changes = {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    return write_checkpoint(directory, weights, {**config, **changes}, target)


def _config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def _picked(size: int, first: bool) -> torch.Tensor:
    """Return [size, 2 * size], which takes one half of what it is given."""
    halves = [torch.zeros(size, size), torch.zeros(size, size)]
    halves[0 if first else 1] = torch.eye(size)
    return torch.cat(halves, dim=1).bfloat16()


def _idle_layer(name: str, config: dict) -> dict[str, torch.Tensor]:
    """Return a decoder layer that adds nothing."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (heads * config["head_dim"], size),
        "self_attn.k_proj": (kv_heads * config["head_dim"], size),
        "self_attn.v_proj": (kv_heads * config["head_dim"], size),
        "self_attn.o_proj": (size, heads * config["head_dim"]),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    weights = {}
    for part, shape in shapes.items():
        adds = part.endswith(("o_proj", "down_proj"))
        values = torch.zeros(shape) if adds else torch.randn(shape, generator=generator) / 16
        weights[f"{name}{part}.weight"] = values.bfloat16()
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{name}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    return weights


def _biases(name: str, config: dict) -> dict[str, torch.Tensor]:
    heads = {"q": config["num_attention_heads"]}
    heads |= dict.fromkeys(("k", "v"), config["num_key_value_heads"])
    return {
        f"{name}self_attn.{part}_proj.bias": torch.zeros(
            count * config["head_dim"], dtype=torch.bfloat16
        )
        for part, count in heads.items()
    }


def write_checkpoint(directory: Path, weights: dict, config: dict, target: Path) -> Path:
    """Write a model's weights and configuration, beside the tokenizer of the target."""
    directory.mkdir()
    for file in target.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, directory)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: part.contiguous() for name, part in weights.items()}, directory / "model.safetensors"
    )
    return directory
