"""Conversations as tokens: a turn's prompt is all that was said before, and a new part."""

import itertools
from collections.abc import Mapping, Sequence
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
        at_once: requests that come together; the next ones follow when all are answered.
        mode: CAST's request mode; None for SGLang's own parameters alone.
    """
    sampling: dict[str, Any] = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    if mode is not None:
        sampling["custom_params"] = {"cast": mode}
    replies = []
    with httpx.Client(base_url=url, timeout=REQUEST_SECONDS) as client:
        for start in range(0, len(prompts), at_once):
            # In one message, so that they come together whatever the client has to wait for.
            group = list(prompts[start : start + at_once])
            response = client.post(
                "/generate", json={"input_ids": group, "sampling_params": sampling}
            )
            response.raise_for_status()
            replies += [_reply(answer) for answer in response.json()]
    return replies


def _reply(answer: Mapping[str, Any]) -> Reply:
    info = answer["meta_info"]
    passes = info.get("spec_verify_ct") or info["completion_tokens"]
    return Reply(answer["output_ids"], passes, info["cached_tokens"])
