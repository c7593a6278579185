"""`cast-sglang profile`: start an engine as a server would, and let it measure its own passes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cast_sglang.config import PENDING
from cast_sglang.costs.profiles import FoundProfile, save_profile, user_profile_path
from cast_sglang.errors import HostError
from cast_sglang.profiling.grid import default_grid
from cast_sglang.profiling.journal import journal_path
from cast_sglang.profiling.meter import Meter, Sampling
from cast_sglang.profiling.run import Measured, make_profile, run_profile, summarize
from cast_sglang.serving.launch.engine import environment, started_engine
from cast_sglang.serving.launch.identity import (
    command_without_local_paths,
    host_identity,
    without_local_paths,
)
from cast_sglang.serving.profiling.ranks import measure_on_all_ranks
from cast_sglang.serving.profiling.short_run import complete_profile

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from cast_sglang.costs.schema import HostIdentity

logger = logging.getLogger(__name__)

RPC_METHOD = "cast_profile"


def profile_server(
    server_argv: list[str],
    output: str | None,
    *,
    quick: bool = False,
    budget_seconds: float | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Start an engine with the given server flags, measure its cost profile and save it.

    Args:
        server_argv: SGLang's flags, at least --model-path and --speculative-draft-model-path.
        output: file of the profile; None for the one in the user's cache directory.

    Returns:
        The facts of the run, as `profiling.run.summarize` gives them.

    Raises:
        CastError: CAST refuses the flags, or the measurement failed.
    """
    # The engine's processes read settings from their environment. The user's file of what serving
    # learned is left alone.
    with environment(CAST_PROFILE=PENDING, CAST_CALIBRATION_FILE="none"):
        return _profile(server_argv, output, quick, budget_seconds, command)


def _profile(
    server_argv: list[str],
    output: str | None,
    quick: bool,
    budget_seconds: float | None,
    command: str,
) -> dict[str, Any]:
    with started_engine(server_argv) as engine, tempfile.TemporaryDirectory() as directory:
        facts = Path(directory) / "facts.json"
        try:
            engine.collective_rpc(
                RPC_METHOD,
                output=output and os.path.abspath(output),
                facts=str(facts),
                quick=quick,
                budget_seconds=budget_seconds,
                command=command,
            )
        except AssertionError as error:  # how SGLang reports a failed call
            raise HostError(f"profiling failed: {error}") from error
        return dict(json.loads(facts.read_text()))


def handle_rpc(scheduler: Scheduler, parameters: dict[str, Any]) -> Any:
    """Run the measurement in a scheduler's process; SGLang calls this on every rank."""
    from sglang.srt.managers.io_struct import RpcReqOutput

    error = ""
    try:
        _measure_and_serve(scheduler, parameters)
    except Exception as caught:
        logger.exception("profiling failed")
        error = " ".join(str(caught).split()) or type(caught).__name__
    return RpcReqOutput(success=not error, message=error)


def _measure_and_serve(scheduler: Scheduler, parameters: dict[str, Any]) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    group = scheduler.tp_group
    server_args = resolving_view(scheduler.draft_worker.server_args)
    identity = without_local_paths(host_identity(server_args))
    output = parameters["output"] or str(user_profile_path(identity))

    measured = measure_on_all_ranks(
        scheduler, lambda meter: _measure(meter, identity, output, parameters)
    )
    profile = None
    if measured is not None:
        # Saved before and after the short run, and the journal is kept until then, so that a run
        # that ends in between resumes and measures nothing twice.
        command = command_without_local_paths(parameters["command"])
        profile = make_profile(measured, identity, command)
        save_profile(profile, output)
    if group.world_size > 1:
        profile = group.broadcast_object(profile, src=0)
    assert profile is not None
    found = complete_profile(scheduler, FoundProfile(profile, Path(output), []))
    if measured is not None:
        save_profile(found.profile, output)
        journal_path(output).unlink(missing_ok=True)
        facts = summarize(measured, output, found.profile.serving)
        Path(parameters["facts"]).write_text(json.dumps(facts))


def _measure(
    meter: Meter, identity: HostIdentity, output: str, parameters: dict[str, Any]
) -> Measured:
    quick = parameters["quick"]
    return run_profile(
        meter,
        grid=default_grid(meter.limits(), quick=quick),
        sampling=Sampling.quick() if quick else Sampling(),
        budget_seconds=parameters["budget_seconds"],
        journal=journal_path(output),
        host=repr(identity),
        progress=True,
    )
