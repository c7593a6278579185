"""The training loop of both models: schedule by time, log, checkpoints, resume."""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import Progress
from torch import nn

from .optim import Clock, OptimizerPair, Rates, lr_factor

LOG_SECONDS = 20.0
DEFAULT_RATES = Rates()


@dataclass
class RunState:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    windows_drawn: int = 0
    tokens_seen: int = 0
    used_seconds: float = 0.0


@dataclass(frozen=True)
class BatchResult:
    """What one batch reports to the loop."""

    loss: torch.Tensor
    num_windows: int
    num_tokens: int


class Task(Protocol):
    """What differs between target and draft."""

    name: str
    model: nn.Module

    def batch(self, first_window: int, progress: float) -> BatchResult:
        """Compute the loss of the windows from `first_window` on."""

    def evaluate(self) -> dict[str, float]:
        """Return held-out numbers by name."""

    def on_checkpoint(self) -> None:
        """Run after each checkpoint."""


def train(
    task: Task,
    work_dir: Path,
    minutes: float,
    progress_bar: Progress,
    checkpoint_seconds: float = 120.0,
    rates: Rates = DEFAULT_RATES,
) -> None:
    """Train a task's model for a time, or finish a run that was stopped.

    Args:
        task: the model and its data.
        work_dir: holds `<name>.pt`, the state to resume from, and `<name>_loss.csv`.
        minutes: training time of all runs together by `Clock`, evaluation included.
        progress_bar: shows time used and loss.
        checkpoint_seconds: time between checkpoints.
        rates: peak learning rates.
    """
    state_path = work_dir / f"{task.name}.pt"
    optimizer = OptimizerPair(task.model, rates)
    state = _resume(state_path, task.model, optimizer)
    clock = Clock(minutes, state.used_seconds)
    bar = progress_bar.add_task(task.name, total=60 * minutes, completed=state.used_seconds)
    _drop_rows_after(state.step, work_dir / f"{task.name}_loss.csv")
    log = _LossLog(work_dir / f"{task.name}_loss.csv", task.name, progress_bar)

    def checkpoint() -> None:
        state.used_seconds = clock.used_seconds
        _save(state_path, task.model, optimizer, state)
        log.add(state, task.evaluate())
        task.on_checkpoint()

    is_new = state.step == 0
    last_checkpoint = time.monotonic()
    while clock.progress < 1.0 or (is_new and state.step == 0):
        result = task.batch(state.windows_drawn, clock.progress)
        result.loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step(lr_factor(clock.progress))
        state.step += 1
        state.windows_drawn += result.num_windows
        state.tokens_seen += result.num_tokens
        state.used_seconds = clock.used_seconds
        log.add_batch(state, result)
        progress_bar.update(bar, completed=clock.used_seconds)
        if time.monotonic() - last_checkpoint >= checkpoint_seconds:
            checkpoint()
            last_checkpoint = time.monotonic()
    checkpoint()


def make_progress_bar() -> Progress:
    """Return the bar that all stages write to."""
    return Progress()


def read_state(work_dir: Path, name: str) -> RunState:
    """Return where the last checkpoint of a task stands; a run without one is at its beginning."""
    if not (work_dir / f"{name}.pt").exists():
        return RunState()
    return RunState(**torch.load(work_dir / f"{name}.pt", weights_only=True)["run"])


def _resume(path: Path, model: nn.Module, optimizer: OptimizerPair) -> RunState:
    if not path.exists():
        return RunState()
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return RunState(**saved["run"])


def _save(path: Path, model: nn.Module, optimizer: OptimizerPair, state: RunState) -> None:
    temporary = path.with_suffix(".tmp")
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "run": vars(state).copy(),
    }
    torch.save(saved, temporary)
    temporary.replace(path)  # a kill in between leaves the checkpoint before whole


def _drop_rows_after(step: int, loss_table: Path) -> None:
    """Forget what a stopped run logged behind its last checkpoint: those steps are run again."""
    if loss_table.exists() and loss_table.stat().st_size:
        header, *rows = loss_table.read_text().splitlines(keepends=True)
        kept = [row for row in rows if int(row.split(",", 1)[0]) <= step]
        loss_table.write_text("".join([header, *kept]))


class _LossLog:
    """Prints the loss now and then, and keeps it as a table."""

    def __init__(self, path: Path, name: str, progress_bar: Progress) -> None:
        self._path = path
        self._name = name
        self._console = progress_bar.console
        self._started = time.monotonic()
        self._losses: list[float] = []
        self._num_tokens = 0

    def add_batch(self, state: RunState, result: BatchResult) -> None:
        self._losses.append(result.loss.item())
        self._num_tokens += result.num_tokens
        elapsed = time.monotonic() - self._started
        if elapsed < LOG_SECONDS:
            return
        loss = sum(self._losses) / len(self._losses)
        self.add(state, {"train_loss": loss}, f" {self._num_tokens / elapsed:,.0f} tokens/s")
        self._started = time.monotonic()
        self._losses, self._num_tokens = [], 0

    def add(self, state: RunState, values: dict[str, float], note: str = "") -> None:
        numbers = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        minutes = state.used_seconds / 60
        self._console.print(f"{self._name} {minutes:.1f} min, step {state.step}: {numbers}{note}")
        is_new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(["step", "minutes", "series", "value"])
            for series, value in values.items():
                writer.writerow([state.step, f"{minutes:.2f}", series, f"{value:.4f}"])
