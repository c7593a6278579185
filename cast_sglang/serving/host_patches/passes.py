"""What the plugin changes in SGLang's objects around single passes, and puts back behind them.

Each context manager changes one runner, attention backend, layer or setting for the passes inside.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from sglang.srt.utils.common import ceil_align

from cast_sglang.errors import HostError
from cast_sglang.serving.row_packing import spread_rows
from cast_sglang.serving.step_room import slots_reserved

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from cast_sglang.costs.graph_sizes import GraphSizes

__all__ = [
    "building_backend",
    "capturing_size",
    "counted_capture",
    "drop_wrappers",
    "extend_rows",
    "full_attention",
    "keeping_buffers",
    "last_rows_only",
    "leave_prefix_unmasked",
    "leave_room",
    "packed_pass",
    "plan_on_the_host",
    "running_on",
    "sharing_buffers",
    "with_own_graphs",
]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def packed_pass(
    runner: ModelRunner,
    packed_rows: torch.Tensor | None,
    layer: torch.nn.Module | None = None,
    read_rows: torch.Tensor | None = None,
) -> Iterator[None]:
    """Make the runner's next passes run only some rows; their outputs are zero at the others.

    Args:
        packed_rows: [T] int64 flat places of the rows to run, ascending; None for all.
        layer: the model's last layer, which then runs only the rows that are read to its end, or
            a head with `read_rows`, which drops the others behind it; None to run it whole.
        read_rows: [B] int64 flat places, ascending, each one of the packed; needed with a layer.
    """
    narrowed: contextlib.AbstractContextManager[None]
    if layer is not None and read_rows is not None:
        output_rows, within = read_rows, read_rows
        if packed_rows is not None:
            within = torch.searchsorted(packed_rows, read_rows)
        narrowed = _narrow_last_layer(layer, within)
    elif packed_rows is not None:
        output_rows, narrowed = packed_rows, contextlib.nullcontext()
    else:
        yield
        return
    forward = runner.forward

    def forward_packed(forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> Any:
        num_rows = forward_batch.input_ids.shape[0]
        spec_info = forward_batch.spec_info
        if packed_rows is not None:
            for name in ("input_ids", "positions", "out_cache_loc"):
                setattr(forward_batch, name, getattr(forward_batch, name)[packed_rows])
            if getattr(spec_info, "hidden_states", None) is not None:
                spec_info.hidden_states = spec_info.hidden_states[packed_rows]
        output = forward(forward_batch, *args, **kwargs)
        logits_output = output.logits_output
        for name in ("next_token_logits", "hidden_states", "last_hidden_states"):
            rows = getattr(logits_output, name)
            if rows is not None:  # hidden states are there only where something reads them
                setattr(logits_output, name, spread_rows(rows, output_rows, num_rows))
        return output

    runner.forward = forward_packed
    if packed_rows is not None:
        runner.attn_backend.packed_rows = packed_rows
    try:
        with narrowed:
            yield
    finally:
        del runner.forward
        if packed_rows is not None:
            runner.attn_backend.packed_rows = None


@contextlib.contextmanager
def last_rows_only(
    norm: torch.nn.Module, layer: torch.nn.Module, last: torch.Tensor
) -> Iterator[None]:
    """Make a model return only its last rows; its outputs are zero at the others.

    Args:
        norm: the model's last norm, behind all layers.
        layer: its last layer (`row_packing.last_layer`).
        last: [B] int64 places of the rows, ascending; the last one is the last row of the pass.
    """
    num_rows = int(last[-1]) + 1
    hook = norm.register_forward_hook(
        lambda _, args, normed: tuple(spread_rows(rows, last, num_rows) for rows in normed)
    )
    try:
        with _narrow_last_layer(layer, last):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _narrow_last_layer(layer: Any, rows: torch.Tensor) -> Iterator[None]:
    """Make a decoder layer drop all but these rows behind its attention, or a head at its end."""
    if hasattr(layer, "read_rows"):
        layer.read_rows = rows
        try:
            yield
        finally:
            layer.read_rows = None
        return
    hooks = (
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args: (args[0][rows], *args[1:])
        ),
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: (args[0], args[1][rows], *args[2:])
        ),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def running_on(runner: ModelRunner, backend: Any, graph_runner: Any | None) -> Iterator[None]:
    """Make the target's passes inside run on this backend, and replay this runner's graphs.

    Args:
        graph_runner: None for passes without graphs.
    """
    before = runner.attn_backend
    runner.attn_backend, runner.decode_cuda_graph_runner = backend, graph_runner
    try:
        yield
    finally:
        runner.attn_backend = before


@contextlib.contextmanager
def building_backend(rows: int) -> Iterator[None]:
    """Make the attention backends that are built inside lay passes out with so many rows."""
    from sglang.srt.runtime_context import get_context, get_spec

    spec = get_spec()
    before = {
        "speculative_num_draft_tokens": spec.speculative_num_draft_tokens,
        "speculative_eagle_topk": spec.speculative_eagle_topk,
    }
    changed = {**before, "speculative_num_draft_tokens": rows}
    if rows == 1:  # which is no tree
        changed["speculative_eagle_topk"] = 1
    get_context().override("cast.backend", **changed)
    try:
        yield
    finally:
        get_context().override("cast.built", **before)


def leave_room(backend: Any) -> None:
    """Let the buffers that are yet to be made hold what a step may write past the longest context.

    They are lists and tables of slots, and the mask of verify. SGLang ends a request before a step
    could write there. CAST serves it to the limit, beside others that draft on.

    Args:
        backend: the target's, or another of its kind; `triton`'s of the draft too.
    """
    backend = _verify_backend(backend)
    backend.max_context_len += slots_reserved()
    if hasattr(backend, "max_num_pages"):  # not of `triton`, which lists slots
        backend.max_num_pages = ceil_align(backend.max_context_len, backend.page_size)
        backend.max_num_pages //= backend.page_size


def drop_wrappers(backend: Any) -> None:
    """Free the wrappers that `trtllm_mha` inherits from `flashinfer` and never runs.

    There are four, with 8 MiB each on the device and pinned, and seven where layers have a window.

    Args:
        backend: lays out one number of rows, of the target.
    """
    for name in (
        *("prefill_wrapper_ragged", "prefill_wrappers_paged", "prefill_wrappers_verify"),
        *("decode_wrappers", "indices_updater_prefill", "indices_updater_decode"),
    ):
        vars(backend).pop(name, None)


@contextlib.contextmanager
def extend_rows(backend: Any, rows: int) -> Iterator[None]:
    """Make the backend of draft extend lay captured passes out with this many rows per request."""
    before, backend.num_draft_tokens = backend.num_draft_tokens, rows
    try:
        yield
    finally:
        backend.num_draft_tokens = before


@contextlib.contextmanager
def capturing_size(size: int, batch_sizes: list[int]) -> Iterator[None]:
    """Make SGLang's graph runners, which read the server's arguments, capture this size alone.

    Args:
        size: rows per request.
        batch_sizes: those to capture it at.

    Raises:
        HostError: the capture failed; names the flags that avoid it.
    """
    from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase
    from sglang.srt.runtime_context import get_context, get_exec, get_spec

    config, tokens = get_exec().graph.cuda_graph_config, get_spec().speculative_num_draft_tokens
    get_context().override(
        "cast.capture",
        cuda_graph_config=with_phase(config, Phase.DECODE, bs=batch_sizes),
        speculative_num_draft_tokens=size,
    )
    try:
        yield
    except Exception as error:
        raise HostError(
            f"capturing CUDA graphs of {size} rows per request failed: {error}; "
            "pass --cast-graphs off, or --disable-cuda-graph"
        ) from error
    finally:
        get_context().override(
            "cast.captured", cuda_graph_config=config, speculative_num_draft_tokens=tokens
        )


@contextlib.contextmanager
def counted_capture(
    runner: ModelRunner, phase: str, what: str, sizes: GraphSizes
) -> Iterator[None]:
    """Count what is captured inside as SGLang counts its own graphs, and log it.

    `memory_usage` and `startup_time` of `/server_info` and SGLang's gauges have it.

    Args:
        runner: the one whose passes they are.
        phase: of SGLang's `graph_memory_usage`.
        what: name of the pass and of its sizes, for the log.
        sizes: those that are captured.
    """
    from sglang.srt.utils.common import get_available_gpu_memory

    began, before = time.perf_counter(), get_available_gpu_memory(runner.device, runner.gpu_id)
    yield
    taken = before - get_available_gpu_memory(runner.device, runner.gpu_id)
    seconds = time.perf_counter() - began
    for usage, more in ((runner.graph_memory_usage, taken), (runner.graph_time_usage, seconds)):
        usage[phase] = usage.get(phase, 0.0) + more
    text = "CAST: captured %d graphs of %s at %s in %.1f s, %.2f GB"
    logger.info(text, sizes.num_graphs, what, sizes, seconds, taken)


@contextlib.contextmanager
def keeping_buffers(backend: Any) -> Iterator[None]:
    """Stop graph runners from replacing the backend's buffers, which earlier graphs read."""
    backend.init_cuda_graph_state = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del backend.init_cuda_graph_state


