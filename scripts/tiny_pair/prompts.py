"""Prompts from held-out modules, for measurements of the pair."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .corpus import Document

NUM_PROMPTS = 128
MIN_TOKENS = 64
MAX_TOKENS = 200
SEED = 4


def make_prompts(
    documents: list[Document], tokenizer: Tokenizer, count: int = NUM_PROMPTS
) -> list[dict[str, str]]:
    """Cut prompts out of the held-out modules, spread evenly over them.

    A prompt starts at a line behind a blank one. Two of three end with a line, where the next
    token is open; the third ends inside one.

    Returns:
        One record a prompt: `id`, `prompt`, `module`.
    """
    modules = [d for d in documents if d.is_held_out and not d.is_chat]
    rng = np.random.default_rng(SEED)
    records: list[dict[str, str]] = []
    for attempt in range(50 * count):
        if len(records) == count:
            break
        document = modules[attempt % len(modules)]
        length = int(rng.integers(MIN_TOKENS, MAX_TOKENS + 1))
        is_inside_line = len(records) % 3 == 2
        prompt = _cut(document.text, tokenizer, length, is_inside_line, rng)
        if prompt is not None:
            name = f"heldout-{len(records):03d}"
            records.append({"id": name, "prompt": prompt, "module": document.module})
    return records


def write_prompts(records: list[dict[str, str]], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_prompts(path: Path) -> list[dict[str, str]]:
    """Read what `write_prompts` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _cut(
    text: str, tokenizer: Tokenizer, length: int, is_inside_line: bool, rng: np.random.Generator
) -> str | None:
    lines = text.splitlines(keepends=True)
    starts = [
        i for i, line in enumerate(lines) if line.strip() and (i == 0 or not lines[i - 1].strip())
    ]
    if not starts:
        return None
    start = starts[int(rng.integers(len(starts)))]
    prompt = ""
    for line in lines[start : start + length]:
        if len(tokenizer.encode(prompt + line).ids) > length:
            break
        prompt += line
    if is_inside_line:
        prompt = prompt.rstrip()
        prompt = prompt[: prompt.rfind(" ")] if " " in prompt else prompt
    num_tokens = len(tokenizer.encode(prompt).ids)
    return prompt if MIN_TOKENS <= num_tokens <= MAX_TOKENS else None
