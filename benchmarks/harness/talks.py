"""Conversations as tokens: a turn's prompt is all that was said before, and a new part."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from tokenizers import Tokenizer

from benchmarks.harness.pairs import Pair, heldout_prompts

__all__ = ["Reply", "said_in_turns", "take_turn"]

REQUEST_SECONDS = 600.0


class Reply(NamedTuple):
    """What a server answered in one turn."""

    tokens: list[int]
    passes: int  # of the target; as many as tokens where nothing was drafted
    cached: int  # tokens of the prompt that were found in the cache


def said_in_turns(pair: Pair, count: int, lengths: Sequence[int]) -> list[list[list[int]]]:
    """Return what the user says in each turn of each conversation, from held-out text.

    Args:
        pair: the tiny pair.
        count: of conversations.
        lengths: tokens of each turn.
    """
    tokenizer = Tokenizer.from_file(str(Path(pair.target) / "tokenizer.json"))
    text = itertools.cycle(tokenizer.encode("\n".join(heldout_prompts())).ids)
    return [[list(itertools.islice(text, length)) for length in lengths] for _ in range(count)]


def take_turn(
    url: str, prompts: Sequence[list[int]], num_tokens: int, at_once: int, mode: str | None = None
) -> list[Reply]:
    """Ask for all conversations' next answers, greedy and of a given length.

    Args:
        at_once: requests that are open at most.
        mode: CAST's request mode; None for SGLang's own parameters alone.
    """
    sampling: dict[str, Any] = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    if mode is not None:
        sampling["custom_params"] = {"cast": mode}

    async def ask(client: httpx.AsyncClient, gate: asyncio.Semaphore, prompt: list[int]) -> Reply:
        async with gate:
            body = {"input_ids": prompt, "sampling_params": sampling}
            response = await client.post("/generate", json=body)
            response.raise_for_status()
            answer = response.json()
        info = answer["meta_info"]
        passes = info.get("spec_verify_ct") or info["completion_tokens"]
        return Reply(answer["output_ids"], passes, info["cached_tokens"])

    async def ask_all() -> list[Reply]:
        gate = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS) as client:
            return list(await asyncio.gather(*(ask(client, gate, prompt) for prompt in prompts)))

    return asyncio.run(ask_all())
