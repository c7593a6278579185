"""What a cost table and the acceptance allow: the speed that trees are worth without any clock."""

import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.arms import static_shape
from benchmarks.report.data import Row, Run, cell_of
from cast_sglang.costs.limits import CONTEXT_BUCKET_TOKENS, Limits
from cast_sglang.costs.model import CostModel, plain_units, step_units
from cast_sglang.costs.schema import CostProfile

# The model continues the tables for batches and contexts that they do not reach.
MAX_ROWS = 256
LIMITS = Limits(4096, 1 << 20, max_verify_rows=MAX_ROWS, max_width=MAX_ROWS)


class NamedProfile(NamedTuple):
    """A cost profile with the name of its file."""

    name: str
    profile: CostProfile


class Bounds:
    """Bounds of runs by the profiles that their servers used.

    Args:
        profiles: those at hand.
        prompt_tokens: mean prompt length of runs that do not state theirs; None if unknown.
    """

    def __init__(self, profiles: Sequence[NamedProfile], prompt_tokens: float | None) -> None:
        self._profiles = profiles
        self._prompt_tokens = prompt_tokens
        self._models = {given.name: _model(given.profile) for given in profiles}

    def profile_of(self, run: Run) -> str | None:
        """Return the name of the profile, of those at hand, that the run's servers used."""
        used = run.provenance.get("profiles")
        words = shlex.split(run.provenance["command"]) if used is None else used.values()
        names = {Path(word).name for word in words if word}
        return next((given.name for given in self._profiles if given.name in names), None)

    def lacks(self, run: Run) -> str | None:
        """Say what is missing for the bounds of a run; None if nothing is."""
        rows = [row for row in run.rows if _has_bound(row)]
        if not rows:
            return "its rows have neither `table_rate` nor a tree of a fixed shape"
        if self.profile_of(run) is None:
            return "give the cost profile that its servers used: `--profile PROFILE.json`"
        if any(self.prompt_tokens(run, row) is None for row in rows):
            return "it does not state the prompts' length; give the mean: `--prompt-tokens N`"
        return None

    def prompt_tokens(self, run: Run, row: Row) -> float | None:
        """Return the mean prompt length of a row's cell."""
        for cell in run.provenance.get("prompt_tokens", ()):
            if cell_of(cell) == cell_of(row):
                return float(cell["mean"])
        return self._prompt_tokens

    def of(self, run: Run, row: Row) -> float | None:
        """Return how much faster than plain decoding a row's trees are, by the table.

        Definition: rate / (batch / mean predicted time of a plain step), means being those over the
        contexts from the prompt's end to the answer's. The rate of a CAST arm is its `table_rate`.
        That of a fixed tree is batch * accept length / mean predicted time of its step: layers - 1
        draft passes over topk nodes, one target pass over its rows, one draft extend over what was
        accepted. None where something is missing, and for arms whose trees nobody counted.
        """
        name, prompt_tokens = self.profile_of(run), self.prompt_tokens(run, row)
        if name is None or prompt_tokens is None or not _has_bound(row):
            return None
        model, batch = self._models[name], row["batch"]
        # As the server does, which looks costs up anew in each bucket of contexts.
        contexts = [prompt_tokens + token for token in range(run.provenance["tokens"])]
        buckets = Counter(math.ceil(context / CONTEXT_BUCKET_TOKENS) for context in contexts)

        def mean_us(step_us: Callable[[int], float]) -> float:
            times = {bucket: step_us(bucket * CONTEXT_BUCKET_TOKENS) for bucket in buckets}
            return statistics.fmean(times.values(), [buckets[bucket] for bucket in times])

        rate = row["table_rate"]
        if rate is None:
            steps, topk, tokens = static_shape(row["arm"]) or (0, 0, 0)
            accepted = row["accept_length"]
            widths = [topk] * (steps - 1)
            step_us = mean_us(lambda c: _step_us(model, batch, c, widths, tokens, accepted))
            rate = batch * accepted / step_us * 1e6
        return float(rate * mean_us(lambda c: _plain_us(model, batch, c)) / 1e6 / batch)


def _has_bound(row: Row) -> bool:
    shape = static_shape(row["arm"])
    is_fixed = shape is not None and max(shape) <= MAX_ROWS and row["accept_length"] is not None
    return row["table_rate"] is not None or is_fixed


def _model(profile: CostProfile) -> CostModel:
    # What lies beyond the tables is asked for on purpose.
    return CostModel(profile, LIMITS)


def _step_us(
    model: CostModel,
    batch: int,
    context: int,
    widths: Sequence[int],
    num_rows: int,
    num_extend_rows: float,
) -> float:
    costs = model.step_costs(batch, context)
    return step_units(costs, widths, num_rows, num_extend_rows) * costs.unit_us


def _plain_us(model: CostModel, batch: int, context: int) -> float:
    costs = model.step_costs(batch, context)
    return plain_units(costs) * costs.unit_us
