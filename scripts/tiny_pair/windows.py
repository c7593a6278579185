"""Windows of the token stream, drawn so that a resume goes on where the run stopped."""

import numpy as np
import torch

BLOCK_TOKENS = 256


class WindowSampler:
    """Draws windows without repetition within an epoch; draw number n is always the same window."""

    def __init__(self, tokens: np.ndarray, seed: int) -> None:
        self._tokens = tokens
        self._seed = seed
        self._num_blocks = max(
            1, len(tokens) // BLOCK_TOKENS - 2
        )  # a window may run past its block
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def draw(self, first: int, count: int, length: int) -> torch.Tensor:
        """Return windows `first` to `first + count - 1`: [count, length] int64."""
        rows = [self._window(number, length) for number in range(first, first + count)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, number: int, length: int) -> np.ndarray:
        epoch, index = divmod(number, self._num_blocks)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self._num_blocks)
        start = self._order[index] * BLOCK_TOKENS
        return self._tokens[start : start + length]


def fixed_windows(tokens: np.ndarray, count: int, length: int) -> torch.Tensor:
    """Return windows spread evenly over the stream, for evaluation: [count, length] int64."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))
