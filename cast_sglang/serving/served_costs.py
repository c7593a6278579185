"""ServedCosts: the cost tables in use, and what serving measures against them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.distributed import get_tp_group
from sglang.srt.runtime_context import get_parallel

from cast_sglang.costs.correction import REFRESH_EVERY, CorrectedCosts, Residual, Residuals
from cast_sglang.costs.model import CostModel, StepCosts, step_units
from cast_sglang.policy.lookahead import KEEP
from cast_sglang.serving.launch.cost_profile import find_server_profile
from cast_sglang.serving.launch.identity import host_identity

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from cast_sglang.config import CastConfig
    from cast_sglang.costs.limits import Limits
    from cast_sglang.costs.profiles import FoundProfile
    from cast_sglang.serving.pass_clock import PassClock, TimedPass
    from cast_sglang.serving.stats import StepStats
    from cast_sglang.serving.step import PendingStep

__all__ = ["ServedCosts", "StepTimes"]

# Steps between two exports of the corrections, which take some hundred microseconds.
EXPORT_EVERY = 64

logger = logging.getLogger(__name__)


class StepTimes(NamedTuple):
    """What a step takes by the tables; None and 0 without a profile."""

    predicted_us: float | None = None  # as measured
    units: float | None = None  # as corrected, catching up left out
    expected_us: float | None = None  # as corrected, catching up included
    unit_us: float = 0.0  # as measured


class ServedCosts:
    """The tables of a server's profile, corrected by the passes that the clock times.

    Args:
        clock: times the server's passes.
        stats: exports how far the tables are off.

    Attributes:
        profile: in use; None before `use` or a `find` that finds one.
        model: the tables as measured; None before `use`.
        corrected: the tables as corrected; None before `use`.
        residuals: what was measured against the tables; None before `use`, and without correction.
        table: costs of the running requests as measured; None before `look_up`.
        current: the same as corrected.
        prompt_row_us: what the draft takes for a row of a prompt, by its last prefills; None while
            that is not known, and without correction.
    """

    def __init__(self, config: CastConfig, clock: PassClock, stats: StepStats) -> None:
        self.profile: FoundProfile | None = None
        self.model: CostModel | None = None
        self.corrected: CorrectedCosts | None = None
        self.residuals: Residuals | None = None
        self.table: StepCosts | None = None
        self.current: StepCosts | None = None
        self.prompt_row_us: float | None = None
        # Time and rows of the draft's prefills; older ones count less, as older steps in a price.
        self._prefill_us, self._prefill_rows = 0.0, 0.0
        self._config, self._clock, self._stats = config, clock, stats
        self._is_reported = False

    def find(self, server_args: ServerArgs, limits: Limits) -> None:
        """Take the tables of the profile of this device and pair, if there is one.

        Every rank takes what rank 0 finds: meanwhile another server may save a profile.

        Args:
            limits: the largest shapes of the server.
        """
        found, parallel = None, get_parallel()
        if parallel.tp_rank == 0:
            found = find_server_profile(self._config, server_args, host_identity(server_args))
        if parallel.tp_size > 1:
            found = get_tp_group().broadcast_object(found, src=0)
        if found is not None:
            self.use(found, limits)

    def use(self, found: FoundProfile, limits: Limits) -> None:
        """Take this profile's tables.

        Args:
            limits: the largest shapes of the server.
        """
        self.profile = found
        self.model = CostModel(found.profile, limits, lookup=self._config.lookup)
        if self.model.extrapolated:
            axes = ", ".join(sorted(self.model.extrapolated))
            logger.warning(
                "CAST: cost profile %s ends below this server's limits, in %s; beyond them it is "
                "extrapolated",
                *(found.path, axes),
            )
        residuals = Residuals(limits)
        self.corrected = CorrectedCosts(self.model, residuals)
        chooses = self._config.policy != "eagle" and not self._config.trace_full
        if self._config.residuals == "on" and chooses:
            self.residuals = residuals

    def look_up(
        self, batch_size: int, context: float, layer_costs: Callable[[StepCosts], StepCosts]
    ) -> None:
        """Look up what a step of the running requests costs; without effect before `use`.

        Args:
            context: mean length of the requests, in tokens.
            layer_costs: the drafter's, see `drafting.base.Drafter`.
        """
        if self.model is not None and self.corrected is not None:
            self.table = layer_costs(self.model.step_costs(batch_size, context))
            self.current = layer_costs(self.corrected.step_costs(batch_size, context))

    def reset(self) -> bool:
        """Forget all corrections; return whether the tables are corrected at all."""
        if self.residuals is None:
            return False
        self.residuals.reset()
        self.prompt_row_us, self._prefill_us, self._prefill_rows = None, 0.0, 0.0
        return True

    def state(self) -> dict[str, Any]:
        """Return the profile in use and what is corrected of it, as JSON can hold it."""
        profile = None
        if self.profile is not None:
            estimated = self.profile.profile.provenance.estimated
            profile = {"path": str(self.profile.path), "estimated": estimated}
        residuals = [row._asdict() for row in self.residuals or ()]
        return {"profile": profile, "residuals": residuals}

    def take_times(self, on_pass: Callable[[TimedPass], None] | None) -> None:
        """Record the passes that the device has finished since the last call.

        Args:
            on_pass: called with each of them; None for nothing more.
        """
        for num_rows, measured_us in self._clock.finished_prefills():
            self._prefill_us = KEEP * self._prefill_us + measured_us
            self._prefill_rows = KEEP * self._prefill_rows + num_rows
        for timed in self._clock.finished():
            if on_pass is not None:
                on_pass(timed)
            if self.residuals is not None:
                ratio = timed.measured_us / timed.predicted_us
                self.residuals.record(timed.operation, timed.batch_size, timed.num_tokens, ratio)

    def take_step(self, batch_size: int, step: PendingStep, measured_us: float) -> None:
        """Record how long a whole step took."""
        if self.residuals is not None and step.expected_us is not None:
            measured, expected = measured_us / step.unit_us, step.expected_us / step.unit_us
            self.residuals.record_step(batch_size, step.num_layers, measured, expected)

    def step_times(
        self,
        widths: tuple[int, ...],
        rows: float,
        extend_rows: float,
        catch_up: float,
        drafts: bool,
    ) -> StepTimes:
        """Return what a step of the running requests takes.

        Args:
            widths, rows, extend_rows, drafts: of its tree, as `step_units` takes them.
            catch_up: units that bringing the draft up to date takes.
        """
        if self.table is None or self.current is None:
            return StepTimes()
        predicted = step_units(self.table, widths, rows, extend_rows, drafts)
        units = step_units(self.current, widths, rows, extend_rows, drafts)
        expected_us = (units + catch_up) * self.current.unit_us
        return StepTimes(predicted * self.table.unit_us, units, expected_us, self.table.unit_us)

    def correct(self, step: int) -> None:
        """Apply what the last steps measured to the costs of the next ones, now and then.

        Args:
            step: number of the step that begins.
        """
        if self.residuals is None or step % REFRESH_EVERY:
            return
        prefill = self._prefill_us, self._prefill_rows
        measured = self.residuals.values(), prefill
        if get_parallel().tp_size > 1:
            # Every rank must choose the same trees, so every rank takes rank 0's times.
            measured = get_tp_group().broadcast_object(measured, src=0)
        values, (prefill_us, rows) = measured
        self.prompt_row_us = prefill_us / rows if rows else None
        self.residuals.refresh(values)
        if step % EXPORT_EVERY == 0:
            self._stats.record_residuals(self.residuals)
            self._report(self.residuals.suspects())

    def _report(self, suspects: list[Residual]) -> None:
        """Log once that the profile is off, and again when it was right in between."""
        assert self.profile is not None
        if not suspects:
            self._is_reported = False
        elif not self._is_reported:
            self._is_reported = True
            worst = suspects[0]
            logger.warning(
                "CAST: cost profile %s is off: %s at batch size %d-%d and %d-%d tokens takes %.2f "
                "times what it says (%d such entries); serving corrects for it. Measure again: %s",
                self.profile.path,
                worst.operation,
                *worst.batch_sizes,
                *worst.tokens,
                worst.ratio,
                len(suspects),
                self.profile.command,
            )
