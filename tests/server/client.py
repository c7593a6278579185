"""How the tests talk to a server: SGLang's native interface, with token ids."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.harness.servers import Server

REQUEST_SECONDS = 300.0
GREEDY = {"temperature": 0.0, "ignore_eos": True}
# What belongs to the request, not to its sampling parameters; whatever begins with `return_` too.
OF_REQUEST = (
    *("logprob_start_len", "top_logprobs_num", "token_ids_logprob"),
    *("custom_logit_processor", "require_reasoning", "session_params", "stream"),
)


def post_generate(
    server: Server, prompt: str | list[str] | list[int] | list[list[int]], **fields: Any
) -> httpx.Response:
    """Ask for an answer to one prompt, or to each of a list; return what comes, errors too.

    Args:
        prompt: text or token ids.
        fields: sampling parameters, and those of `OF_REQUEST`, which go to the request itself.
    """
    outer = {key for key in fields if key in OF_REQUEST or key.startswith("return_")}
    first = prompt[0] if isinstance(prompt, list) else prompt
    body = {
        "text" if isinstance(first, str) else "input_ids": prompt,
        "sampling_params": {
            **GREEDY,
            **{key: value for key, value in fields.items() if key not in outer},
        },
        **{key: fields[key] for key in outer},
    }
    return httpx.post(f"{server.url}/generate", json=body, timeout=REQUEST_SECONDS)


def generate(
    server: Server, prompt: str | list[str] | list[int] | list[list[int]], **fields: Any
) -> Any:
    """Return SGLang's answer to one prompt, or its answers to a list; see `post_generate`."""
    response = post_generate(server, prompt, **fields)
    assert response.is_success, response.text
    return response.json()


def check_answers(
    server: Server, prompts: list[str], expected: list[list[int]], num_tokens: int
) -> None:
    """Compare answers with plain decoding's: alone, together, and of a request without drafts."""
    fields = {"max_new_tokens": num_tokens}
    assert generate(server, prompts[0], **fields)["output_ids"] == expected[0]
    answers = generate(server, prompts, **fields)
    assert [answer["output_ids"] for answer in answers] == expected
    plainly = generate(server, prompts[0], custom_params={"cast": "off"}, **fields)
    assert plainly["output_ids"] == expected[0]


def answers_of(
    server: Server, prompts: list[str], num_tokens: int, **fields: Any
) -> list[tuple[list[int], str, dict[str, Any] | None]]:
    """Return tokens, text and reason of the end of each answer, all asked for at once."""
    answers = generate(server, prompts, max_new_tokens=num_tokens, **fields)
    return [(a["output_ids"], a["text"], a["meta_info"]["finish_reason"]) for a in answers]


def stream(server: Server, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the chunks that SGLang answers with; the text of each contains that of the last."""
    response = post_generate(server, prompt, stream=True, **fields)
    assert response.is_success, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def greedy_ids(
    server: Server, prompts: Sequence[str], batch: int, num_tokens: int
) -> list[list[int]]:
    """Decode the prompts greedily, `batch` at a time, and return the tokens of each."""
    outputs: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        wave = list(prompts[start : start + batch])
        answers = generate(server, wave, max_new_tokens=num_tokens)
        outputs += [answer["output_ids"] for answer in answers]
    return outputs


def in_parallel(call: Any, arguments: Sequence[Any], workers: int) -> list[Any]:
    """Call with each argument, `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(call, arguments))


def loads(server: Server) -> dict[str, Any]:
    """Return what the scheduler holds: running requests, used tokens, ..."""
    return dict(server.get("/v1/loads")["loads"][0])
