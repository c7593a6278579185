"""PassClock: how long the passes of served steps take, without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cast_sglang.costs.model import pass_us

if TYPE_CHECKING:
    from cast_sglang.costs.model import StepCosts

# Steps between two timed ones on a GPU, where an event costs some microseconds of host time and a
# pass needs two.
GPU_EVERY = 16
# Prefills whose times wait for a step to read them, which where answers have one token never comes.
# The last 32 count as much as all before (`lookahead.KEEP`), so older ones would count next to
# nothing.
MAX_PREFILLS = 256


class TimedPass(NamedTuple):
    """One pass of a served step, as predicted by the raw tables and as measured."""

    operation: str  # of `passes.NAMES`
    batch_size: int
    num_tokens: int  # rows or nodes per request
    predicted_us: float
    measured_us: float


class PassClock:
    """Times passes between `begin_step` and `end_step`; outside of a step it does nothing.

    On the CPU by the host's clock. On a GPU by events, which are read only after the device has
    passed them, steps later.

    Attributes:
        follows_alike: the step that runs follows one of its own kind, with drafts or without, and
            no prefill is between them.
    """

    def __init__(self, device: str) -> None:
        self._module = None if device == "cpu" else torch.get_device_module(device)
        self._every = 1 if self._module is None else GPU_EVERY
        self._num_steps = 0
        self._batch_size = 0
        self._drafted: bool | None = None  # the last step; None behind a prefill
        self.follows_alike = False
        self._costs: StepCosts | None = None
        self._running: deque[tuple[tuple[str, int, int, float], list[tuple[Any, Any]]]] = deque()
        self._leads: list[tuple[str, tuple[Any, Any]]] = []  # of the step that runs
        self._prefills: deque[tuple[int, Any, Any]] = deque(maxlen=MAX_PREFILLS)
        self._has_prefilled = False

    def follows_prefill(self) -> None:
        """Take note of a prefill between two steps."""
        self._drafted = None

    def begin_step(self, batch_size: int, costs: StepCosts | None, drafts: bool = True) -> None:
        """Begin a step; its passes are timed if it is its turn.

        The first plain step behind a step with drafts takes longer than those behind it, and says
        nothing of plain decoding.

        Args:
            costs: of the step, as measured; None without a profile, and then nothing is timed.
            drafts: the step's kind.
        """
        self.follows_alike = drafts == self._drafted
        if self._drafted not in (None, drafts):
            costs = None
        self._drafted = drafts
        self._num_steps += 1
        self._batch_size = batch_size
        self._costs = None if self._num_steps % self._every else costs
        self._leads.clear()

    def end_step(self) -> None:
        self._costs = None

    @contextlib.contextmanager
    def time(self, operation: str, num_tokens: float) -> Iterator[None]:
        """Time the pass inside.

        Args:
            operation: "verify", "draft" or "draft_extend".
            num_tokens: rows or nodes per request, a mean where requests differ.
        """
        costs = self._costs
        if costs is None:
            yield
            return
        begin = self._now()
        yield
        predicted_us = pass_us(costs, operation, num_tokens)
        what = (operation, self._batch_size, round(num_tokens), predicted_us)
        leads = [span for name, span in self._leads if name == operation]
        self._running.append((what, [*leads, (begin, self._now())]))

    @contextlib.contextmanager
    def lead(self, operation: str) -> Iterator[None]:
        """Time the pass inside as a part of the step's pass of this kind, which follows.

        Args:
            operation: as of `time`; its tables hold the time of both.
        """
        if self._costs is None:
            yield
            return
        begin = self._now()
        yield
        self._leads.append((operation, (begin, self._now())))

    @contextlib.contextmanager
    def time_prefill(self, num_rows: int) -> Iterator[None]:
        """Time the draft's pass over prompts inside, which is part of no step.

        The first one of a server compiles kernels, so it is left out.

        Args:
            num_rows: tokens of the prompts that it runs.
        """
        begin = self._now()
        yield
        if self._has_prefilled:
            self._prefills.append((num_rows, begin, self._now()))
        self._has_prefilled = True

    def finished_prefills(self) -> Iterator[tuple[int, float]]:
        """Yield rows and microseconds of the draft's prefills finished since the last call."""
        while self._prefills:
            num_rows, begin, end = self._prefills[0]
            if self._module is None:
                measured_us = (end - begin) * 1e6
            elif end.query():
                measured_us = begin.elapsed_time(end) * 1e3
            else:
                return
            self._prefills.popleft()
            yield num_rows, measured_us

    def finished(self) -> Iterator[TimedPass]:
        """Yield the passes that the device has finished since the last call."""
        while self._running:
            what, spans = self._running[0]
            if self._module is None:
                measured_us = sum(end - begin for begin, end in spans) * 1e6
            elif spans[-1][1].query():  # the device passes events in the order of their record
                measured_us = sum(begin.elapsed_time(end) for begin, end in spans) * 1e3
            else:
                return
            self._running.popleft()
            yield TimedPass(*what, measured_us)

    def _now(self) -> Any:
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event
