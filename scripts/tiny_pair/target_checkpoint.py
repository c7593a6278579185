"""The tiny target's sizes, and its checkpoint as SGLang and transformers read it."""

from pathlib import Path

from draft_trainer.export import llama_config, save_weights, write_json
from draft_trainer.layers import Shape
from draft_trainer.target_model import Target
from tokenizers import Tokenizer

from .corpus import END, END_OF_TEXT
from .tokenizer import MAX_CONTEXT, VOCAB_SIZE, save_tokenizer

SHAPE = Shape(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=768,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=MAX_CONTEXT,
    aux_layer_ids=(1, 3, 6),
)


def save_target(target: Target, tokenizer: Tokenizer, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer of the target."""
    save_tokenizer(tokenizer, folder)
    save_weights(target.state_dict(), folder)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    config = llama_config(target.shape) | {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": target.shape.num_layers,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    write_json(folder / "config.json", config)
    generation = {
        "bos_token_id": None,
        "eos_token_id": [end_of_text, tokenizer.token_to_id(END)],
        "pad_token_id": end_of_text,
    }
    write_json(folder / "generation_config.json", generation)


def num_parameters() -> int:
    """Return the number of the target's weights."""
    return sum(parameter.numel() for parameter in Target(SHAPE).parameters())
