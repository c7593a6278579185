"""LoRA adapters: half of a batch on one, and every answer is plain decoding's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.harness.counters import cast_state
from benchmarks.harness.pairs import Pair
from benchmarks.harness.servers import Server
from tests.server.client import GREEDY, REQUEST_SECONDS, in_parallel
from tests.server.conftest import NUM_TOKENS, ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

RANK, BATCH = 4, 8
MODULES = ("q_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def flags(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    adapter = write_adapter(tmp_path_factory.mktemp("lora") / "adapter", Path(pair.target))
    return ("--enable-lora", "--lora-paths", f"other={adapter}", "--max-loras-per-batch", "2")


@pytest.fixture(scope="module")
def plain_lora(start_server: ServerFactory, flags: tuple[str, ...]) -> Iterator[Server]:
    with start_server("plain", *flags, name="plain-lora") as server:
        yield server


@pytest.fixture(scope="module")
def cast_lora(start_server: ServerFactory, flags: tuple[str, ...]) -> Iterator[Server]:
    # By made-up costs alone, by which drafts pay on every machine.
    with start_server("cast", *flags, "--cast-residuals", "off", name="cast-lora") as server:
        yield server


def write_adapter(path: Path, target: Path) -> Path:
    """Write an adapter with random weights, large enough to change answers."""
    config = json.loads((target / "config.json").read_text())
    width = config["num_attention_heads"] * config["head_dim"]
    sizes = {
        "q_proj": (config["hidden_size"], width),
        "v_proj": (config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]),
        "o_proj": (width, config["hidden_size"]),
    }
    torch.manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            inputs, outputs = sizes[module]
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
            weights[f"{name}.lora_B.weight"] = 0.05 * torch.randn(outputs, RANK)
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    settings |= {"target_modules": list(MODULES), "bias": "none", "lora_dropout": 0.0}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def ask(server: Server, prompt: str, adapter: str | None) -> list[int]:
    body: dict[str, Any] = {"text": prompt, "lora_path": adapter}
    body["sampling_params"] = {**GREEDY, "max_new_tokens": NUM_TOKENS}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=REQUEST_SECONDS)
    assert response.is_success, response.text
    return list(response.json()["output_ids"])


def test_answers_with_and_without_an_adapter_are_plain_decodings(plain_lora, cast_lora, prompts):
    asks = [
        (prompt, "other" if index % 2 else None) for index, prompt in enumerate(prompts[:BATCH])
    ]
    expected = [ask(plain_lora, *each) for each in asks]
    for prompt, adapter in asks[1::2]:
        assert adapter and ask(plain_lora, prompt, None) != ask(plain_lora, prompt, adapter)
    before = cast_state(cast_lora)
    assert [ask(cast_lora, *each) for each in asks] == expected
    assert in_parallel(lambda each: ask(cast_lora, *each), asks, workers=BATCH) == expected
    after = cast_state(cast_lora)
    assert after["drafts_accepted"] - before["drafts_accepted"] > BATCH * NUM_TOKENS / 2
    cast_lora.check()
