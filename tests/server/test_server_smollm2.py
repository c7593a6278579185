"""A published chat model under CAST; skipped where its package cannot be had.

`--mt-bench-questions 50` asks more than the default.
"""

import pytest

from benchmarks.harness.dialogues import Encoder
from benchmarks.harness.pairs import CommandError, Pair, smollm2_pair
from benchmarks.harness.tasks import TaskError, load_task
from tests.server.client import generate, greedy_ids
from tests.server.conftest import ServerFactory

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

BATCH_SIZE = 8
NUM_ALONE = 2  # of them, asked one at a time too
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def model() -> Pair:
    try:
        return smollm2_pair()
    except CommandError as error:
        pytest.skip(f"the package cannot be had: {str(error).splitlines()[-1]}")


@pytest.fixture(scope="module")
def questions(model, pytestconfig) -> list[list[int]]:
    """The first turns of MT-bench, as tokens."""
    try:
        dialogues = load_task("mt-bench", Encoder(model.target)).dialogues
    except TaskError as error:
        pytest.skip(f"MT-bench cannot be had: {str(error).splitlines()[-1]}")
    num_questions = pytestconfig.getoption("--mt-bench-questions")
    return [dialogue.prompt([]) for dialogue in dialogues[:num_questions]]


def test_a_published_model_answers_as_without_speculation(
    model, questions, start_server: ServerFactory
):
    flags = ("--model-path", model.target)
    with start_server("plain", *flags, name="smollm2-plain") as plain:
        expected = greedy_ids(plain, questions, BATCH_SIZE, NUM_TOKENS)
    # Whether drafts pay differs from machine to machine, so they are decided by made-up costs.
    draft = ("--speculative-draft-model-path", model.draft, "--cast-residuals", "off")
    with start_server("cast", *flags, *draft, name="smollm2-cast") as cast:
        assert greedy_ids(cast, questions, BATCH_SIZE, NUM_TOKENS) == expected
        passes = tokens = 0
        for question, ids in zip(questions[:NUM_ALONE], expected, strict=False):
            answer = generate(cast, question, max_new_tokens=NUM_TOKENS)
            assert answer["output_ids"] == ids
            meta = answer["meta_info"]
            passes, tokens = passes + meta["spec_verify_ct"], tokens + meta["completion_tokens"]
    # Its own head, on questions that it was not trained on: worth more than a draft by chance.
    assert tokens / passes > 1.3
