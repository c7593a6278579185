"""Devices whose true costs are known, for the profiler."""

import math
import random

from cast_sglang.costs.limits import Limits
from cast_sglang.profiling.grid import Grid

LIMITS = Limits(max_batch_size=4, max_context=1024, max_verify_rows=24, max_width=8)
BASE_US = {"verify": 1000.0, "draft": 100.0, "draft_extend": 150.0}
TILE = 8


def make_grid(batch_sizes, contexts, verify, draft, draft_extend):
    counts = {"verify": verify, "draft": draft, "draft_extend": draft_extend}
    return Grid(batch_sizes, contexts, counts)


def true_us(operation, batch_size, context, tokens):
    rows = TILE * math.ceil(batch_size * tokens / TILE)
    return BASE_US[operation] * (1 + 0.02 * rows + 1e-4 * batch_size * context)


class Clock:
    """Stands for the module `time`: only the passes of meters move it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class StaircaseMeter:
    """Costs step up after each TILE rows of the batch, with seeded one-sided noise and outliers."""

    def __init__(self, noise=0.01, limits=LIMITS, dies_after=math.inf, clock=None):
        self._rng = random.Random(7)
        self._noise, self._limits, self._dies_after = noise, limits, dies_after
        self._clock = clock or Clock()
        self.calls = []

    def limits(self):
        return self._limits

    def verify(self, batch_size, context, rows):
        return self._run("verify", batch_size, context, rows)

    def draft(self, batch_size, context, width):
        return self._run("draft", batch_size, context, width)

    def draft_extend(self, batch_size, context, rows):
        return self._run("draft_extend", batch_size, context, rows)

    def step_overhead(self, batch_size):
        return None

    def _run(self, *point):
        _, batch_size, context, tokens = point
        if len(self.calls) >= self._dies_after:
            raise KeyboardInterrupt
        assert 1 <= batch_size <= self._limits.max_batch_size
        assert context + tokens <= self._limits.max_context
        if self._limits.max_tokens:
            assert batch_size * (context + tokens) <= self._limits.max_tokens
        self.calls.append(point)
        seconds = self._seconds(*point)
        self._clock.now += seconds
        return seconds

    def _seconds(self, *point):
        """Return the time of a pass; `calls` holds it already."""
        noise = abs(self._rng.gauss(0, self._noise)) + (self._rng.random() < 0.02) * 5
        return true_us(*point) / 1e6 * (1 + noise)
