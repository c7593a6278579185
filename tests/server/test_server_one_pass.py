"""Heads of one pass: trained for some seconds, loaded, and answering as plain decoding does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.pairs import ROOT, heldout_prompts
from tests.server.client import generate, greedy_ids
from tests.server.conftest import NUM_PROMPTS, NUM_TOKENS, ServerFactory

# The limit includes training and the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.extended, pytest.mark.timeout(1800)]

SECONDS = 30  # of training, on answers to some prompts that are not asked later
HEADS = {
    "eagle3": ("--norms",),
    "cascade": ("--layers", "3"),
    "parallel": ("--layers", "2", "--depth", "4"),
}


@pytest.fixture(scope="module")
def rows(pair, tmp_path_factory) -> Path:
    """Answers of the target, and a vocabulary, which all heads learn from."""
    work = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"prompt": prompt}) for prompt in heldout_prompts()[NUM_PROMPTS:]]
    (work / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    train(pair, work, "eagle3", "--stage", "answers", "--data", str(work / "prompts.jsonl"))
    train(pair, work, "eagle3", "--stage", "vocabulary")
    return work


def train(pair, work: Path, head: str, *options: str) -> Path:
    """Run a stage of the trainer; return where the head lies."""
    out = work / head
    command = [sys.executable, str(ROOT / "scripts" / "train_draft.py"), "--target", pair.target]
    command += ["--work", str(work), "--out", str(out), "--head", head, "--draft-vocab", "2048"]
    command += ["--max-prompt-tokens", "320", "--max-new-tokens", "96", "--slots", "16"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out


def cast_state(server) -> dict:
    return server.get("/server_info")["internal_states"][0]["cast"]


@pytest.mark.parametrize("head", HEADS)
def test_a_trained_head_is_served_as_plain_decoding_answers(
    start_server: ServerFactory, pair, rows, prompts, expected_ids, head
):
    minutes = ("--minutes", str(SECONDS / 60), "--batch-tokens", "512")
    draft = train(pair, rows, head, "--stage", "draft", *minutes, *HEADS[head])
    (rows / "draft.pt").unlink()  # of this head; the next one starts anew
    flags = ("--speculative-draft-model-path", str(draft), "--cast-residuals", "off")
    with start_server("cast", *flags, name=f"cast-{head}") as server:
        assert greedy_ids(server, prompts, 8, NUM_TOKENS) == expected_ids
        assert greedy_ids(server, prompts[:4], 1, NUM_TOKENS) == expected_ids[:4]
        state = cast_state(server)
        # Some of its trees have several layers, and the target accepts some of what they hold.
        assert state["layers_grown"] > state["steps"]
        answers = generate(server, prompts[:8], max_new_tokens=NUM_TOKENS)
        lengths = [answer["meta_info"]["spec_accept_length"] for answer in answers]
        assert sum(lengths) / len(lengths) > 1.05
        # Requests that sample, whose drafts are drawn, beside one that is greedy.
        mixed = [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}]
        sampled = [
            generate(server, prompts[i], max_new_tokens=NUM_TOKENS, **fields)["output_ids"]
            for i, fields in enumerate(mixed)
        ]
        assert sampled[1] == expected_ids[1] and all(len(ids) == NUM_TOKENS for ids in sampled)
