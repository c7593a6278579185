"""What a client of a CAST server sees, through the interfaces that clients use."""

from itertools import pairwise

import httpx
import pytest
from openai import OpenAI

from benchmarks.harness.servers import Server
from tests.server.client import generate, in_parallel, stream
from tests.server.conftest import NUM_TOKENS

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def client(cast) -> OpenAI:
    return OpenAI(base_url=f"{cast.url}/v1", api_key="none", max_retries=0, timeout=300.0)


@pytest.fixture(scope="module")
def plain_client(plain) -> OpenAI:
    return OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0, timeout=300.0)


def post(server: Server, path: str, **fields) -> httpx.Response:
    response = httpx.post(f"{server.url}/{path}", json=fields, timeout=60.0)
    assert response.is_success, response.text
    return response


def complete(client: OpenAI, prompt: str, **options) -> str:
    options = {"temperature": 0.0, "max_tokens": NUM_TOKENS, **options}
    answer = client.completions.create(model="default", prompt=prompt, **options)
    return answer.choices[0].text


def test_completions(client, plain_client, prompts):
    assert complete(client, prompts[0]) == complete(plain_client, prompts[0])


STREAMED = {
    "usual": {},
    "sampling nothing": {"max_tokens": 1},
    "stop": {"stop": ["return", "import"]},
    "two answers": {"n": 2},
    "regex": {"extra_body": {"regex": r"[a-z ]{10,40}\n"}},
    "penalty": {"frequency_penalty": 1.0},
    "log probabilities": {"logprobs": 2},
}


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_completions_add_up(client, plain_client, prompts, name):
    options = {"model": "default", "prompt": prompts[1], "temperature": 0.0}
    options |= {"max_tokens": NUM_TOKENS, **STREAMED[name]}
    texts, tokens, reasons = {}, {}, {}
    for chunk in client.completions.create(stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            found = choice.logprobs.tokens if choice.logprobs else []
            tokens[choice.index] = tokens.get(choice.index, []) + found
            reasons[choice.index] = choice.finish_reason
    for asked in (client, plain_client):
        choices = asked.completions.create(**options).choices
        assert texts == {choice.index: choice.text for choice in choices}
        assert reasons == {choice.index: choice.finish_reason for choice in choices}
        if "logprobs" in options:
            assert tokens == {choice.index: choice.logprobs.tokens for choice in choices}


@pytest.mark.parametrize("interval", [None, 1, 7])
def test_chunks_of_a_stream_grow_to_the_answer(plain, cast, prompts, interval):
    """Several at once, each of them through SGLang's native interface."""
    fields = {"max_new_tokens": NUM_TOKENS, "stream_interval": interval}
    expected = generate(plain, prompts[:6], **fields)
    streams = in_parallel(lambda prompt: stream(cast, prompt, **fields), prompts[:6], workers=6)
    for chunks, answer in zip(streams, expected, strict=True):
        assert len(chunks) > 3
        for earlier, later in pairwise(chunks):
            assert later["text"].startswith(earlier["text"])
            assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert chunks[-1]["text"] == answer["text"]
        assert chunks[-1]["output_ids"] == answer["output_ids"]
        assert chunks[-1]["meta_info"]["finish_reason"] == answer["meta_info"]["finish_reason"]


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


@pytest.mark.parametrize("stop", [["e"], ["self"], [" ", "("]], ids=str)
def test_a_session_goes_on_from_what_was_said(plain, cast, prompts, stop):
    """Not from what a step of several tokens brought behind the end of an answer."""
    answers = []
    for server in (plain, cast):
        said, rid = [], None
        session = post(server, "open_session", capacity_of_str_len=4096).json()
        for text in (prompts[3], "\n    return self", "\n\ndef"):
            where = {"session_params": {"id": session, "rid": rid}}
            fields = {"max_new_tokens": 16, "stop": stop, "ignore_eos": False}
            answer = generate(server, text, **where, **fields)
            rid = answer["meta_info"]["id"]
            said.append((answer["output_ids"], answer["meta_info"]["prompt_tokens"]))
        post(server, "close_session", session_id=session)
        answers.append(said)
    assert answers[0] == answers[1]


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
