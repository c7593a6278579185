"""Weights that change while a server runs: each model gets its own, answers are the target's."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.counters import cast_state
from benchmarks.harness.pairs import Pair
from benchmarks.harness.servers import Server
from cast_sglang.serving.drift import COLLAPSED
from tests.server.client import REQUEST_SECONDS, generate
from tests.server.conftest import NUM_TOKENS, ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_ASKED = 6


@pytest.fixture(scope="module")
def eagle(start_server: ServerFactory) -> Iterator[Server]:
    # Its trees do not depend on what it has seen, so equal weights mean equal numbers of passes.
    with start_server("cast:eagle", name="cast-eagle-weights") as server:
        yield server


@pytest.fixture(scope="module")
def other_target(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with other weights, in all of its layers and in the embedding."""
    torch.manual_seed(0)
    return changed_copy(
        Path(pair.target),
        tmp_path_factory.mktemp("weights") / "target",
        lambda weight: weight + 0.02 * weight.std() * torch.randn_like(weight),
    )


def changed_copy(source: Path, to: Path, change: Any, **config: Any) -> Path:
    shutil.copytree(source, to)
    weights = load_file(to / "model.safetensors")
    changed = {
        name: change(weight.float()).to(weight.dtype) if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }
    save_file(changed, to / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(settings))
    return to


def cut_weights(checkpoint: Path) -> None:
    """Give a checkpoint a weight of another shape, as a mixed-up file has."""
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = torch.zeros(3, 5)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def update(server: Server, path: Path | str) -> tuple[bool, str]:
    """Return whether the server took the weights, and what it says."""
    answer = httpx.post(
        f"{server.url}/update_weights_from_disk",
        json={"model_path": str(path)},
        timeout=REQUEST_SECONDS,
    ).json()
    return answer["success"], answer["message"]


