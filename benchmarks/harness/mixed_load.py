"""Mixed requests for a soak: what they ask for, how they are sent, and how they end."""

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx

# A request without an answer after that is lost; the longest takes some seconds.
REQUEST_SECONDS = 240.0
# Streamed events that a client reads before it vanishes.
READ_EVENTS = 3
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
KINDS = (
    *("short", "long", "limit", "stop", "grammar", "logprobs", "wish", "prefix", "turn"),
    *("sampled", "refused"),
)


class Ask(NamedTuple):
    """A request, without what differs each time that it is sent."""

    kind: str  # of KINDS
    prompt: list[int]
    sampling: dict[str, Any]
    fields: dict[str, Any]  # of the request itself
    follows: int | None = None  # the ask whose prompt and answer this prompt goes on from

    @property
    def is_greedy(self) -> bool:
        return self.sampling["temperature"] == 0.0

    def body(self, rid: str, streams: bool) -> dict[str, Any]:
        """Return what is posted to /generate."""
        return {
            "rid": rid,
            "input_ids": self.prompt,
            "sampling_params": self.sampling,
            "stream": streams,
            **self.fields,
        }


class Outcome(NamedTuple):
    """How a request ended."""

    end: str  # answered | aborted | refused | vanished | broken | lost
    tokens: list[int]
    reason: str = ""  # of an answer its finish reason, else what was said

    @property
    def essence(self) -> tuple[str, list[int], str]:
        """What must be as plain decoding has it."""
        return (self.end, self.tokens, self.reason if self.end == "answered" else "")


