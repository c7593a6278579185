"""A published chat model under CAST; skipped where its package cannot be had."""

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.harness.pairs import CommandError, Pair, smollm2_pair
from benchmarks.harness.tasks import DATA
from tests.server.client import generate, greedy_ids
from tests.server.conftest import ServerFactory

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_PROMPTS = 8
NUM_ALONE = 4  # of them, asked one at a time too
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def model() -> Pair:
    try:
        return smollm2_pair()
    except CommandError as error:
        pytest.skip(f"the package cannot be had: {str(error).splitlines()[-1]}")


@pytest.fixture(scope="module")
def questions(model) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(model.target)
    lines = (DATA / "chat.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    talks = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
    return [
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for talk in talks
    ]


def test_a_published_model_answers_as_without_speculation(
    model, questions, start_server: ServerFactory
):
    flags = ("--model-path", model.target)
    with start_server("plain", *flags, name="smollm2-plain") as plain:
        expected = greedy_ids(plain, questions, NUM_PROMPTS, NUM_TOKENS)
    # Whether drafts pay differs from machine to machine, so they are decided by made-up costs.
    draft = ("--speculative-draft-model-path", model.draft, "--cast-residuals", "off")
    with start_server("cast", *flags, *draft, name="smollm2-cast") as cast:
        assert greedy_ids(cast, questions, NUM_PROMPTS, NUM_TOKENS) == expected
        passes = tokens = 0
        for question, ids in zip(questions[:NUM_ALONE], expected, strict=False):
            answer = generate(cast, question, max_new_tokens=NUM_TOKENS)
            assert answer["output_ids"] == ids
            meta = answer["meta_info"]
            passes, tokens = passes + meta["spec_verify_ct"], tokens + meta["completion_tokens"]
    # Its own head, on questions that it was not trained on: worth more than a draft by chance.
    assert tokens / passes > 1.3