def ask(server: Server, prompts: list[str]) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of each answer and the passes that each took; 0 of plain decoding."""
    answers = generate(server, prompts[:NUM_ASKED], max_new_tokens=NUM_TOKENS)
    return (
        [answer["output_ids"] for answer in answers],
        [answer["meta_info"].get("spec_verify_ct", 0) for answer in answers],
    )


def test_the_targets_own_weights_change_nothing(eagle, pair, prompts, expected_ids):
    before = ask(eagle, prompts)
    assert update(eagle, pair.target)[0]
    assert ask(eagle, prompts) == before
    assert before[0] == expected_ids[:NUM_ASKED]


def test_another_target_answers_as_a_fresh_server_would(
    eagle, start_server, pair, other_target, prompts, expected_ids
):
    before = ask(eagle, prompts)
    assert update(eagle, other_target)[0]
    try:
        answers = ask(eagle, prompts)[0]
        with start_server(
            "cast:eagle", "--model-path", str(other_target), name="cast-other-target"
        ) as fresh:
            assert ask(eagle, prompts) == ask(fresh, prompts)
    finally:
        assert update(eagle, pair.target)[0]
    assert answers != expected_ids[:NUM_ASKED]
    assert ask(eagle, prompts) == before


@pytest.mark.parametrize("tags", [None, ["kv_cache"], ["weights"]], ids=str)
def test_drafts_are_as_good_after_a_sleep(eagle, prompts, tags):
    """The CPU platform keeps its memory; the rest of a sleep is as it is anywhere."""
    before = ask(eagle, prompts)
    for verb in ("release", "resume"):
        body = {} if tags is None else {"tags": tags}
        url = f"{eagle.url}/{verb}_memory_occupation"
        assert httpx.post(url, json=body, timeout=REQUEST_SECONDS).is_success
    assert ask(eagle, prompts) == before


def test_a_drafts_path_updates_the_draft_alone(eagle, pair, prompts, expected_ids, tmp_path):
    before = ask(eagle, prompts)
    useless = changed_copy(Path(pair.draft), tmp_path / "draft", torch.zeros_like)
    weights = load_file(useless / "model.safetensors")
    # A draft may bring an embedding; the one in use is the target's.
    target = load_file(Path(pair.target) / "model.safetensors")
    weights["embed_tokens.weight"] = torch.zeros_like(target["model.embed_tokens.weight"])
    save_file(weights, useless / "model.safetensors", metadata={"format": "pt"})
    assert update(eagle, useless)[0]
    tokens, passes = ask(eagle, prompts)
    assert tokens == expected_ids[:NUM_ASKED]
    assert sum(passes) > 1.2 * sum(before[1])
    assert update(eagle, pair.draft)[0]
    assert ask(eagle, prompts) == before


def test_a_draft_that_no_longer_fits_is_noticed_and_left_alone(
    start_server, pair, prompts, expected_ids, tmp_path
):
    """Within a minute of load: in the log, once, and in metrics; answers are those of before."""

    def turned(weight: torch.Tensor) -> torch.Tensor:
        return weight.roll(7, dims=0)  # as sure of its tokens, and they are others

    head = load_file(Path(pair.draft) / "model.safetensors")["lm_head.weight"].shape
    wrong = changed_copy(
        Path(pair.draft), tmp_path / "wrong", lambda w: turned(w) if w.shape == head else w
    )
    # By made-up costs alone, by which drafts that fit pay on every machine.
    flags = ("--enable-metrics", "--cast-residuals", "off")
    with start_server("cast", *flags, name="cast-drift") as server:
        for _ in range(3):
            ask(server, prompts)
        assert 0.5 < cast_state(server)["acceptance_ratio"] < 2.0
        assert update(server, wrong)[0]
        began, line = time.monotonic(), "drafts are accepted"
        while line not in server.log_path.read_text() and time.monotonic() < began + 60.0:
            assert ask(server, prompts)[0] == expected_ids[:NUM_ASKED]
        # What follows must not depend on tries, which are rare by now.
        before = cast_state(server)
        for _ in range(4):
            ask(server, prompts)
        after = cast_state(server)
        assert after["acceptance_ratio"] < COLLAPSED
        text = httpx.get(f"{server.url}/metrics", timeout=30.0).text
        [exported] = [row for row in text.splitlines() if row.startswith("cast:acceptance_ratio{")]
        assert float(exported.rpartition(" ")[2]) < COLLAPSED
        gained = {name: after[name] - before[name] for name in ("steps", "plain_steps")}
        assert gained["plain_steps"] > 0.8 * gained["steps"]
        log = server.log_path.read_text()
        assert log.count(line) == 1 and f"the draft were updated from {wrong}" in log


def test_what_does_not_fit_is_refused_and_nothing_changes(eagle, pair, prompts, tmp_path):
    before = ask(eagle, prompts)

    def same(weight: torch.Tensor) -> torch.Tensor:
        return weight

    deep = changed_copy(Path(pair.target), tmp_path / "deep", same, num_hidden_layers=99)
    wide = changed_copy(Path(pair.draft), tmp_path / "wide", same, hidden_size=999)
    narrow = changed_copy(Path(pair.draft), tmp_path / "narrow", same, intermediate_size=16)
    (tmp_path / "empty").mkdir()
    cut = changed_copy(Path(pair.target), tmp_path / "cut", same)
    cut_weights(cut)
    cut_draft = changed_copy(Path(pair.draft), tmp_path / "cut-draft", same)
    cut_weights(cut_draft)
    for path, says in (
        (deep, "num_hidden_layers"),
        (wide, "config.json"),  # 999 is no multiple of the heads, which transformers refuses
        (narrow, "intermediate_size"),
        (cut, "cut"),
        (cut_draft, "cut-draft"),
        (tmp_path / "empty", "config.json"),
        (tmp_path / "nowhere", "config.json"),
    ):
        success, message = update(eagle, path)
        assert not success and says in message, (path, message)
        eagle.check()
    assert ask(eagle, prompts) == before
