"""Models of the draft trainer, small enough for a test."""

import sys
from pathlib import Path

import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from draft_trainer.layers import Shape  # noqa: E402

SMALL = Shape(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    aux_layer_ids=(0, 1, 2),
)
ALL_TOKENS = torch.arange(SMALL.vocab_size)


def with_opinions(model: nn.Module) -> nn.Module:
    """Return an untrained model with weights large enough to have opinions."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    return model.eval()
