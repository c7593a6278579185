"""What the tiny draft learns from: corpus text, and text that the target continues."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .windows import WindowSampler

PROMPT_TOKENS = (64, 112, 160)
TEMPERATURES = (0.0, 0.0, 0.6, 1.0)  # of the prompts in turn; 0 is greedy
SEED = 2


def write_data(
    train_tokens: np.ndarray, tokenizer: Tokenizer, count: int, text_tokens: int, path: Path
) -> None:
    """Write a prompt file: `count` windows of corpus text and `count` windows to be continued.

    Args:
        train_tokens: the token stream, uint16.
        tokenizer: turns windows into text.
        count: of each kind.
        text_tokens: of a window that is learned as it is.
        path: gets the file.
    """
    sampler = WindowSampler(train_tokens, SEED)
    lengths = [PROMPT_TOKENS[number % len(PROMPT_TOKENS)] for number in range(count)]
    wanted = [("prompt", length) for length in lengths] + count * [("text", text_tokens)]
    records = []
    for number, (kind, length) in enumerate(wanted):
        window = sampler.draw(number, 1, length)[0]
        records.append({kind: tokenizer.decode(window.tolist(), skip_special_tokens=False)})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
