"""Streams of generated tokens: taking them from a server, and what they say about its speed."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np

REQUEST_SECONDS = 1200.0

Prompt = str | list[int]  # text, or tokens
T = TypeVar("T")


@dataclasses.dataclass
class Answer:
    """What one request streamed."""

    sent: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)  # tokens so far, at each time
    output_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    verify_passes: int = 0
    num_prompt_tokens: int = 0


async def stream_batch(
    url: str,
    prompts: Sequence[Prompt],
    temperature: float,
    num_tokens: int,
    mode: str | None = None,
) -> list[Answer]:
    """Send the prompts at once and return what each streams; see `stream`."""
    async with client_of(url) as client:
        streams = (stream(client, prompt, temperature, num_tokens, mode=mode) for prompt in prompts)
        return await asyncio.gather(*streams)


async def keep_running(
    requests: Sequence[T], at_once: int, answer: Callable[[T], Awaitable[list[Answer]]]
) -> tuple[list[Answer], float]:
    """Keep `at_once` requests running until all are answered; each that ends starts the next.

    Args:
        answer: sends a request and returns its answers.

    Returns:
        the answers in the order of the requests, and when the first place stayed empty.
    """
    waiting = iter(range(len(requests)))
    answers: dict[int, list[Answer]] = {}
    loop = asyncio.get_running_loop()

    async def place() -> float:
        for index in waiting:  # shared by all places
            answers[index] = await answer(requests[index])
        return loop.time()

    ends = await asyncio.gather(*(place() for _ in range(at_once)))
    return [one for index in sorted(answers) for one in answers[index]], min(ends)


def client_of(url: str) -> httpx.AsyncClient:
    """Return a client of a server, for any number of streams."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=limits)


async def stream(
    client: httpx.AsyncClient,
    prompt: Prompt,
    temperature: float,
    num_tokens: int,
    pool: str | None = None,
    mode: str | None = None,
) -> Answer:
    """Send a prompt and return what comes.

    Args:
        pool: `cast_pool` of the request; servers without CAST ignore it.
        mode: of speculation, which a CAST server takes from each request; None says nothing.

    Raises:
        ValueError: the request failed, or ended before `num_tokens`.
        httpx.HTTPError: the server did not answer.
    """
    sampling: dict[str, Any] = {"temperature": temperature, "max_new_tokens": num_tokens}
    sampling["ignore_eos"] = True
    custom = {"cast_pool": pool, "cast": mode}
    if asked := {name: value for name, value in custom.items() if value is not None}:
        sampling["custom_params"] = asked
    kind = "text" if isinstance(prompt, str) else "input_ids"
    body = {kind: prompt, "sampling_params": sampling, "stream": True}
    answer = Answer()
    last: dict[str, Any] = {}
    loop = asyncio.get_running_loop()
    answer.sent = loop.time()
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            last = json.loads(data)
            if "error" in last:
                raise ValueError(f"the server answered {last['error']}")
            answer.times.append(loop.time())
            answer.counts.append(last["meta_info"]["completion_tokens"])
    if not answer.counts or answer.counts[-1] != num_tokens:
        raise ValueError(f"a request ended after {answer.counts[-1:]} of {num_tokens} tokens")
    answer.output_ids, answer.text = last["output_ids"], last["text"]
    answer.verify_passes = last["meta_info"].get("spec_verify_ct", 0)
    answer.num_prompt_tokens = last["meta_info"]["prompt_tokens"]
    return answer


def steady_window(
    answers: Sequence[Answer], at_once: int, end: float | None = None
) -> tuple[float, float]:
    """Return the tokens gained, and the seconds, while as many requests ran as were to.

    From when all of the first ones have their first token until `end`. Between two arrivals a count
    is interpolated: the tokens of one step reach the client one request after the other, and a
    sharp cut between them would drop tokens of all but the first.

    Args:
        at_once: requests that were kept running.
        end: when the first place stayed empty; None for the first end of an answer.

    Raises:
        ValueError: there was no such time.
    """
    firsts = sorted(answers, key=lambda answer: answer.sent)[:at_once]
    begin = max(answer.times[0] for answer in firsts)
    if end is None:
        end = min(answer.times[-1] for answer in answers)
    if end <= begin:
        raise ValueError("no moment at which all requests of a batch ran; use more --tokens")
    gained = sum(
        float(np.diff(np.interp([begin, end], answer.times, answer.counts, left=0.0))[0])
        for answer in answers
    )
    return gained, end - begin


def accept_length(answers: Sequence[Answer]) -> float | None:
    """Return the tokens gained per verify pass, or None without speculation."""
    passes = sum(answer.verify_passes for answer in answers)
    return round(sum(answer.counts[-1] for answer in answers) / passes, 4) if passes else None


def num_steps(answers: Sequence[Answer]) -> int:
    """Return the steps that the answers took, all together."""
    return sum(answer.verify_passes or answer.counts[-1] for answer in answers)


def latencies(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Return quantiles over requests of the time to the first token, over tokens of the gaps.

    Time is the client's. Tokens that arrive together share the time since the arrival before
    equally: a step of speculation brings several at once.
    """
    firsts = [(answer.times[0] - answer.sent) * 1e3 for answer in answers if answer.times]
    gaps = np.concatenate([_token_gaps_ms(answer) for answer in answers] or [np.empty(0)])
    return {
        f"{name}_p{quantile}_ms": round(float(np.percentile(values, quantile)), 3)
        if len(values)
        else None
        for name, values in (("ttft", firsts), ("itl", gaps))
        for quantile in (50, 99)
    }


def _token_gaps_ms(answer: Answer) -> np.ndarray:
    gained, waited = np.diff(answer.counts), np.diff(answer.times)
    brought = gained > 0
    return np.repeat(waited[brought] / gained[brought], gained[brought]) * 1e3
