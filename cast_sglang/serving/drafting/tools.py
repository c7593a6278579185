"""StepTools: what both workers run their steps with."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cast_sglang.policy.decider import Decider
    from cast_sglang.serving.calibration import Calibration
    from cast_sglang.serving.copies import Copies
    from cast_sglang.serving.drafting.backlog import Backlog
    from cast_sglang.serving.drafting.draws import Draws
    from cast_sglang.serving.host_reads import HostReads
    from cast_sglang.serving.launch.graph_plan import GraphPlan
    from cast_sglang.serving.pass_clock import PassClock
    from cast_sglang.serving.step_room import StepRoom
    from cast_sglang.serving.trace_recorder import TraceRecorder

__all__ = ["StepTools"]


@dataclasses.dataclass(slots=True)
class StepTools:
    """What the worker of the target runs its steps with, and the draft worker too."""

    decider: Decider
    calibration: Calibration | None  # None for scores as the draft model states them
    reads: HostReads
    clock: PassClock
    recorder: TraceRecorder | None  # None without recording
    backlog: Backlog
    is_ragged: bool  # the target and the draft run requests of unequal numbers of rows
    graph_plan: GraphPlan | None  # None where all passes are launched kernel by kernel
    verify_sizes: tuple[int, ...]  # ascending sizes that verify may have
    room: StepRoom  # of the step that runs
    draws: Draws
    copies: Copies | None = None  # None where nothing is copied
    weights: np.ndarray | None = None  # [B], what a token of each of its requests is worth
    num_left_out: int = 0  # prompts of the prefill that runs, which the draft leaves out
