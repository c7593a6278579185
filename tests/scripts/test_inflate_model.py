"""Inflated models are larger and compute what the trained ones do."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import inflate_model
from draft_trainer import export
from draft_trainer.draft_model import Draft
from draft_trainer.one_pass import CascadeDraft, ParallelDraft

from tests.support.small_models import SMALL

SHAPE = dataclasses.replace(
    SMALL,
    vocab_size=96,
    intermediate_size=56,
    num_layers=8,
    max_position_embeddings=128,
    aux_layer_ids=(1, 3, 6),
)
NUM_STEPS = 3


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw weights large enough that every part of the model matters, norms included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * values if parameter.ndim == 1 else 0.2 * values


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A random target written by transformers, and a random draft."""
    folder = tmp_path_factory.mktemp("pair")
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        rms_norm_eps=1e-2,  # large, so that a forgotten scale of it shows
        max_position_embeddings=SHAPE.max_position_embeddings,
        tie_word_embeddings=request.param,
        bos_token_id=None,
        eos_token_id=None,
    )
    target = LlamaForCausalLM(config)
    randomize(target, seed=1)
    target.save_pretrained(folder / "target")
    draft = Draft(SHAPE, torch.arange(SHAPE.vocab_size))
    randomize(draft, seed=2)
    export.save_draft(draft, folder / "draft")
    return folder / "target", folder / "draft"


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def read_by(
    target_path: Path, draft_path: Path, tokens: torch.Tensor
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the draft, and what it reads of the target: features and embeddings [B, T, *]."""
    target = load(target_path)
    draft = export.load_draft(draft_path, num_target_layers=target.config.num_hidden_layers)
    states = target(tokens, output_hidden_states=True).hidden_states
    features = torch.cat([states[i + 1] for i in draft.shape.aux_layer_ids], dim=-1)
    return draft, features, target.get_input_embeddings()(tokens)


@torch.no_grad()
def draft_logits(target_path: Path, draft_path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the draft's logits on committed slots and on self-fed steps: [1 + steps, T, V]."""
    draft, features, embeds = read_by(target_path, draft_path, tokens)
    num_bases = tokens.shape[1] - NUM_STEPS - 1
    causal = torch.ones(num_bases, num_bases, dtype=torch.bool).tril()
    output = draft.extend(embeds[:, 1 : 1 + num_bases], features[:, :num_bases])
    committed, chain, logits = output.cache, [], [draft.logits(output.hidden)[0]]
    for step in range(1, 1 + NUM_STEPS):
        slots = embeds[:, 1 + step : 1 + step + num_bases]
        positions = torch.arange(num_bases) + step
        output = draft.step(slots, output.hidden, positions, committed, causal, chain)
        chain.append(output.cache)
        logits.append(draft.logits(output.hidden)[0])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("width_factor", "extra_layers", "intermediate_size", "draft_intermediate_size"),
    [(1, 0, None, None), (4, 0, None, None), (4, 3, 250, 57), (16, 1, 56, None), (1, 2, 57, 56)],
)
def test_same_function(
    pair, tmp_path, width_factor, extra_layers, intermediate_size, draft_intermediate_size
):
    inflate_model.inflate_pair(
        *pair,
        tmp_path,
        width_factor=width_factor,
        extra_layers=extra_layers,
        intermediate_size=intermediate_size,
        draft_intermediate_size=draft_intermediate_size,
        dtype=torch.float32,
    )
    tokens = torch.randint(SHAPE.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))
    trained, inflated = load(pair[0]), load(tmp_path / "target")
    assert inflated.config.hidden_size == width_factor * SHAPE.hidden_size
    assert inflated.config.num_hidden_layers == SHAPE.num_layers + extra_layers
    with torch.no_grad():
        expected, actual = trained(tokens).logits, inflated(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(inflated.generate(tokens, **settings), trained.generate(tokens, **settings))
    torch.testing.assert_close(
        draft_logits(tmp_path / "target", tmp_path / "draft", tokens[:1]),
        draft_logits(*pair, tokens[:1]),
        rtol=1e-4,
        atol=1e-4,
    )


@torch.no_grad()
def layer_logits(target_path: Path, draft_path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of all layers of a one-pass head behind two bases: [layers, 2, V]."""
    draft, features, embeds = read_by(target_path, draft_path, tokens)
    bases = torch.tensor([[5, 17]])
    unrolled = draft.unroll(embeds[:, 1:], features[:, :-1], bases, None, draft.num_steps)
    return torch.stack([draft.logits(each.hidden[0]) for each in unrolled])


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("kind", [CascadeDraft, ParallelDraft])
def test_heads_of_one_pass_keep_their_function(pair, tmp_path, kind, has_norms):
    head = kind(SHAPE, torch.arange(SHAPE.vocab_size), has_norms, 3)
    randomize(head, seed=4)
    export.save_draft(head, tmp_path / "head")
    inflate_model.inflate_pair(
        pair[0], tmp_path / "head", tmp_path / "wide", extra_layers=1, dtype=torch.float32
    )
    tokens = torch.randint(SHAPE.vocab_size, (1, 24), generator=torch.Generator().manual_seed(3))
    found = layer_logits(tmp_path / "wide/target", tmp_path / "wide/draft", tokens)
    expected = layer_logits(pair[0], tmp_path / "head", tokens)
    assert len(found) == head.num_steps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "wide/draft/config.json").read_text())
    assert written["num_hidden_layers"] == 3 and written["one_pass_depth"] == head.num_steps


def test_default_capture_becomes_explicit(pair, tmp_path):
    """Without layer ids SGLang captures by the layer count, which added layers change."""
    draft_path = tmp_path / "plain_draft"
    draft_path.mkdir()
    for file in pair[1].iterdir():
        (draft_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((draft_path / "config.json").read_text())
    del config["eagle_config"]
    (draft_path / "config.json").write_text(json.dumps(config))
    inflate_model.inflate_pair(pair[0], draft_path, tmp_path, extra_layers=2)
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    # Inputs of layers 2, 8 / 2 and 8 - 3.
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]


def test_bfloat16_halving_is_exact(pair, tmp_path):
    inflate_model.inflate_pair(*pair, tmp_path, width_factor=16, dtype=torch.bfloat16)
    trained = LlamaForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16)
    inflated = LlamaForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.bfloat16)
    assert torch.equal(
        4 * inflated.model.norm.weight[: SHAPE.hidden_size], trained.model.norm.weight
    )
    assert inflated.config.rms_norm_eps == trained.config.rms_norm_eps / 16


@pytest.mark.parametrize(("width_factor", "extra_layers"), [(1, 0), (4, 2), (16, 0)])
def test_reaches_the_parameter_count(pair, tmp_path, width_factor, extra_layers):
    wanted = 7_000_000
    num_params = inflate_model.inflate_pair(
        pair[0],
        None,
        tmp_path,
        width_factor=width_factor,
        extra_layers=extra_layers,
        target_params=wanted,
    )
    assert load(tmp_path / "target").num_parameters() == num_params
    assert num_params == pytest.approx(wanted, rel=0.06)  # MLP widths come in steps of 64
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize("text", ["170M", "0.17B", "170000K", "170000000"])
def test_parse_count(text):
    assert inflate_model.parse_count(text) == 170_000_000


@pytest.mark.parametrize(
    ("choice", "flag"),
    [
        ({"width_factor": 2}, "--width-factor"),
        ({"width_factor": 3}, "--width-factor"),
        ({"width_factor": 0}, "--width-factor"),
        ({"extra_layers": -1}, "--extra-layers"),
        ({"intermediate_size": 8}, "--intermediate-size"),
        ({"draft_intermediate_size": 8}, "--draft-intermediate-size"),
        ({"target_params": 1000}, "--target-params"),
        ({"target_params": 1000, "intermediate_size": 99}, "--target-params"),
    ],
)
def test_errors_name_the_flag(pair, tmp_path, choice, flag):
    with pytest.raises(ValueError, match=flag):
        inflate_model.inflate_pair(*pair, tmp_path, **choice)


def test_trained_pair_is_not_overwritten(pair):
    with pytest.raises(ValueError, match="--output-dir"):
        inflate_model.inflate_pair(*pair, pair[0].parent)
    assert load(pair[0]).config.hidden_size == SHAPE.hidden_size


def test_command_line_reports_errors(pair, tmp_path):
    with pytest.raises(SystemExit, match="--width-factor"):
        inflate_model.main(
            ["--model-path", str(pair[0]), "--output-dir", str(tmp_path), "--width-factor", "8"]
        )


def test_command_line(pair, tmp_path, capsys):
    inflate_model.main(
        [
            *("--model-path", str(pair[0]), "--draft-path", str(pair[1])),
            *("--output-dir", str(tmp_path), "--target-params", "3M", "--dtype", "float32"),
        ]
    )
    assert "parameters" in capsys.readouterr().out
    assert "behaves as the trained one" in (tmp_path / "README.txt").read_text()


def test_unknown_tensor_is_refused():
    sizes = inflate_model.Sizes.from_config(
        {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    )
    with pytest.raises(ValueError, match="bias"):
        inflate_model.inflate_tensor("layers.0.self_attn.q_proj.bias", torch.zeros(8), sizes, sizes)
