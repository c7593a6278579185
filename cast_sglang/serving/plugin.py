"""Entry point of SGLang's general plugins: the algorithm, the `--cast-*` flags, clean errors.

SGLang executes `register` in every process before it parses arguments. It only logs an error that
`register` raises, and starts without the plugin. That is safe: without registration,
`--speculative-algorithm CAST` is an unknown name and the server stops.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from types import TracebackType
from typing import Any, NoReturn

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from cast_sglang.config import CastConfig, add_flags, flag_of, given_flags
from cast_sglang.errors import CastError

logger = logging.getLogger(__name__)

_LOGPROBS = (
    "sglang.srt.managers.scheduler_components.logprob_result_processor."
    "SchedulerLogprobResultProcessor"
)
_REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput"
_SAMPLING_PARAMS = "sglang.srt.sampling.sampling_params.SamplingParams"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_CREATE_REQ = "sglang.srt.session.session_controller.Session.create_req"
_LAST_STATES = "sglang.srt.layers.logits_processor.LogitsProcessor._get_last_hidden_states_to_store"
_UPDATE_FINISH_STATE = "sglang.srt.managers.schedule_batch.Req.update_finish_state"


def register() -> None:
    """Register CAST with SGLang."""
    from cast_sglang.serving import algorithm
    from cast_sglang.serving.host_patches import hooks
    from cast_sglang.serving.host_patches.endings import (
        drop_unsaid_logprob,
        end_as_plain,
        forget_unsaid,
    )
    from cast_sglang.serving.host_patches.hidden_states import keep_last_states
    from cast_sglang.serving.request_checks import check_count, check_request, check_sampling

    algorithm.register()
    hooks.register_hooks()
    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", _add_flags, HookType.AFTER)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", _export_flags, HookType.BEFORE)
    for target, check, kind in (
        (f"{_REQUEST}.normalize_batch_and_arguments", check_count, HookType.BEFORE),
        (f"{_SAMPLING_PARAMS}.verify", check_sampling, HookType.AFTER),
        (f"{_TOKENIZER_MANAGER}._create_tokenized_object", check_request, HookType.AFTER),
        (_UPDATE_FINISH_STATE, end_as_plain, HookType.AROUND),
        (_CREATE_REQ, forget_unsaid, HookType.BEFORE),
        (f"{_LOGPROBS}.add_logprob_return_values", drop_unsaid_logprob, HookType.AFTER),
        (_LAST_STATES, keep_last_states, HookType.AROUND),
    ):
        HookRegistry.register(target, check, kind)
    for method, hook, kind in (
        ("__init__", _make_ready, HookType.AFTER),
        ("get_internal_state", _add_internal_state, HookType.AFTER),
        ("set_internal_state", _reset_residuals, HookType.AROUND),
        ("handle_rpc_request", _handle_profile_request, HookType.AROUND),
    ):
        HookRegistry.register(f"{_SCHEDULER}.{method}", hook, kind)
    _print_errors_as_one_line()


def _add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    add_flags(parser.add_argument_group("CAST (--speculative-algorithm CAST)"))
    error = parser.error

    def explain(message: str) -> NoReturn:
        """Raise a ConfigError for a mistyped flag of ours; argparse would print all of SGLang's."""
        unknown = message.partition("unrecognized arguments: ")[2].split()
        for flag, value in zip(unknown, [*unknown[1:], ""], strict=False):
            if flag.startswith("--cast-"):
                name, _, given = flag.removeprefix("--cast-").partition("=")
                CastConfig.load({name.replace("-", "_"): given or value}, environ={})
        error(message)

    parser.error = explain  # type: ignore[method-assign]


def _export_flags(*args: Any, **kwargs: Any) -> None:
    """Check the `--cast-*` flags and hand them to the server's processes as environment."""
    namespace = next(
        arg for arg in (*args, *kwargs.values()) if isinstance(arg, argparse.Namespace)
    )
    given = given_flags(namespace)
    CastConfig.load(given)
    if (namespace.speculative_algorithm or "").upper() == "CAST":
        from cast_sglang.serving.launch.arguments import check_device, check_flags

        check_device()
        check_flags(namespace)
    elif flags := [flag_of(key) for key, value in given.items() if value is not None]:
        logger.warning(
            "CAST: %s has no effect without --speculative-algorithm CAST", ", ".join(flags)
        )
    for key, value in given.items():
        if value is not None:
            os.environ[f"CAST_{key.upper()}"] = str(value)


def _make_ready(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Make the worker that was just built ready to serve.

    Its metrics are exported, with the labels of SGLang's own and by the same ranks; what it will
    run is compiled; the cost profile that it lacks is measured.
    """
    worker = scheduler.draft_worker
    if not hasattr(worker, "cast_stats"):
        return
    context = scheduler.metrics_collector_context
    if context.current_scheduler_metrics_enabled:
        worker.cast_stats.export(context.collector.labels)
    if get_parallel().tp_rank == 0:
        _say_capacity(scheduler.max_total_num_tokens, scheduler.max_running_requests)
    with torch.no_grad():  # as the scheduler's loop, which has not begun
        if worker.device != "cpu":
            from cast_sglang.serving.profiling.warm_up import warm_up

            warm_up(worker)
        if worker.lacks_profile:
            from cast_sglang.serving.profiling.first_start import provide_profile

            provide_profile(scheduler)


def _say_capacity(pool: int, requests: int) -> None:
    """Log what speculation costs of the cache, and so of how many requests run at once."""
    from cast_sglang.serving.step_room import STOCK_TREE, slots_reserved, stock_slots

    reserve = slots_reserved()
    logger.info(
        "CAST: at most %d requests at once in a cache of %d tokens; each reserves %d slots for its "
        "next step, all together %.0f %% of the cache. Plain decoding reserves one, SGLang's "
        "default tree %d; a smaller --speculative-num-draft-tokens reserves less",
        *(requests, pool, reserve, 100 * requests * reserve / pool, stock_slots(*STOCK_TREE)),
    )


def _reset_residuals(original: Any, scheduler: Any, request: Any) -> Any:
    """Serve `{"server_args": {"cast_reset_residuals": 1}}`, which SGLang does not know."""
    if request.server_args != {"cast_reset_residuals": 1}:
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    costs = getattr(scheduler.draft_worker, "costs", None)
    return SetInternalStateReqOutput(updated=costs is not None and costs.reset())


def _add_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    if hasattr(scheduler.draft_worker, "cast_state"):
        result.internal_state["cast"] = scheduler.draft_worker.cast_state()
    return result


def _handle_profile_request(original: Any, scheduler: Any, request: Any) -> Any:
    """Serve the profiler's call, which SGLang would look up among the scheduler's methods."""
    from cast_sglang.serving.profiling import command

    if request.method == command.RPC_METHOD:
        return command.handle_rpc(scheduler, request.parameters)
    return original(scheduler, request)


def _print_errors_as_one_line() -> None:
    previous = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, CastError):
            print(f"cast-sglang: error: {error}", file=sys.stderr)  # noqa: T201
        else:
            previous(kind, error, traceback)

    sys.excepthook = hook
