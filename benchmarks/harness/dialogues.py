"""Dialogues: the prompts of one client, each made from the answers so far, as tokens of a model."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

AGAIN = (
    "{question}\n\nAn earlier answer to this was:\n\n{answer}\n\n"
    "Think about it again from the start, and give a better answer."
)


class Dialogue(NamedTuple):
    """What one client sends: prompts, each of which may depend on the answers before it."""

    num_turns: int
    prompt: Callable[[Sequence[str]], list[int]]  # answers so far -> tokens of the next prompt
    # Of dialogues that belong together, as samples of one question; None for one that stands alone.
    pool: str | None = None


class Encoder:
    """Turns text into the tokens of a model.

    Args:
        model: path or hub id, whose tokenizer is used.
        max_tokens: a longer prompt loses its beginning, so that what is to be continued stays and
            the answer still fits into the context; None for no limit.
        trust_remote_code: let the model bring a tokenizer of its own.

    Raises:
        OSError, ValueError: the model has no tokenizer.
    """

    def __init__(
        self, model: str, max_tokens: int | None = None, trust_remote_code: bool = False
    ) -> None:
        # Imported here: it takes seconds, and only a benchmark that runs needs it.
        from transformers import AutoTokenizer

        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"no room for prompts: {max_tokens} tokens; shorten --tokens")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code
        )
        self._max_tokens = max_tokens

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text to be continued."""
        return self._cut(self._tokenizer.encode(text))

    def transcript(self, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
        """Return the tokens of a conversation up to its next answer.

        Written with the model's chat template, or plainly where it has none.

        Args:
            turns: what the user said.
            answers: what was answered to all turns but the last.
        """
        said = [word for pair in zip(turns, [*answers, ""], strict=True) for word in pair][:-1]
        if self._tokenizer.chat_template is None:
            lines = [f"{('User', 'Assistant')[i % 2]}: {word}" for i, word in enumerate(said)]
            return self.text("\n\n".join([*lines, "Assistant:"]))
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(said)
        ]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        return self._cut(self._tokenizer.encode(text, add_special_tokens=False))

    def random_tokens(self, random: np.random.Generator, count: int) -> list[int]:
        """Return tokens drawn evenly from the vocabulary, special ones left out."""
        special = set(self._tokenizer.all_special_ids)
        plain = [token for token in range(len(self._tokenizer)) if token not in special]
        return self._cut(random.choice(plain, count).tolist())

    def _cut(self, tokens: list[int]) -> list[int]:
        return tokens if self._max_tokens is None else tokens[-self._max_tokens :]


def tokens_once(tokens: list[int]) -> Dialogue:
    """Return a dialogue of one prompt, given as tokens."""
    return Dialogue(1, lambda answers: tokens)


def text_once(text: str, encoder: Encoder) -> Dialogue:
    """Return a dialogue of one text, to be continued as it is."""
    return tokens_once(encoder.text(text))


def conversation(turns: Sequence[str], encoder: Encoder) -> Dialogue:
    """Return a conversation: each prompt holds all that was said before."""
    return Dialogue(
        len(turns), lambda answers: encoder.transcript(turns[: len(answers) + 1], answers)
    )


def rethinking(question: str, rounds: int, encoder: Encoder) -> Dialogue:
    """Return a question that is asked again, each time with the latest answer beside it."""

    def prompt(answers: Sequence[str]) -> list[int]:
        text = AGAIN.format(question=question, answer=answers[-1]) if answers else question
        return encoder.transcript([text], [])

    return Dialogue(rounds, prompt)
