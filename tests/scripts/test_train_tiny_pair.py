"""The tiny pair: smoke training ends in a loadable pair, and its parts mean what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import train_tiny_pair  # noqa: E402
from draft_trainer import export  # noqa: E402
from tiny_pair import corpus, prompts  # noqa: E402
from tiny_pair.target_checkpoint import SHAPE  # noqa: E402
from tiny_pair.windows import WindowSampler  # noqa: E402

from tests.support.profiles import write_profile  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The folder of a finished smoke run: `pair` and `work` below it."""
    folder = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, str(SCRIPTS / "train_tiny_pair.py"), *smoke_arguments(folder)]
    subprocess.run(command, check=True, timeout=300)
    return folder


def smoke_arguments(folder: Path) -> list[str]:
    # On a busy machine two threads mostly wait for each other: four times as long as one.
    arguments = ["--smoke", "--num-threads", "1"]
    return [*arguments, "--work-dir", str(folder / "work"), "--output-dir", str(folder / "pair")]


def test_smoke_writes_everything(smoke):
    pair = smoke / "pair"
    for name in ("README.md", "loss_curves.csv", "loss_curves.png", "evaluation.json"):
        assert (pair / name).stat().st_size > 0
    evaluation = json.loads((pair / "evaluation.json").read_text())
    assert 1.0 <= evaluation["accept_length"] <= 6.0
    assert "{" not in (pair / "README.md").read_text()


def test_target_loads_in_transformers(smoke):
    folder = smoke / "pair" / "target"
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True)
        target = export.load_target(folder, aux_layer_ids=(1, 3, 6))
        actual = target(tokens).states
        logits = target.logits(actual)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    features = torch.cat([expected.hidden_states[i + 1] for i in (1, 3, 6)], dim=-1)
    torch.testing.assert_close(actual[..., :-256], features, rtol=1e-4, atol=1e-4)


def test_tokenizer_loads_in_transformers(smoke):
    tokenizer = AutoTokenizer.from_pretrained(smoke / "pair" / "target")
    text = "def f(x):\n    return x + 1  # \u00e9\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == corpus.END_OF_TEXT
    messages = [{"role": "user", "content": "Write f."}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert corpus.format_turn("Write f.", "pass") == f"{chat}pass{corpus.END}\n"
    end = tokenizer.convert_tokens_to_ids(corpus.END)
    generation = json.loads((smoke / "pair/target/generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, end]


def test_draft_loads(smoke):
    draft = export.load_draft(smoke / "pair" / "draft", num_target_layers=8)
    assert draft.shape == SHAPE
    config = json.loads((smoke / "pair" / "draft" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == config["vocab_size"] == 2048


def test_prompts_come_from_held_out_modules(smoke):
    records = prompts.read_prompts(smoke / "pair" / "heldout_prompts.jsonl")
    assert [record["id"] for record in records] == ["heldout-000", "heldout-001"]
    assert {record["module"] for record in records} == {corpus.SMOKE_HELD_OUT}


def test_stages_resume_from_files(smoke):
    """A finished stage that is asked for again changes nothing but its evaluation."""
    weights = smoke / "pair" / "target" / "model.safetensors"
    before = weights.read_bytes()
    num_threads = torch.get_num_threads()
    train_tiny_pair.main([*smoke_arguments(smoke), "--stage", "target"])
    torch.set_num_threads(num_threads)
    assert weights.read_bytes() == before


def test_a_head_is_tuned_from_the_command_line(smoke, tmp_path):
    pair, out = smoke / "pair", tmp_path / "tuned"
    command = [sys.executable, str(SCRIPTS / "train_draft.py"), "--target", str(pair / "target")]
    command += ["--other-work", str(smoke / "work/draft"), "--work", str(tmp_path / "work")]
    command += ["--reference", str(pair / "draft"), "--phase", "gto", "--out", str(out)]
    command += ["--gto-profile", str(write_profile(tmp_path / "made-up.json"))]
    command += ["--gto-tree", "3", "4", "8", "--gto-group", "4", "--aux-layers", "1", "3", "6"]
    command += ["--eval-data", str(pair / "heldout_prompts.jsonl"), "--minutes", "0.02"]
    for stage in ("draft", "eval", "card"):
        subprocess.run([*command, "--batch-tokens", "512", "--stage", stage], check=True)
    tuned, before = (
        export.load_draft(folder, num_target_layers=8) for folder in (out, pair / "draft")
    )
    assert not torch.equal(tuned.fc.weight, before.fc.weight)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["steps"] >= 1 and len(evaluation["served"]) == evaluation["num_prompts"] == 2
    for trees in evaluation["served"]:
        assert 0 <= trees["expected"] <= trees["num_rows"] - 1 <= 7 and 0 <= trees["greedy"] <= 3
    assert sum(length for _, length in evaluation["prompts"]) >= 2 * 120  # all new tokens
    assert "then tuned by group trees" in (out / "README.md").read_text()


def test_windows_repeat_only_after_an_epoch():
    tokens = np.arange(256 * 12, dtype=np.uint16)
    sampler = WindowSampler(tokens, seed=0)
    epoch = sampler.draw(0, 10, 8)
    assert len(set(epoch[:, 0].tolist())) == 10
    again = WindowSampler(tokens, seed=0)
    assert torch.equal(again.draw(4, 6, 8), epoch[4:])


def test_held_out_split_is_fixed():
    modules = [f"package/module_{i}.py" for i in range(2000)]
    part = sum(map(corpus.is_held_out, modules)) / len(modules)
    assert part == pytest.approx(corpus.HELD_OUT_PERCENT / 100, abs=0.01)
    assert corpus.is_held_out("textwrap.py") == corpus.is_held_out("textwrap.py")
