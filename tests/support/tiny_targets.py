"""Tiny targets with latent and with linear attention: random weights and an MTP layer each.

A target mostly answers a token with a fixed other one, which its layers talk it out of now and then
by what stands before. The MTP layer proposes the fixed one, so its drafts are accepted as often as
not, and answers depend on every layer.
"""

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import write_checkpoint

HIDDEN, HEADS, HEAD_DIM, INNER, EXPERTS = 64, 2, 32, 64, 4
# Spread of what a layer's halves add to an embedding of spread 1; found by counting how many of the
# drafts are accepted.
ADDED = 0.6


class _Weights:
    """Random weights by name, as a checkpoint has them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, name: str, *shape: int, spread: float | None = None) -> None:
        """Draw a weight; without a spread it keeps that of its inputs."""
        scale = shape[-1] ** -0.5 if spread is None else spread
        self.tensors[name] = torch.randn(shape, generator=self._generator) * scale

    def fill(self, name: str, size: int, value: float) -> None:
        self.tensors[name] = torch.full((size,), value)

    def mlp(self, name: str, *, added: float = ADDED) -> None:
        for part in ("gate_proj", "up_proj"):
            self.draw(f"{name}.{part}.weight", INNER, HIDDEN)
        self.draw(f"{name}.down_proj.weight", HIDDEN, INNER, spread=2 * added * INNER**-0.5)

    def ends(self, vocab: int, norm: float) -> None:
        """Draw embedding and head, which answers a token with the next but one."""
        self.draw("model.embed_tokens.weight", vocab, HIDDEN, spread=1.0)
        self.tensors["lm_head.weight"] = self.tensors["model.embed_tokens.weight"].roll(2, dims=0)
        self.fill("model.norm.weight", HIDDEN, norm)


def _norms(weights: _Weights, layer: str, value: float) -> None:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights.fill(f"{layer}.{norm}.weight", HIDDEN, value)


def _first_half(size: int) -> torch.Tensor:
    return torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1)


def write_linear_target(directory: Path, target: Path) -> Path:
    """Write a Qwen3.5 text model: two gated delta nets before each layer of full attention."""
    config = _config(target)
    weights, layers, interval = _Weights(), 3, 3
    key = value = HEADS * HEAD_DIM
    weights.ends(config["vocab_size"], 0.0)  # its norms add 1
    for number in range(layers):
        layer = f"model.layers.{number}"
        _norms(weights, layer, 0.0)
        weights.mlp(f"{layer}.mlp")
        if (number + 1) % interval == 0:
            _gated_attention(weights, f"{layer}.self_attn")
            continue
        name = f"{layer}.linear_attn"
        weights.draw(f"{name}.in_proj_qkv.weight", 2 * key + value, HIDDEN)
        weights.draw(f"{name}.in_proj_z.weight", value, HIDDEN)
        for part in ("in_proj_a", "in_proj_b"):
            weights.draw(f"{name}.{part}.weight", HEADS, HIDDEN)
        weights.draw(f"{name}.conv1d.weight", 2 * key + value, 1, 4)
        weights.draw(f"{name}.dt_bias", HEADS, spread=1.0)
        weights.draw(f"{name}.A_log", HEADS, spread=1.0)
        weights.fill(f"{name}.norm.weight", HEAD_DIM, 1.0)
        spread = 2 * ADDED * value**-0.5
        weights.draw(f"{name}.out_proj.weight", HIDDEN, value, spread=spread)
    weights.tensors["mtp.fc.weight"] = _first_half(HIDDEN)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        weights.fill(f"mtp.{norm}.weight", HIDDEN, 0.0)
    _norms(weights, "mtp.layers.0", 0.0)
    _gated_attention(weights, "mtp.layers.0.self_attn", added=0.0)
    weights.mlp("mtp.layers.0.mlp", added=0.0)
    changes = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "num_hidden_layers": layers,
        "full_attention_interval": interval,
        "linear_num_key_heads": HEADS,
        "linear_num_value_heads": HEADS,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "mtp_num_hidden_layers": 1,
    }
    return write_checkpoint(directory, weights.tensors, {**config, **changes}, target)


def _gated_attention(weights: _Weights, name: str, *, added: float = ADDED) -> None:
    size = HEADS * HEAD_DIM
    weights.draw(f"{name}.q_proj.weight", 2 * size, HIDDEN)
    for part in ("k_proj", "v_proj"):
        weights.draw(f"{name}.{part}.weight", HEAD_DIM, HIDDEN)
    weights.draw(f"{name}.o_proj.weight", HIDDEN, size, spread=2 * added * size**-0.5)
    for norm in ("q_norm", "k_norm"):
        weights.fill(f"{name}.{norm}.weight", HEAD_DIM, 0.0)


def write_latent_target(directory: Path, target: Path) -> Path:
    """Write a DeepSeek-V3 model with multi-head latent attention; the experts are the MTP's."""
    config = _config(target)
    weights, layers, rank = _Weights(), 2, 256
    weights.ends(config["vocab_size"], 1.0)
    for number in range(layers):
        layer = f"model.layers.{number}"
        _norms(weights, layer, 1.0)
        weights.mlp(f"{layer}.mlp")
        _latent_attention(weights, f"{layer}.self_attn", rank)
    layer = f"model.layers.{layers}"
    _norms(weights, layer, 1.0)
    _latent_attention(weights, f"{layer}.self_attn", rank, added=0.0)
    weights.tensors[f"{layer}.eh_proj.weight"] = _first_half(HIDDEN)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        weights.fill(f"{layer}.{norm}.weight", HIDDEN, 1.0)
    weights.draw(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
    weights.mlp(f"{layer}.mlp.shared_experts", added=0.0)
    for expert in range(EXPERTS):
        weights.mlp(f"{layer}.mlp.experts.{expert}", added=0.0)
    changes = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": HEAD_DIM,
        "qk_rope_head_dim": HEAD_DIM,
        "v_head_dim": HEAD_DIM,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "n_shared_experts": 1,
        "first_k_dense_replace": layers,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    return write_checkpoint(directory, weights.tensors, {**config, **changes}, target)


def _latent_attention(weights: _Weights, name: str, rank: int, *, added: float = ADDED) -> None:
    weights.draw(f"{name}.q_proj.weight", 2 * HEADS * HEAD_DIM, HIDDEN)
    weights.draw(f"{name}.kv_a_proj_with_mqa.weight", rank + HEAD_DIM, HIDDEN)
    weights.fill(f"{name}.kv_a_layernorm.weight", rank, 1.0)
    weights.draw(f"{name}.kv_b_proj.weight", 2 * HEADS * HEAD_DIM, rank)
    size = HEADS * HEAD_DIM
    weights.draw(f"{name}.o_proj.weight", HIDDEN, size, spread=2 * added * size**-0.5)


def _config(target: Path) -> dict[str, Any]:
    """Return what the targets share; tokens are those of `target`."""
    theirs = json.loads((target / "config.json").read_text())
    kept = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "rope_theta")
    return {
        **{name: theirs[name] for name in kept},
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
