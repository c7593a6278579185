"""The target's answers to prompts, which are what the draft will meet when it serves.

A prompt file has a JSON object a line, with one of these:

    {"turns": ["What is ...?", "And why?"]}   questions of a user, answered one after the other
    {"prompt": "def f(x):"}                   text that the target continues, past end tokens too
    {"text": "..."}                           text that is learned as it is
"""

import json
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import Progress

from .decoder import Decoder, Request
from .rows import RowStore
from .target_model import Target

TEMPERATURES = (0.0, 0.7)  # of the prompts in turn; 0 is greedy
SEED = 2


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def apply_chat_template(self, conversation: list[dict], **settings: object) -> list[int]:
        """Return the token ids of a conversation."""


@dataclass(frozen=True)
class Limits:
    """How much is decoded, and how."""

    max_prompt_tokens: int = 256
    max_new_tokens: int = 256
    num_slots: int = 96
    temperatures: tuple[float, ...] = TEMPERATURES


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file; one of the three is set."""

    name: str
    turns: tuple[str, ...] = ()
    prompt: str = ""
    text: str = ""


def read_prompts(paths: Iterable[Path]) -> list[Prompt]:
    """Read prompt files; a prompt is named by its file and line.

    Raises:
        ValueError: a line is no prompt (file and line are named), or two files have one name.
    """
    prompts, stems = [], set()
    for path in paths:
        if path.stem in stems:
            raise ValueError(f"{path}: another file has this name, after which answers are named")
        stems.add(path.stem)
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            place = f"{path}:{number}"
            try:
                record = json.loads(line)
                kinds = [kind for kind in ("turns", "prompt", "text") if record.get(kind)]
                if len(kinds) != 1:
                    raise ValueError("needs one of turns, prompt, text")
                value = record[kinds[0]]
                if kinds[0] == "turns":
                    value = tuple(value)
                prompts.append(Prompt(f"{path.stem}:{number}", **{kinds[0]: value}))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{place}: {error}") from error
    return prompts


def write_answers(
    target: Target,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    stop_ids: Iterable[int],
    store: RowStore,
    limits: Limits,
    progress_bar: Progress,
    max_tokens: int | None = None,
) -> None:
    """Let the target answer the prompts that the store does not have yet.

    Args:
        target: in the dtype to compute in.
        tokenizer: the target's.
        prompts: those whose tokens are more than the limits allow are left out.
        stop_ids: tokens that end an answer.
        store: gets a row an answer; a later turn is a row of its own, with all before it.
        limits: lengths, slots, temperatures.
        progress_bar: shows answers, and tokens a second.
        max_tokens: of all rows; none begins behind it.
    """
    store.begin_writing()
    done = {row.name: row.tokens for row in store.rows}
    maker = _RequestMaker(tokenizer, frozenset(stop_ids), limits)
    waiting: deque[Request] = deque()
    sources: dict[str, tuple[Prompt, int]] = {}
    todo = _requests_to_do(maker, prompts, done)
    bar = progress_bar.add_task("answers", total=len(prompts), completed=len(done))
    generator = torch.Generator().manual_seed(SEED + len(done))
    longest = limits.max_prompt_tokens + limits.max_new_tokens
    decoder = Decoder(target, limits.num_slots, longest, generator)
    started, num_new, num_all = time.monotonic(), 0, sum(row.num_states for row in store.rows)

    def refill() -> None:
        while len(waiting) < limits.num_slots and (max_tokens is None or num_all < max_tokens):
            found = next(todo, None)
            if found is None:
                return
            request, prompt, turn = found
            sources[request.name] = (prompt, turn)
            waiting.append(request)

    refill()
    for request in decoder.run(waiting):
        prompt, turn = sources.pop(request.name)
        store.append(
            request.name,
            request.tokens,
            1 if prompt.text else request.num_prompt_tokens,
            request.states,
        )
        num_new += len(request.tokens) - request.num_prompt_tokens
        num_all += len(request.states)
        follow_up = maker.make(prompt, turn + 1, request.tokens)
        if follow_up is not None:
            sources[follow_up.name] = (prompt, turn + 1)
            waiting.appendleft(follow_up)
        refill()
        speed = num_new / (time.monotonic() - started)
        text = f"answers, {num_all:,} tokens, {speed:,.0f} new ones a second"
        progress_bar.update(bar, description=text, completed=len(store.rows))


def _requests_to_do(
    maker: "_RequestMaker", prompts: list[Prompt], done: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Request, Prompt, int]]:
    """Yield the first turn of each prompt that has no row yet.

    Args:
        done: tokens of the rows that are there, by name.
    """
    for prompt in prompts:
        turn, before = 0, None
        while (name := maker.name(prompt, turn)) in done:
            turn, before = turn + 1, done[name]
        request = maker.make(prompt, turn, before)
        if request is not None:
            yield request, prompt, turn


class _RequestMaker:
    """Turns prompts into what the decoder takes."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._limits = limits

    @staticmethod
    def name(prompt: Prompt, turn: int) -> str:
        """Return the name of the row of a turn."""
        return prompt.name if turn == 0 else f"{prompt.name}/{turn + 1}"

    def make(self, prompt: Prompt, turn: int, before: Sequence[int] | None) -> Request | None:
        """Return the request for a turn, or None where there is none or it is too long.

        Args:
            prompt: where the turn comes from.
            turn: from 0 on.
            before: all tokens up to the end of the turn before.
        """
        limits, stop_ids = self._limits, self._stop_ids
        max_new_tokens = limits.max_new_tokens
        temperatures = limits.temperatures
        # By name, so that the answers that are held out have all temperatures too.
        temperature = temperatures[zlib.crc32(prompt.name.encode()) % len(temperatures)]
        if prompt.turns:
            if turn >= len(prompt.turns):
                return None
            tokens = self._chat(prompt.turns[turn], before)
        elif turn:
            return None
        else:
            tokens = self._tokenizer.encode(prompt.prompt or prompt.text)
            stop_ids = frozenset()
            if prompt.text:
                tokens = tokens[: limits.max_prompt_tokens]
                max_new_tokens = 1  # the prefill alone gives the states of the text
        if not 2 <= len(tokens) <= limits.max_prompt_tokens:
            return None
        return Request(self.name(prompt, turn), tokens, max_new_tokens, temperature, stop_ids)

    def _chat(self, question: str, before: Sequence[int] | None) -> list[int]:
        """Return the tokens of a conversation up to where the assistant speaks."""
        conversation = [{"role": "user", "content": question}]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        tokens = list(self._tokenizer.apply_chat_template(conversation, **template))
        if before is None:
            return tokens
        # The template opens a conversation with a system message, so a later turn is laid out
        # behind an empty answer, and what comes after that is put behind the tokens really there.
        with_answer = [*conversation, {"role": "assistant", "content": ""}, *conversation]
        longer = list(self._tokenizer.apply_chat_template(with_answer, **template))
        has_end = before[-1] in self._stop_ids
        return [*before, *longer[len(tokens) + has_end :]]