def make_asks(text: Sequence[int], context: int, pool: int, count: int, seed: int) -> list[Ask]:
    """Draw requests of every kind in turn.

    Args:
        text: tokens to cut prompts from.
        context: the server's context limit, in tokens.
        pool: tokens of its cache; the longest requests take half of them at most.
    """
    rng = random.Random(seed)
    most = min(context, pool // 2)

    def cut(length: int) -> list[int]:
        start = rng.randrange(len(text) - length)
        return list(text[start : start + length])

    shared, asks = cut(most // 3), list[Ask]()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        prompt = cut(rng.randint(4, 60))
        sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        sampling["max_new_tokens"] = rng.randint(1, 48)
        fields: dict[str, Any] = {}
        follows = None
        if kind == "short":
            prompt = cut(rng.randint(1, 3))
        elif kind == "long":
            prompt = cut(rng.randint(most // 3, most - 64))
        elif kind == "limit":  # runs to the end of the context, or of what it may take of the cache
            length = most - rng.randint(8, 40)
            prompt = cut(length)
            sampling["max_new_tokens"] = most - length - rng.randint(0, 7)
        elif kind == "stop":
            sampling |= {"stop": [rng.choice((" the", "\n", "):", "return"))], "ignore_eos": False}
        elif kind == "grammar":
            schema = {"json_schema": json.dumps(SCHEMA)}
            sampling |= {"ignore_eos": False, "max_new_tokens": 48}
            sampling |= rng.choice((schema, {"regex": "[a-z]{4,12}( [0-9]{2}){2,6}"}))
        elif kind == "logprobs":
            fields = {"return_logprob": True, "top_logprobs_num": 2}
        elif kind == "wish":
            sampling["custom_params"] = {"cast": rng.choice(("off", "latency", "throughput"))}
        elif kind == "prefix":
            prompt = shared + cut(rng.randint(1, 20))
        elif kind == "turn":
            # The short request of the same round; its answer is known when plain decoding gave it.
            follows = number - KINDS.index("turn")
        elif kind == "sampled":
            sampling |= rng.choice(
                ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20})
            )
        elif kind == "refused":
            fields = {"input_ids": cut(context + 1)}
        asks.append(Ask(kind, prompt, sampling, fields, follows))
    return asks


async def expect(url: str, asks: Sequence[Ask]) -> tuple[list[Ask], list[Outcome]]:
    """Ask a server of plain decoding, one request after the other.

    Returns:
        the asks, with the prompts of second turns complete, and their outcomes.
    """
    complete: list[Ask] = []
    outcomes: list[Outcome] = []
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS) as client:
        for number, ask in enumerate(asks):
            if ask.follows is not None:
                first = complete[ask.follows]
                answer = outcomes[ask.follows].tokens
                ask = ask._replace(prompt=first.prompt + answer + ask.prompt, follows=None)
            complete.append(ask)
            outcomes.append(await send(client, ask, f"expect-{number}", streams=False))
    return complete, outcomes


async def send(
    client: httpx.AsyncClient, ask: Ask, rid: str, *, streams: bool, vanishes: bool = False
) -> Outcome:
    """Send a request and return how it ended.

    Args:
        vanishes: the client closes the connection after some events of the stream.
    """
    body = ask.body(rid, streams or vanishes)
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            if not body["stream"]:
                response = await client.post("/generate", json=body)
                return outcome_of(response.status_code, response.json())
            last: Mapping[str, Any] = {}
            async with client.stream("POST", "/generate", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    return outcome_of(response.status_code, response.json())
                num_events, is_done = 0, False
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    is_done = is_done or data == "[DONE]"
                    if not data or is_done:
                        continue
                    last, num_events = json.loads(data), num_events + 1
                    if vanishes and num_events == READ_EVENTS:
                        return Outcome("vanished", last.get("output_ids", []))
            if not is_done:
                return Outcome("broken", [], "the stream ended before [DONE]")
            return outcome_of(200, last)
    except (TimeoutError, httpx.TimeoutException):
        return Outcome("lost", [], f"no answer within {REQUEST_SECONDS:.0f} s")
    except httpx.TransportError as error:
        return Outcome("broken", [], type(error).__name__)
    except json.JSONDecodeError as error:
        return Outcome("broken", [], f"no JSON: {error}")


def outcome_of(status: int, answer: Mapping[str, Any]) -> Outcome:
    """Read SGLang's answer."""
    error = answer.get("error")
    if error is not None:
        message = error.get("message", "") if isinstance(error, Mapping) else str(error)
        code = error.get("code", status) if isinstance(error, Mapping) else status
        return Outcome(_end_of_error(code, message), [], message)
    reason = answer["meta_info"]["finish_reason"]
    kind = "" if reason is None else reason["type"]
    tokens = list(answer.get("output_ids") or [])
    if kind != "abort":
        return Outcome("answered", tokens, kind)
    # SGLang reports a request that it refuses in the scheduler as aborted, with a status.
    message = reason.get("message") or ""
    return Outcome(_end_of_error(reason.get("status_code"), message), tokens, message)


def _end_of_error(code: int | None, message: str) -> str:
    """Return how a request ended by this error: refused, or aborted.

    SGLang gives one that is aborted while its grammar is compiled the status of a refusal.
    """
    return "refused" if code == 400 and "abort" not in message.lower() else "aborted"


def judge(ask: Ask, outcome: Outcome, expected: Outcome, allowed: set[str]) -> str | None:
    """Return what is wrong with how a request ended; None for nothing.

    Args:
        expected: plain decoding's outcome.
        allowed: ends that a fault explains: aborted, vanished, broken.

    Returns:
        "lost: ..." or "altered: ...".
    """
    if outcome.end in ("aborted", "vanished"):
        if outcome.end not in allowed:
            return f"lost: {outcome.end}: {outcome.reason}"
        # SGLang does not cut off what the last step brought past the request's length.
        ours, theirs = (
            outcome.tokens[: len(expected.tokens)],
            expected.tokens[: len(outcome.tokens)],
        )
        if ask.is_greedy and ours != theirs:
            return f"altered: as far as it came, {ours} is not {theirs}"
        return None
    if outcome.end in ("broken", "lost"):
        return None if outcome.end in allowed else f"lost: {outcome.end}: {outcome.reason}"
    if outcome.end != expected.end:
        return f"lost: {outcome.end} ({outcome.reason}), plain decoding: {expected.end}"
    if ask.is_greedy and outcome.essence != expected.essence:
        return f"altered: {outcome.essence} is not {expected.essence}"
    if not ask.is_greedy and len(outcome.tokens) > ask.sampling["max_new_tokens"]:
        return f"altered: {len(outcome.tokens)} tokens of {ask.sampling['max_new_tokens']}"
    return None
