"""What the plugin changes in SGLang when a process starts: hooks on its functions and classes.

Every hook leaves servers of other algorithms as they are, but for the room of a request's row on
the CPU platform.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from sglang.srt.arg_groups.overrides import ResolvedView, resolved_view
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_spec
from sglang.srt.utils.common import ceil_align

from cast_sglang.cpu.names import PLATFORM_NAME
from cast_sglang.ops.copies import to_device
from cast_sglang.serving.host_patches.passes import leave_room
from cast_sglang.serving.launch.identity import is_draft_path
from cast_sglang.serving.step_room import PLAIN_RESERVE, slots_reserved
from cast_sglang.serving.weight_updates import (
    release_draft,
    resume_draft,
    update_draft_from_disk,
    why_not,
    with_rollback,
)

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

__all__ = ["building_draft_worker", "is_cast", "register_hooks"]

_KV_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator"
_EAGLE_UTILS = "sglang.srt.speculative.eagle_utils"
_MIN_NEW_TOKENS = "sglang.srt.sampling.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer"
_SAMPLING_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_SCHEDULE_BATCH = "sglang.srt.managers.schedule_batch.ScheduleBatch"
_TOKENIZER_MANAGER = "sglang.srt.managers.tokenizer_manager"
_TRITON = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend"
_METRICS_REPORTER = (
    "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
)
_WEIGHT_UPDATER = (
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
)

# Slots that the batch that is being prepared reserves per request; None for SGLang's own number.
_reserve: int | None = None


def register_hooks() -> None:
    """Register the hooks; SGLang applies them in every process after all plugins are loaded."""
    for target, hook in (
        (f"{_KV_CONFIGURATOR}.get_req_to_token_extra_context_len", _widen_rows),
        # Both names of the function: SGLang's two front ends import it.
        (f"{_TOKENIZER_MANAGER}.compute_num_reserved_tokens", _reserve_no_context),
        ("sglang.srt.rust_server.config.compute_num_reserved_tokens", _reserve_no_context),
        ("sglang.srt.arg_groups.lora_hook.check_lora_speculative_compatibility", _check_adapters),
        (f"{_SCHEDULE_BATCH}._new_tokens_required_next_decode_spec_v2", _tokens_required),
        (f"{_EAGLE_UTILS}.get_alloc_reserve_per_decode", _reserve_of_batch),
        (f"{_EAGLE_UTILS}.eagle_prepare_for_decode", _prepare_for_decode),
        (f"{_EAGLE_UTILS}.eagle_sample", _sample),
        (f"{_MIN_NEW_TOKENS}._prepare", _count_tokens),
        (f"{_SAMPLING_INFO}.apply_logits_bias", _apply_logits_bias),
        ("sglang.srt.layers.sampler.apply_custom_logit_processor", _apply_processors),
        (f"{_TRITON}.__init__", _leave_room),
        (f"{_TRITON}.init_cuda_graph_state", _size_graph_buffers),
        (f"{_WEIGHT_UPDATER}._select_runners", _select_runners),
        (f"{_WEIGHT_UPDATER}.update_weights_from_disk", _update_weights_from_disk),
        (f"{_WEIGHT_UPDATER}.release_memory_occupation", _release_memory),
        (f"{_WEIGHT_UPDATER}.resume_memory_occupation", _resume_memory),
        (f"{_TOKENIZER_MANAGER}.TokenizerManager._update_model_path_info", _keep_model_path),
        (f"{_TOKENIZER_MANAGER}.TokenizerManager._calculate_spec_decoding_metrics", _request_rate),
        (f"{_METRICS_REPORTER}.report_decode_stats", _report_decode_stats),
    ):
        HookRegistry.register(target, hook, HookType.AROUND)


def is_cast() -> bool:
    """Return whether this process serves with CAST."""
    return get_spec().speculative_algorithm == "CAST"


@contextlib.contextmanager
def building_draft_worker(draft_worker_class: type) -> Iterator[None]:
    """Let EAGLEWorkerV2's constructor build our draft worker; it names its class by a global."""
    from sglang.srt.speculative import eagle_worker_v2

    original = eagle_worker_v2.EagleDraftWorker
    eagle_worker_v2.EagleDraftWorker = draft_worker_class
    try:
        yield
    finally:
        eagle_worker_v2.EagleDraftWorker = original


def _widen_rows(original: Callable[[], int]) -> int:
    """Give a row of `req_to_token` room for what a step reserves past the context limit.

    SGLang reserves 2 * max(steps * topk, tokens) slots for a request's next step, and at page size
    1 gives its row room for 4 + tokens. A request near the limit then writes into the next row.
    CAST reserves less, and reads as many entries of the row. The platform serves SGLang's own EAGLE
    trees, which have the same need.
    """
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
    from sglang.srt.platforms import current_platform

    extra = original()
    if get_spec().speculative_algorithm is None:
        return extra
    if is_cast() or current_platform.device_name == PLATFORM_NAME:
        extra = max(extra, get_alloc_reserve_per_decode())
    if is_cast():  # of a chain as long as its rows SGLang's number lacks one
        extra = max(extra, slots_reserved())
    return extra


