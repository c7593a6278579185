"""What a client of a CAST server sees, through the interfaces that clients use."""

import json
import re

import pytest
from openai import OpenAI

from tests.server.client import generate, in_parallel
from tests.server.conftest import NUM_TOKENS

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def client(cast) -> OpenAI:
    return OpenAI(base_url=f"{cast.url}/v1", api_key="none", max_retries=0, timeout=300.0)


@pytest.fixture(scope="module")
def plain_client(plain) -> OpenAI:
    return OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0, timeout=300.0)


def complete(client: OpenAI, prompt: str, **options) -> str:
    options = {"temperature": 0.0, "max_tokens": NUM_TOKENS, **options}
    answer = client.completions.create(model="default", prompt=prompt, **options)
    return answer.choices[0].text


def test_completions(client, plain_client, prompts):
    assert complete(client, prompts[0]) == complete(plain_client, prompts[0])


def test_streamed_completions_add_up(client, prompts):
    options = {"model": "default", "temperature": 0.0, "max_tokens": NUM_TOKENS}
    chunks = list(client.completions.create(prompt=prompts[1], stream=True, **options))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert len(chunks) > 3
    assert text == complete(client, prompts[1])


def test_chat(client, plain_client):
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
    options = {"model": "default", "messages": messages, "temperature": 0.0, "max_tokens": 32}
    answers = [c.chat.completions.create(**options) for c in (client, plain_client)]
    ours, theirs = (answer.choices[0].message.content for answer in answers)
    assert ours == theirs
    streamed = client.chat.completions.create(**options, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
    assert "".join(pieces) == ours


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_eight_concurrent_requests(client, prompts, temperature):
    def ask(prompt: str) -> str:
        return complete(
            client, prompt, temperature=temperature, extra_body={"ignore_eos": True}, max_tokens=32
        )

    texts = in_parallel(ask, prompts[:16], workers=8)
    assert all(texts)
    if temperature == 0.0:
        assert texts == [ask(prompt) for prompt in prompts[:16]]


def test_requests_of_different_lengths_and_temperatures_share_a_batch(cast, expected_ids, prompts):
    def ask(index: int) -> list[int]:
        temperature = 0.8 if index % 2 else 0.0
        length = 1 + 5 * index
        answer = generate(cast, prompts[index], temperature=temperature, max_new_tokens=length)
        assert answer["meta_info"]["completion_tokens"] == length == len(answer["output_ids"])
        return answer["output_ids"]

    outputs = in_parallel(ask, range(8), workers=8)
    for index in range(0, 8, 2):
        assert outputs[index] == expected_ids[index][: 1 + 5 * index]


def test_stop_string_ends_the_answer_where_plain_decoding_ends(plain, cast, prompts):
    text = generate(plain, prompts[2], max_new_tokens=NUM_TOKENS)["text"]
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    answers = [
        generate(server, prompts[2], stop=stop, max_new_tokens=NUM_TOKENS)
        for server in (plain, cast)
    ]
    assert answers[1]["text"] == answers[0]["text"] == text[: text.index(stop)]
    assert answers[1]["meta_info"]["finish_reason"] == answers[0]["meta_info"]["finish_reason"]


def test_stop_token_ends_the_answer(cast, prompts, expected_ids):
    stop = expected_ids[3][20]
    length = expected_ids[3].index(stop) + 1
    answer = generate(
        cast, prompts[3], stop_token_ids=[stop], ignore_eos=False, max_new_tokens=NUM_TOKENS
    )
    assert answer["output_ids"] == expected_ids[3][:length]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_answers(cast, prompts, expected_ids, length):
    # A tree accepts more than is asked for; the surplus must not come out.
    answers = generate(cast, prompts[:4], max_new_tokens=length)
    assert [answer["output_ids"] for answer in answers] == [
        ids[:length] for ids in expected_ids[:4]
    ]


def test_log_probabilities_are_those_of_plain_decoding(plain, cast, prompts):
    values = []
    for server in (plain, cast):
        answer = generate(server, prompts[4], max_new_tokens=24, return_logprob=True)
        rows = answer["meta_info"]["output_token_logprobs"]
        assert [token for _, token, *_ in rows] == answer["output_ids"]
        values.append([logprob for logprob, *_ in rows])
    assert values[1] == pytest.approx(values[0], abs=1e-3)


def test_a_grammar_constrains_the_answer(cast, prompts):
    answer = generate(cast, prompts[5], regex=r"[a-c]{12}", ignore_eos=False, max_new_tokens=32)
    assert re.fullmatch(r"[a-c]{12}", answer["text"])


def test_a_json_schema_constrains_the_answer(cast, plain, prompts):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}
    answers = [
        generate(
            server,
            prompts[6],
            json_schema=json.dumps(schema),
            ignore_eos=False,
            max_new_tokens=48,
        )
        for server in (plain, cast)
    ]
    assert answers[1]["output_ids"] == answers[0]["output_ids"]
