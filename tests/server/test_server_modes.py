"""Modes of requests as a client states them: taken, or refused without harm to the server."""

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.server.client import GREEDY, generate, in_parallel
from tests.server.conftest import NUM_TOKENS

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

MODES = ("off", "latency", "throughput")
REFUSAL = "custom_params.cast='fast': must be off | latency | throughput"


@pytest.fixture(scope="module")
def client(cast) -> OpenAI:
    return OpenAI(base_url=f"{cast.url}/v1", api_key="none", max_retries=0, timeout=300.0)


def post_generate(server, custom_params, **outer) -> httpx.Response:
    sampling = {**GREEDY, "max_new_tokens": 8, "custom_params": custom_params}
    body = {"text": "def add(a, b):", "sampling_params": sampling, **outer}
    return httpx.post(f"{server.url}/generate", json=body, timeout=300.0)


def complete(client: OpenAI, custom_params, **options) -> str:
    answer = client.completions.create(
        model="default",
        prompt="def add(a, b):",
        temperature=0.0,
        max_tokens=24,
        extra_body={"custom_params": custom_params},
        **options,
    )
    return answer.choices[0].text


def chat(client: OpenAI, custom_params, **options) -> str:
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Write a function that adds two numbers."}],
        temperature=0.0,
        max_tokens=24,
        extra_body={"custom_params": custom_params},
        **options,
    )
    return answer.choices[0].message.content


@pytest.fixture(autouse=True)
def still_serves(cast):
    """After every test, whatever it sent, the server answers."""
    yield
    assert generate(cast, "x = ", max_new_tokens=4)["meta_info"]["completion_tokens"] == 4


def test_a_bad_mode_is_answered_with_400(cast):
    response = post_generate(cast, {"cast": "fast"})
    assert response.status_code == 400
    assert REFUSAL in response.json()["error"]["message"]


@pytest.mark.parametrize("custom_params", [{"cast": 1}, {"cast": {"off": [1]}}, "off", ["cast"]])
def test_a_mode_of_another_type_is_answered_with_400(cast, custom_params):
    response = post_generate(cast, custom_params)
    assert response.status_code == 400
    assert "custom_params" in response.json()["error"]["message"]


def test_a_bad_mode_ends_its_stream_with_the_error(cast):
    # SGLang has sent the head of a stream before it looks at the sampling parameters.
    response = post_generate(cast, {"cast": "fast"}, stream=True)
    assert REFUSAL in response.text
    assert '"code":400' in response.text.replace(" ", "")


@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_mode_is_a_bad_request_to_an_openai_client(client, ask, stream):
    with pytest.raises(BadRequestError) as caught:
        ask(client, {"cast": "fast"}, stream=stream)
    assert REFUSAL in str(caught.value)


def test_a_bad_mode_leaves_the_others_alone(cast, prompts):
    alone = generate(cast, prompts[0], max_new_tokens=NUM_TOKENS)["output_ids"]

    def ask(index: int) -> object:
        if index % 2:
            return post_generate(cast, {"cast": "fast"}).status_code
        return generate(cast, prompts[0], max_new_tokens=NUM_TOKENS)["output_ids"]

    assert in_parallel(ask, range(6), workers=6) == [alone, 400] * 3


def test_good_modes_do_not_change_greedy_answers(cast, prompts):
    for prompt in prompts[:3]:
        expected = generate(cast, prompt, max_new_tokens=NUM_TOKENS)["output_ids"]
        for mode in MODES:
            answer = generate(cast, prompt, max_new_tokens=NUM_TOKENS, custom_params={"cast": mode})
            assert answer["output_ids"] == expected, mode


def test_requests_of_different_modes_share_a_batch(cast, prompts):
    def ask(index: int, custom_params: dict[str, str] | None) -> list[int]:
        options = {"max_new_tokens": NUM_TOKENS, "custom_params": custom_params}
        return generate(cast, prompts[index], **options)["output_ids"]

    expected = [ask(index, None) for index in range(8)]
    modes = [None, *({"cast": mode} for mode in MODES)]
    outputs = in_parallel(lambda index: ask(index, modes[index % 4]), range(8), workers=8)
    assert outputs == expected


@pytest.mark.parametrize("ask", [complete, chat])
def test_good_modes_pass_through_the_openai_interfaces(client, ask):
    expected = ask(client, None)
    assert [ask(client, {"cast": mode}) for mode in MODES] == [expected] * 3
