"""The texts that a draft is trained on, with the target's states for each of their tokens.

`rows.jsonl` holds a JSON object a row (`name`, `tokens`, `answer_start`), `states.bin` the states
of all rows one after the other, bfloat16, [tokens, state_size]. The last token of a row has none.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Row:
    """One text: a prompt and what the target answered, or text that is learned as it is."""

    name: str
    tokens: tuple[int, ...]
    answer_start: int  # the first token that the draft may be asked for
    first_state: int  # where its states begin in the file

    @property
    def num_states(self) -> int:
        """Tokens that have a state."""
        return len(self.tokens) - 1


class RowStore:
    """Rows on disk; one process appends, others read.

    Args:
        folder: made if need be. What a writer that was stopped left half written is cut off when
            the next one begins.
        state_size: numbers a state.
    """

    def __init__(self, folder: Path, state_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._index = folder / "rows.jsonl"
        self._states = folder / "states.bin"
        self._state_size = state_size
        self.rows: list[Row] = []
        self._num_read = 0  # bytes of the index
        self._mapped: np.memmap | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what has been appended since."""
        if not self._index.exists():
            return
        with self._index.open("rb") as file:
            file.seek(self._num_read)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._num_read += len(line)
                record = json.loads(line)
                row = Row(
                    record["name"], tuple(record["tokens"]), record["answer_start"], self._end
                )
                self.rows.append(row)
        self._mapped = None

    def begin_writing(self) -> None:
        """Cut off what is half written."""
        for path, size in (
            (self._index, self._num_read),
            (self._states, self._end * self._state_size * 2),
        ):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(size)

    def append(self, name: str, tokens: list[int], answer_start: int, states: torch.Tensor) -> None:
        """Add a row; its states [tokens - 1, state_size] are written before its index line."""
        if states.shape != (len(tokens) - 1, self._state_size):
            raise ValueError(f"row {name}: {len(tokens)} tokens and states {tuple(states.shape)}")
        with self._states.open("ab") as file:
            file.write(states.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        record = {"name": name, "tokens": tokens, "answer_start": answer_start}
        with self._index.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
        self.refresh()

    def states(self, row: Row) -> torch.Tensor:
        """Return [num_states, state_size] bfloat16."""
        if self._mapped is None:
            self._mapped = np.memmap(self._states, dtype=np.int16, mode="r")
        first, last = (
            position * self._state_size
            for position in (row.first_state, row.first_state + row.num_states)
        )
        flat = torch.from_numpy(np.array(self._mapped[first:last]))
        return flat.view(torch.bfloat16).view(row.num_states, self._state_size)

    @property
    def _end(self) -> int:
        return self.rows[-1].first_state + self.rows[-1].num_states if self.rows else 0
