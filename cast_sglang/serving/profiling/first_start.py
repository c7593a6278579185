"""A server without a cost profile measures or estimates one before its first request."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.arg_groups.overrides import resolving_view

from cast_sglang.costs.profiles import FoundProfile, save_profile, user_profile_path
from cast_sglang.costs.schema import CostProfile
from cast_sglang.errors import CastError, ProfileError
from cast_sglang.profiling.grid import default_grid
from cast_sglang.profiling.meter import Sampling
from cast_sglang.profiling.roofline import ModelSize, estimate_tables, measure_rates
from cast_sglang.profiling.run import make_profile, run_profile
from cast_sglang.serving.launch.cost_profile import in_force, profile_command
from cast_sglang.serving.launch.identity import host_identity, without_local_paths
from cast_sglang.serving.profiling.engine_meter import EngineMeter
from cast_sglang.serving.profiling.ranks import measure_on_all_ranks
from cast_sglang.serving.profiling.short_run import complete_profile

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    from cast_sglang.costs.schema import HostIdentity
    from cast_sglang.serving.worker import CastWorker

__all__ = ["provide_profile"]

logger = logging.getLogger(__name__)

# Unless a pass takes longer than some ten milliseconds, the measurement ends much sooner.
BUDGET_SECONDS = 60.0
SAMPLING = Sampling(
    max_visits=3, tolerance=0.05, interpolation_tolerance=1.0, heldout_points=6, visit_passes=2
)


def provide_profile(scheduler: Scheduler) -> None:
    """Give all ranks of an engine that found no profile the same new one.

    Call it before the scheduler serves its first request.
    """
    worker: CastWorker = scheduler.draft_worker
    is_first = scheduler.tp_group.rank_in_group == 0
    args = resolving_view(worker.server_args)
    identity = without_local_paths(host_identity(args))
    profile = None
    if worker.config.profile == "auto":
        if is_first:
            logger.info("CAST: measuring a quick cost profile, for %g s at most", BUDGET_SECONDS)
        profile = measure_on_all_ranks(scheduler, lambda meter: _measured(meter, identity))
    encoded = b""
    if is_first:
        encoded = msgspec.json.encode(profile or _estimated(worker, identity))
    if scheduler.tp_group.world_size > 1:
        encoded = scheduler.tp_group.broadcast_object(encoded, src=0)
    profile = msgspec.json.decode(encoded, type=CostProfile)
    command = profile_command(args, identity)
    found = FoundProfile(profile, user_profile_path(identity), [], command)
    if worker.config.profile == "estimate":
        worker.use_profile(found)
    else:
        found = complete_profile(scheduler, found)
        if is_first and not profile.provenance.estimated:
            _save(found)
    if profile.provenance.estimated:
        text = "decides by costs ESTIMATED from the device's bandwidth and peak rate, not measured"
    elif found.path.is_file():
        text = in_force(found)
    else:
        text = f"decides by what was measured in {profile.provenance.seconds:.0f} s"
    if is_first:
        level = logging.WARNING if profile.provenance.estimated else logging.INFO
        logger.log(level, "CAST: %s; for better tables run: %s", text, command)


def _measured(meter: Any, identity: HostIdentity) -> CostProfile | None:
    """Measure and save a profile; log a failure and return None."""
    try:
        measured = run_profile(
            meter,
            grid=default_grid(meter.limits(), quick=True),
            sampling=SAMPLING,
            budget_seconds=BUDGET_SECONDS,
            allow_partial=True,
        )
    except CastError as error:
        logger.warning("CAST: measuring failed: %s", error)
        return None
    profile = make_profile(measured, identity, command="--cast-profile auto")
    _save(FoundProfile(profile, user_profile_path(identity), []))
    return profile


def _save(found: FoundProfile) -> None:
    try:
        save_profile(found.profile, found.path)
    except ProfileError as error:
        logger.warning("CAST: the next start will measure again: %s", error)


def _estimated(worker: CastWorker, identity: HostIdentity) -> CostProfile:
    target = worker.target_worker.model_runner
    tables = estimate_tables(
        default_grid(EngineMeter.limits_of(worker)),
        measure_rates(worker.device, target.dtype),
        _size(target),
        next(map(_size, worker.draft_worker.draft_runners), None),
    )
    return make_profile(tables, identity, command="--cast-profile estimate")


def _size(runner: ModelRunner) -> ModelSize:
    """Return the sizes of a loaded model that decide what a pass takes."""
    tied = getattr(runner.model_config.hf_config, "tie_word_embeddings", False)
    weights = [
        weight
        for name, weight in runner.model.named_parameters()
        # A pass reads few rows of an embedding, unless that is the output layer too.
        if tied or "embed_tokens" not in name
    ]
    pool = runner.token_to_kv_pool
    kv_bytes = pool.get_kv_size_bytes()
    return ModelSize(
        num_weights=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        kv_bytes_per_token=int(sum(kv_bytes) if isinstance(kv_bytes, tuple) else kv_bytes)
        // pool.size,
    )