def _reserve_no_context(original: Callable[[], int]) -> int:
    """Admit the prompts and lengths that plain decoding admits: drafts shrink near the limit."""
    return 0 if is_cast() else original()


def _check_adapters(original: Callable[[Any], None], server_args: Any) -> None:
    """Allow adapters with what SGLang allows them with under EAGLE; it goes by the name.

    It asks for as many rows of every request in a verify pass, which CAST gives them.
    """
    config = resolved_view(server_args)
    if config.speculative_algorithm == "CAST":
        overlay = {"speculative_algorithm": "EAGLE", "_resolved_overrides": ()}
        server_args = ResolvedView(config, overlay=overlay)
    original(server_args)


def _must_decode_plainly(batch: ScheduleBatch, requests: list[Req]) -> bool:
    """Return whether a request that is alone cannot get the slots of a step with drafts."""
    if len(requests) != 1:
        return False
    free = batch.token_to_kv_pool_allocator.available_size() + batch.tree_cache.evictable_size()
    page_size = batch.token_to_kv_pool_allocator.page_size
    return bool(free < _slots_lacking(requests[0], slots_reserved(), page_size))


def _slots_lacking(request: Req, reserve: int, page_size: int) -> int:
    """Return the slots, in whole pages, that a request still needs for `reserve` more tokens."""
    end = ceil_align(request.kv.kv_committed_len + reserve, page_size)
    # After a prefill a request holds the rest of its last page too.
    return max(0, end - ceil_align(request.kv.kv_allocated_len, page_size))


def _tokens_required(
    original: Callable[..., int], batch: ScheduleBatch, requests: list[Req], page_size: int
) -> int:
    """Ask the pool for what a step may need; for plain decoding's slots where it lacks that.

    SGLang aborts a request for which the pool has no room when it runs alone. Plain decoding would
    serve it, so such a request is decoded with what there is.
    """
    if not is_cast():
        return int(original(batch, requests, page_size))
    reserve = PLAIN_RESERVE if _must_decode_plainly(batch, requests) else slots_reserved()
    return sum(_slots_lacking(request, reserve, page_size) for request in requests)


def _prepare_for_decode(original: Callable[[ScheduleBatch], None], batch: ScheduleBatch) -> None:
    """Reserve what `_tokens_required` asked for.

    Raises:
        IndexError: a request would write past the end of its row, into that of another request.
    """
    global _reserve
    if not is_cast():
        original(batch)
        return
    _reserve = PLAIN_RESERVE if _must_decode_plainly(batch, batch.reqs) else slots_reserved()
    end = max(req.kv.kv_committed_len for req in batch.reqs) + _reserve
    end = ceil_align(end, batch.token_to_kv_pool_allocator.page_size)
    row = batch.req_to_token_pool.req_to_token.shape[1]
    if end > row:
        raise IndexError(f"a request reserves {end} slots, and its row of req_to_token has {row}")
    try:
        original(batch)
    finally:
        _reserve = None


