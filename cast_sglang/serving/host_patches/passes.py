"""What the plugin changes in SGLang's objects around single passes, and puts back behind them.

Each context manager changes one runner, attention backend, layer or setting for the passes inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from cast_sglang.errors import HostError
from cast_sglang.serving.row_packing import spread_rows

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

__all__ = [
    "capturing_size",
    "extend_rows",
    "keeping_buffers",
    "last_rows_only",
    "leave_prefix_unmasked",
    "packed_pass",
    "set_verify_graph",
    "unmasked_root",
]


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
        layer: the model's last layer, which then runs only the rows that are read to its end; None
            to run it whole.
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
        for name in ("next_token_logits", "hidden_states"):
            rows = getattr(logits_output, name)
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
    """Make a decoder layer drop all but these rows behind its attention."""
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


def set_verify_graph(runner: ModelRunner, graph_runner: Any | None) -> None:
    """Make the target's next passes replay the graphs of this runner; None for eager passes."""
    runner.decode_cuda_graph_runner = graph_runner


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
def keeping_buffers(backend: Any) -> Iterator[None]:
    """Stop graph runners from replacing the backend's buffers, which earlier graphs read."""
    backend.init_cuda_graph_state = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del backend.init_cuda_graph_state


def leave_prefix_unmasked(backend: Any) -> None:
    """Stop SGLang from filling the whole mask of captured verify passes in every step.

    The mask has a cell for each row and each token of the longest context, hundreds of megabytes
    for a full batch. `triton` reads the cells among the rows themselves, which the tree builder
    writes one by one, and takes the prefix as seen.

    Args:
        backend: the target's attention backend, after its buffers were made.
    """
    backend = _verify_backend(backend)
    if _reads_rows_alone(backend):
        backend._verify_mask = msgspec.structs.replace(backend.verify_mask, is_read=False)


def unmasked_root(
    build: Callable[[ScheduleBatch], EagleVerifyInput], batch: ScheduleBatch, backend: Any
) -> EagleVerifyInput:
    """Return the verify input of a plain step; only the cells of the roots are written.

    Args:
        build: SGLang's builder, which fills the whole mask.
        backend: the target's attention backend.
    """
    backend = _verify_backend(backend)
    mask = backend.verify_mask
    if not (_reads_rows_alone(backend) and mask.fits(len(batch.seq_lens))):
        return build(batch)
    backend._verify_mask = msgspec.structs.replace(mask, buffer=mask.buffer[:0])
    try:
        verify_input = build(batch)
    finally:
        backend._verify_mask = mask
    # A request has one row: its prefix, then the root itself.
    roots = torch.cumsum(batch.seq_lens + 1, dim=0) - 1
    mask.buffer.index_fill_(0, roots, 1)
    verify_input.custom_mask = mask.buffer
    return verify_input


def _verify_backend(backend: Any) -> Any:
    """Return the backend that runs verify, of one for prefill and one for decode."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    if isinstance(backend, HybridAttnBackend):
        backend = backend._select_backend(ForwardMode.TARGET_VERIFY)
    return backend


def _reads_rows_alone(backend: Any) -> bool:
    """Return whether the backend has a mask of which it does not read the prefix."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    if not isinstance(backend, TritonAttnBackend) or backend.verify_mask is None:
        return False
    return not backend.enable_deterministic  # whose kernel reads the mask of the prefix too
