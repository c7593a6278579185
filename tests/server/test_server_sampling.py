"""Every sampling parameter has the effect that it has without speculation."""

from collections import Counter
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from benchmarks.harness.servers import Server
from tests.server.client import generate, in_parallel
from tests.server.conftest import ServerFactory
from tests.server.homogeneity import homogeneity_p_value

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

ALPHA = 1e-6
NUM_SAMPLES = 720
SAMPLES_PER_REQUEST = 24
NUM_TOKENS = 64
PROCESSOR = DisallowedTokensLogitsProcessor.to_str()
FLAGS = ("--enable-custom-logit-processor",)

# Greedy requests, whose answers are equal token for token.
GREEDY = {
    "frequency_penalty": {"frequency_penalty": 1.0},
    "presence_penalty": {"presence_penalty": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.3},
    # Not with repetition_penalty: SGLang applies it before or after these, as a process happens to
    # order its classes.
    "two penalties": {"frequency_penalty": 0.4, "presence_penalty": 0.6},
    "logit_bias": {"logit_bias": {"65": -100.0, "221": 3.0}},
    "stop": {"stop": ["return"], "ignore_eos": False},
    "stop_token_ids": {"stop_token_ids": [201, 221], "ignore_eos": False},
    "stop_regex": {"stop_regex": r"[a-z]+\(", "ignore_eos": False},
    "min_new_tokens": {
        "min_new_tokens": 24,
        "stop_token_ids": [201, 221],
        "ignore_eos": False,
    },
    "regex": {"regex": r"[a-z ]{10,40}\n", "ignore_eos": False},
    "min_p and top_k": {"min_p": 0.5, "top_k": 3},
}
# Requests that sample, whose laws are equal.
SAMPLED = {
    "temperature": {"temperature": 1.0},
    "hot": {"temperature": 1.5},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k and top_p": {"temperature": 1.0, "top_k": 5, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.3},
    "hot min_p": {"temperature": 1.5, "min_p": 0.9},
    "all cuts": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"temperature": 1.0, "frequency_penalty": 1.0, "presence_penalty": 0.5},
}


@pytest.fixture(scope="module")
def servers(start_server: ServerFactory) -> Iterator[tuple[Server, Server]]:
    """Plain decoding and CAST, both with custom logit processors."""
    with (
        start_server("plain", *FLAGS, name="sampling-plain") as plain,
        start_server("cast", *FLAGS, "--random-seed", "1", name="sampling-cast") as cast,
    ):
        yield plain, cast


def answers_of(server: Server, prompts: list[str], **sampling: object) -> list[list[int]]:
    """Answer some prompts, all at once, some of them beside a request that drafts."""
    answers = generate(server, prompts, max_new_tokens=NUM_TOKENS, **sampling)
    return [answer["output_ids"] for answer in answers]


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_answer_is_that_of_plain_decoding(servers, prompts, name):
    plain, cast = servers
    expected = answers_of(plain, prompts[:6], **GREEDY[name])
    assert answers_of(cast, prompts[:6], **GREEDY[name]) == expected
    assert answers_of(cast, prompts[:1], **GREEDY[name]) == expected[:1]


def test_requests_of_one_batch_keep_their_own_parameters(servers, prompts):
    """Each request of a mixed batch gets what it gets alone from plain decoding."""
    plain, cast = servers
    asked = list(zip(prompts, GREEDY.values(), strict=False)) + [(prompts[20], {})] * 3

    def ask(server: Server, item: tuple[str, dict]) -> list[int]:
        return generate(server, item[0], max_new_tokens=NUM_TOKENS, **item[1])["output_ids"]

    expected = [ask(plain, item) for item in asked]
    assert in_parallel(lambda item: ask(cast, item), asked, workers=len(asked)) == expected


def test_requests_that_need_it_are_decoded_plainly_and_counted(servers, prompts):
    _, cast = servers

    def counted() -> int:
        return cast.get("/server_info")["internal_states"][0]["cast"]["plain_requests"]

    before = counted()
    answer = generate(cast, prompts[0], max_new_tokens=NUM_TOKENS, frequency_penalty=1.0)
    assert answer["meta_info"]["spec_verify_ct"] == NUM_TOKENS - 1
    assert counted() == before + 1
    generate(cast, prompts[0], max_new_tokens=NUM_TOKENS, min_p=0.2, temperature=1.0)
    assert counted() == before + 1
    log = cast.log_path.read_text()
    assert log.count("decoded without drafts, because of a penalty") == 1


def test_a_custom_logit_processor_sees_every_token(servers, prompts):
    plain, cast = servers
    usual = Counter(token for ids in answers_of(plain, prompts[:6]) for token in ids)
    banned = [token for token, _ in usual.most_common(5)]
    found = {}
    for server in (plain, cast):
        body = {
            "text": prompts[:6],
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": NUM_TOKENS,
                "ignore_eos": True,
                "custom_params": {"token_ids": banned},
            },
            "custom_logit_processor": PROCESSOR,
        }
        response = httpx.post(f"{server.url}/generate", json=body, timeout=300)
        assert response.is_success, response.text
        found[server.name] = [answer["output_ids"] for answer in response.json()]
    assert not set(banned) & {token for ids in found["sampling-cast"] for token in ids}
    assert found["sampling-cast"] == found["sampling-plain"]


def sample(server: Server, prompt: str, **sampling: object) -> np.ndarray:
    """Return [NUM_SAMPLES, 3] sampled tokens; the first comes from prefill."""
    answers: list[dict] = []
    for _ in range(NUM_SAMPLES // SAMPLES_PER_REQUEST):
        answers += generate(server, prompt, n=SAMPLES_PER_REQUEST, max_new_tokens=3, **sampling)
    return np.array([answer["output_ids"] for answer in answers])


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_have_the_law_of_plain_decoding(servers, prompts, name):
    plain, cast = servers
    ours, theirs = (sample(server, prompts[0], **SAMPLED[name]) for server in (cast, plain))
    for last in range(3):
        assert homogeneity_p_value(ours[:, : last + 1], theirs[:, : last + 1]) > ALPHA
        assert homogeneity_p_value(ours[:, last], theirs[:, last]) > ALPHA