def _sample(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Sample as plain decoding does; imported late, as the kernels need a device."""
    from cast_sglang.serving.host_patches.sampling import sample_as_plain

    return sample_as_plain(original, *args, **kwargs)


def _count_tokens(original: Callable[[Any], None], penalizer: Any) -> None:
    """Let the penalty of `min_new_tokens` begin with the tokens that its requests have.

    SGLang counts from 0, also for a request that comes back from a retraction, its answer begun.
    """
    original(penalizer)
    if is_cast():
        reqs = penalizer.orchestrator.reqs()
        counts = np.array([[len(req.output_ids)] for req in reqs], np.int32)
        penalizer.len_output_tokens = to_device(counts, penalizer.orchestrator.device)


def _apply_logits_bias(
    original: Callable[..., None], info: SamplingBatchInfo, logits: torch.Tensor
) -> None:
    """Leave every row of logits something to sample from; see `sampling.lift_bans`."""
    original(info, logits)
    if is_cast() and info.grammar_mask is not None:
        penalties = info.penalizer_orchestrator
        if info.acc_additive_penalties is not None or (penalties and penalties.is_required):
            from cast_sglang.serving.host_patches.sampling import lift_bans

            lift_bans(logits)


def _apply_processors(
    original: Callable[..., None], logits: torch.Tensor, info: SamplingBatchInfo, *args: Any
) -> None:
    """Let a custom processor that fails end its own request alone; see `sampling.guarded`."""
    if is_cast():
        from cast_sglang.serving.host_patches.sampling import guarded

        info = guarded(info)
    original(logits, info, *args)


def _leave_room(original: Callable[..., None], backend: Any, *args: Any, **kwargs: Any) -> None:
    """Leave room in the buffers of `triton` for the target and the draft; see `passes`."""
    original(backend, *args, **kwargs)
    if is_cast():
        leave_room(backend)


def _size_graph_buffers(
    original: Callable[..., None],
    backend: Any,
    max_bs: int,
    max_num_tokens: int,
    kv_indices_buf: torch.Tensor | None = None,
    **buffers: torch.Tensor | None,
) -> None:
    """Make the buffers of captured passes as large as the passes read them.

    SGLang makes room for a prefix of the longest context before each row: 1.6 GB for 48 requests of
    32 rows at 128 Ki tokens. Verify and draft extend read one prefix per request, and of decode's
    partial results nothing.
    """
    if not is_cast() or kv_indices_buf is not None:
        original(backend, max_bs, max_num_tokens, kv_indices_buf, **buffers)
        return
    num_slots = max_bs * backend.max_context_len
    slots = torch.zeros(num_slots, dtype=torch.int64, device=backend.device)
    original(backend, max_bs, max_bs, slots, **buffers)
    if backend.use_sliding_window_kv_pool:  # of each row, where its keys are written
        backend.cuda_graph_swa_out_cache_loc = slots.new_zeros(max_num_tokens)


def _reserve_of_batch(original: Callable[[], int]) -> int:
    return original() if _reserve is None else _reserve


def _select_runners(
    original: Callable[..., list[tuple[str, Any]]], manager: Any, selector: str = "all"
) -> list[tuple[str, Any]]:
    """Take "all" for the target: its weights do not fit a draft that has a checkpoint of its own.

    The draft shares the target's embedding, and its head where it has none, as the same tensors.
    """
    if selector == "all" and is_cast():
        selector = "target"
    return original(manager, selector)


def _update_weights_from_disk(
    original: Callable[..., Any], manager: Any, request: UpdateWeightFromDiskReqInput
) -> Any:
    """Update the draft where the path is that of a draft, else the target alone.

    What does not fit is refused before any weight is touched. Files that turn out to be damaged
    leave the weights that were served before.
    """
    if not is_cast():
        return original(manager, request)
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput

    path, of_draft = request.model_path, is_draft_path(request.model_path)
    target, draft_worker = manager.tp_worker.model_runner, manager.draft_worker.draft_worker
    runners = draft_worker.draft_runners if of_draft else [target]
    error: str | None = f"{path} is a draft, and this server has none"
    if runners:
        model_config = runners[0].model_config
        error = why_not(path, model_config.hf_config)
    if error is not None:
        success, message = False, error
    elif of_draft:

        def update_draft(wanted: str) -> tuple[bool, str]:
            return update_draft_from_disk(draft_worker, target.model, wanted, request.load_format)

        success, message = with_rollback(model_config, path, update_draft)
        if success:
            manager.record_weight_version_after_update(request.weight_version)
            success, message = manager.flush_cache_after_weight_update(request, success, message)
    else:

        def update_target(wanted: str) -> tuple[bool, str]:
            output = original(manager, msgspec.structs.replace(request, model_path=wanted))
            return output.success, output.message

        success, message = with_rollback(model_config, path, update_target)
    if success and (calibration := manager.draft_worker.calibration) is not None:
        of = "draft" if of_draft else "target"
        calibration.last_change = f"the weights of the {of} were updated from {path}"
    return UpdateWeightFromDiskReqOutput(success=success, message=message, num_paused_requests=0)


def _release_memory(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    if is_cast():
        release_draft(manager, request.tags)
    return original(manager, request)


def _resume_memory(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    output = original(manager, request)
    if is_cast():
        resume_draft(manager, request.tags)
    return output


def _keep_model_path(
    original: Callable[..., None], manager: Any, model_path: str, load_format: str
) -> None:
    """Keep the name of the served model where only its draft was updated."""
    if not (is_cast() and is_draft_path(model_path)):
        original(manager, model_path, load_format)


def _request_rate(
    original: Callable[..., None], manager: Any, meta_info: dict[str, Any], output: Any, i: int
) -> None:
    """Relate a request's accepted drafts to those that were verified for it.

    SGLang takes each verify pass for one of `--speculative-num-draft-tokens` rows.
    """
    original(manager, meta_info, output, i)
    if is_cast() and "spec_accept_rate" in meta_info:
        proposed = output.spec_num_cap_tokens[i] - output.spec_verify_ct[i]
        accepted = meta_info["spec_num_correct_drafts"]
        meta_info["spec_num_proposed_drafts"] = proposed
        meta_info["spec_accept_rate"] = accepted / proposed if proposed else 0.0


def _report_decode_stats(
    original: Callable[..., None], reporter: Any, *args: Any, **kwargs: Any
) -> None:
    """Make the accept rate of SGLang's log line and gauge one of the drafts that were verified.

    SGLang divides the accepted drafts by those of passes of full width, so they are scaled by full
    over verified width; they are read for nothing else and then begin anew.
    """
    is_due = reporter.forward_ct_decode % reporter.decode_log_interval == 0
    reports = reporter.is_stats_logging_rank or reporter.current_scheduler_metrics_enabled
    if is_due and reports and is_cast():
        passes = reporter.spec_num_forward_ct
        verified = reporter.spec_num_cap_tokens - passes
        assumed = passes * (get_spec().speculative_num_draft_tokens - 1)
        reporter.spec_num_correct_drafts *= assumed / verified if verified else 0.0
    original(reporter, *args, **kwargs)
