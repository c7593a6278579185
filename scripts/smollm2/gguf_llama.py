"""A Llama model from a GGUF file, written as Hugging Face folders are: weights, config, tokenizer.

GGUF is the format of llama.cpp. It names tensors in its own way, keeps them quantised, and orders
the rows of queries and keys for its own rotary embedding.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# The names of both formats; those of a layer lack `blk.N.` there and `model.layers.N.` here.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
CONTROL_TOKEN = 3  # of `tokenizer.ggml.token_type`


class UnsupportedModelError(ValueError):
    """The file holds a model that this module cannot convert; the message says why."""


def convert(file: Path, directory: Path) -> None:
    """Write the model of a GGUF file into an existing directory, with its weights in bfloat16.

    Raises:
        UnsupportedModelError: it is no Llama with a byte-level tokenizer, or has other tensors.
    """
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, value in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(name) != value:
            raise UnsupportedModelError(f"{file}: {name} is {fields.get(name)!r}, not {value!r}")
    save_file(tensors(reader, fields), directory / "model.safetensors", metadata={"format": "pt"})
    is_tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    _write(directory / "config.json", model_config(fields, is_tied))
    _write(directory / "generation_config.json", _special_ids(fields))
    tokenizer(fields).save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", tokenizer_config(fields))


def tensors(reader: gguf.GGUFReader, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights in bfloat16 by the names of Hugging Face."""
    heads = {
        "attn_q.weight": fields["llama.attention.head_count"],
        "attn_k.weight": fields["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        layer_name = tensor.name.split(".", 2)[-1]
        if tensor.name.startswith("blk.") and layer_name in LAYER_TENSORS:
            name = f"model.layers.{tensor.name.split('.')[1]}.{LAYER_TENSORS[layer_name]}"
            if layer_name in heads:
                weights = rows_in_halves(weights, heads[layer_name])
        elif tensor.name in TENSORS:
            name = TENSORS[tensor.name]
        else:
            raise UnsupportedModelError(f"no Llama has a tensor {tensor.name}")
        found[name] = torch.from_numpy(np.array(weights, dtype=np.float32)).to(torch.bfloat16)
    return found


def rows_in_halves(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Return the rows of queries or keys in the order of Hugging Face.

    A rotary embedding turns pairs of a head's rows. In llama.cpp the two of a pair are neighbours,
    in Hugging Face they are half a head apart.
    """
    num_rows, *rest = weights.shape
    pairs = weights.reshape(num_heads, num_rows // num_heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def model_config(fields: dict[str, Any], is_tied: bool) -> dict[str, Any]:
    """Return `config.json`."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # The file keeps it as a float of 32 bits.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        **_special_ids(fields),
    }


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer: byte-level BPE that splits off every digit, as SmolLM's does."""
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=fields["tokenizer.ggml.add_space_prefix"]),
        ]
    )
    made.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, types, strict=True) if kind == CONTROL_TOKEN]
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    return made


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer_config.json`."""
    words = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
        **{
            f"{short}_token": words[fields[f"tokenizer.ggml.{long}_token_id"]]
            for short, long in names.items()
        },
    }


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{short}_token_id": fields[f"tokenizer.ggml.{long}_token_id"]
        for short, long in names.items()
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
