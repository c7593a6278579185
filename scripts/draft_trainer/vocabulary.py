"""The tokens that the draft can propose: those that the target itself writes most."""

import json
from pathlib import Path

import numpy as np
import torch

from .rows import Row


def choose_vocabulary(rows: list[Row], vocab_size: int, size: int) -> torch.Tensor:
    """Return the `size` commonest tokens of the target's own text: [size] int64, ascending.

    Tokens that were never seen come last, those of low number first: a byte-pair vocabulary is
    numbered in the order of its merges, so these are the commoner ones.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in rows:
        np.add.at(counts, np.array(row.tokens[row.answer_start :], dtype=np.int64), 1)
    commonest = np.argsort(-counts, kind="stable")[: min(size, vocab_size)]
    return torch.from_numpy(np.sort(commonest))


def coverage(rows: list[Row], vocabulary: torch.Tensor) -> float:
    """Return the part of the rows' own text that the vocabulary can propose."""
    known = set(vocabulary.tolist())
    tokens = [token for row in rows for token in row.tokens[row.answer_start :]]
    return sum(token in known for token in tokens) / max(1, len(tokens))


def save_vocabulary(vocabulary: torch.Tensor, path: Path) -> None:
    """Write the token ids as a JSON list."""
    path.write_text(json.dumps(vocabulary.tolist()) + "\n")


def load_vocabulary(path: Path) -> torch.Tensor:
    """Read what `save_vocabulary` wrote."""
    return torch.tensor(json.loads(path.read_text()))
