"""Norm and rotary embedding against their formulas."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from cast_sglang.cpu import layers


def make_rotary(head_size, positions=64, dtype=torch.float32, **changes):
    angles = torch.randn(positions, head_size // 2)
    cache = torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)
    fields = dict(
        head_size=head_size, rotary_dim=head_size, is_neox_style=True, cos_sin_cache=cache
    )
    return SimpleNamespace(**(fields | changes))


def rotate_one(x, cos, sin):
    half = len(x) // 2
    return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_rotary_matches_its_formula(num_tokens, dtype, tolerance):
    layer = make_rotary(8, dtype=dtype)
    # As the attention layer passes them: slices of one projection.
    qkv = torch.randn(num_tokens, 3 * 8 + 2 * 8 + 2 * 8).to(dtype)
    query, key, _ = qkv.split([24, 16, 16], dim=1)
    positions = torch.randint(0, 64, (num_tokens,))
    out = layers.rotate(layer, positions, query, key)
    for x, y in zip((query, key), out, strict=True):
        assert y.shape == x.shape
        for t in range(num_tokens):
            cos, sin = layer.cos_sin_cache[positions[t]].double().chunk(2)
            heads = zip(x[t].double().split(8), y[t].double().split(8), strict=True)
            for before, after in heads:
                torch.testing.assert_close(
                    after, rotate_one(before, cos, sin), atol=tolerance, rtol=0
                )


def test_rotary_table_follows_a_longer_cache():
    layer = make_rotary(8, positions=4)
    layers.rotate(layer, torch.tensor([3]), torch.randn(1, 8), torch.randn(1, 8))
    layer.cos_sin_cache = make_rotary(8, positions=9).cos_sin_cache
    assert layers.rotary_table(layer, torch.float32).shape == (9, 2, 8)


@pytest.mark.parametrize("changes", [{"is_neox_style": False}, {"rotary_dim": 4}])
def test_other_rotary_styles_keep_sglangs_own_code(changes):
    layer = make_rotary(8, forward_native=lambda *args: "native", **changes)
    assert layers.rotate(layer, torch.tensor([0]), torch.randn(1, 8), torch.randn(1, 8)) == "native"


def make_norm(size, **changes):
    fields = dict(
        hidden_size=size,
        weight=torch.rand(size) + 0.5,
        variance_epsilon=1e-5,
        variance_size_override=None,
        forward_native=lambda *args: "native",
    )
    return SimpleNamespace(**(fields | changes))


def test_norm_adds_the_residual_first():
    layer = make_norm(16)
    x, residual = torch.randn(5, 16), torch.randn(5, 16)
    out, total = layers.rms_norm(layer, x, residual)
    torch.testing.assert_close(total, x + residual)
    mean_square = (total * total).mean(dim=1, keepdim=True)
    torch.testing.assert_close(out, total / (mean_square + 1e-5).sqrt() * layer.weight)
    torch.testing.assert_close(layers.rms_norm(layer, total), out)


def test_norm_of_low_precision_keeps_sglangs_rounding():
    layer = make_norm(16)
    assert layers.rms_norm(layer, torch.randn(2, 16).bfloat16()) == "native"
    assert layers.rms_norm(make_norm(16, variance_size_override=8), torch.randn(2, 16)) == "native"