@contextlib.contextmanager
def sharing_buffers(backend: Any, owner: Any) -> Iterator[None]:
    """Let the graphs of one backend use the tables of slots and the mask of another.

    They are as large as the longest context, and filled before each pass, so that the one pass that
    runs reads them.

    Args:
        owner: has captured at least as many requests and rows.
    """
    backend, owner = getattr(backend, "backend", backend), _verify_backend(owner)
    make = backend.init_cuda_graph_state

    def make_and_share(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        for name, theirs in vars(owner).items():
            own = getattr(backend, name, None)
            if isinstance(theirs, dict) and isinstance(own, dict):
                own.update(_shared_tables(own, theirs))
        if getattr(owner, "_verify_mask", None) is not None:
            backend._verify_mask = owner._verify_mask

    backend.init_cuda_graph_state = make_and_share
    try:
        yield
    finally:
        del backend.init_cuda_graph_state


def _shared_tables(own: dict[Any, Any], theirs: dict[Any, Any]) -> dict[Any, torch.Tensor]:
    """Return those of their tables of slots that are as wide as the own ones, by name."""
    shared = {}
    for name, table in theirs.items():
        mine = own.get(name)
        if "page_table" in str(name) and isinstance(mine, torch.Tensor):
            if mine.shape[1:] == table.shape[1:] and len(mine) <= len(table):
                shared[name] = table[: len(mine)]
    return shared


def leave_prefix_unmasked(backend: Any, name: str) -> None:
    """Stop SGLang from filling the whole mask of captured verify passes in every step.

    The mask has a cell for each row and each token of the longest context, hundreds of megabytes
    for a full batch. `triton` and `fa3` read the cells among the rows alone, which the tree builder
    writes one by one.

    Args:
        backend: the target's attention backend, after its buffers were made.
        name: SGLang's of the one that verifies.
    """
    backend = _verify_backend(backend)
    if backend.verify_mask is None:
        return
    # The kernels of inference that is to be deterministic read the mask of the prefix too.
    if name == "fa3" or (name == "triton" and not backend.enable_deterministic):
        backend._verify_mask = msgspec.structs.replace(backend.verify_mask, is_read=False)


def with_own_graphs(backend: Any) -> Any:
    """Return the target's backend with captured passes of its own, over the buffers it has made.

    `flashinfer` keeps the wrappers of a captured pass by batch size alone, which another number of
    rows at this size would replace. Each replay lays out anew.
    """
    own = copy.copy(_verify_backend(backend))
    own.prefill_cuda_graph_metadata, own.decode_cuda_graph_metadata = {}, {}
    return own


def plan_on_the_host(backend: Any) -> None:
    """Let captured verify passes of `flashinfer` be planned by the lengths that the host has.

    The host waits for its own plan, which copies the layout of each pass from the device. SGLang's
    plan for captured passes, which draft extend takes, reads the host's lengths; it packs any mask.
    Other backends, and passes that are not captured, are left alone.
    """
    backend = _verify_backend(backend)
    captured = getattr(backend, "prefill_cuda_graph_metadata", {})
    if not captured or backend.dispatch_reason is not None:
        return
    from sglang.srt.layers.attention.flashinfer_backend import fast_prefill_plan

    for wrappers in captured.values():
        for wrapper in wrappers:
            wrapper.begin_forward = functools.partial(fast_prefill_plan, wrapper)


def full_attention(backend: Any) -> Any:
    """Return the backend of full attention, of a model that has linear attention too."""
    return getattr(backend, "full_attn_backend", backend)


def _verify_backend(backend: Any) -> Any:
    """Return the backend of full attention that runs verify."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    backend = full_attention(backend)
    is_hybrid = isinstance(backend, HybridAttnBackend)
    return backend._select_backend(ForwardMode.TARGET_VERIFY) if is_hybrid else backend
