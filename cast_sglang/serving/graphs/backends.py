"""Attention backends of the target's verify passes, one for each number of rows where it takes one.

`triton` runs every number of rows with one object. The others keep the layout of a captured pass
by batch size alone, and most lay all passes out for one number. So each number has an object of its
own there, as each number of steps has in SGLang's adaptive mode (`launch.backends.VerifyBackend`).
One row per request, a plain step, is a decode pass on each of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cast_sglang.serving.host_patches.passes import (
    building_backend,
    drop_wrappers,
    full_attention,
    leave_room,
    running_on,
    with_own_graphs,
)
from cast_sglang.serving.launch.backends import VERIFY_BACKENDS

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

__all__ = ["PlainStepBackend", "VerifyBackends"]


class _Graphs(Protocol):
    def runner(self, batch_size: int, size: int) -> Any | None: ...


class VerifyBackends:
    """The backends of the target's verify passes, by rows per request.

    Args:
        runner: the target's, which has its backend by then.

    Attributes:
        shared: the runner's own, which runs prompts too, and verify of the most rows.
        name: SGLang's of the backend that verifies.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.shared, self.name = runner.attn_backend, runner.decode_attention_backend_str
        self._runner, self._most = runner, runner.decode_num_tokens_per_req()
        self._own: dict[int, Any] = {}
        # None for a backend that runs every number of rows, plain steps too, as verify passes.
        self._kind = VERIFY_BACKENDS.get(self.name)
        # Its layout is of one number of rows, and behind verify SGLang commits states of it.
        self._has_linear = full_attention(self.shared) is not self.shared
        if self.lays_out_one_size:
            leave_room(self.shared)

    @property
    def lays_out_one_size(self) -> bool:
        """Whether each number of rows has a backend of its own, with buffers of its own."""
        return self._kind is not None and self._kind.rows == "each"

    def has_own_buffers(self, rows: int) -> bool:
        """Whether captured passes of so many rows have buffers that are made for them."""
        is_any = self._kind is not None and self._kind.rows == "any"
        return self.lays_out_one_size or (is_any and self._decodes(rows))

    def _decodes(self, rows: int) -> bool:
        """Return whether it is a plain step that runs as a decode pass."""
        return rows == 1 and self._kind is not None and not self._has_linear

    def root_input(
        self, build: Callable[[ScheduleBatch], EagleVerifyInput], batch: ScheduleBatch
    ) -> EagleVerifyInput:
        """Return the verify input of a plain step, one row per request.

        Args:
            build: SGLang's builder of it, which fills a mask that a decode pass does not read.
        """
        return _maskless_root(batch) if self._decodes(1) else build(batch)

    def at(self, rows: int) -> Any:
        """Return the backend of verify passes over so many rows per request."""
        is_plain = self._decodes(rows)
        serves_any = self._kind is None or self._kind.rows == "any"
        if not is_plain and (rows == self._most or (serves_any and not self._has_linear)):
            return self.shared
        if rows not in self._own:
            backend = self._build(rows)
            self._own[rows] = backend
            if is_plain:
                self._own[rows] = PlainStepBackend(backend, self._runner.device)
        return self._own[rows]

    def _build(self, rows: int) -> Any:
        from sglang.srt.layers.attention.attention_registry import (
            ATTENTION_BACKENDS,
            attn_backend_wrapper,
        )

        if self._kind is not None and self._kind.rows == "batch":
            return with_own_graphs(self.shared)
        with building_backend(rows):
            backend = full_attention(self.shared)
            if not (self._has_linear and self._kind is not None and self._kind.rows == "any"):
                backend = ATTENTION_BACKENDS[self.name](self._runner)
            if self.lays_out_one_size:
                leave_room(backend)
                drop_wrappers(backend)
            if self._has_linear:
                backend = attn_backend_wrapper(self._runner, backend)
        for phase in ("prefill", "decode"):  # models with latent attention ask it for its name
            setattr(backend, f"{phase}_attention_backend_str", self.name)
        return backend

    @contextlib.contextmanager
    def running(self, rows: int, batch_size: int, graphs: _Graphs | None) -> Iterator[None]:
        """Make the target verify so many rows of so many requests inside.

        Args:
            graphs: of verify (`passes.PassGraphs`); None where nothing is captured.
        """
        graph_runner = self._runner.decode_cuda_graph_runner
        if graphs is not None:
            graph_runner = graphs.runner(batch_size, rows)
        with running_on(self._runner, self.at(rows), graph_runner):
            yield


def _maskless_root(batch: ScheduleBatch) -> EagleVerifyInput:
    """Return the verify input of a plain step that runs as a decode pass."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    rows = torch.arange(len(batch.seq_lens), device=batch.seq_lens.device).unsqueeze(1)
    return EagleVerifyInput(
        draft_token=batch.spec_info.bonus_tokens,
        custom_mask=torch.zeros(0, dtype=torch.bool, device=rows.device),
        positions=batch.seq_lens.to(torch.int64),
        retrieve_index=rows,
        retrieve_next_token=torch.full_like(rows, -1),
        retrieve_next_sibling=torch.full_like(rows, -1),
        retrieve_cum_len=None,
        spec_steps=0,
        topk=1,
        draft_token_num=1,
        capture_hidden_mode=CaptureHiddenMode.FULL,
        seq_lens_sum=None,
        seq_lens_cpu=None,
    )


class PlainStepBackend:
    """Runs a verify pass of one row per request as the decode pass that it is.

    Verify leaves its rows out of the lengths, decode counts the row that it runs.

    Args:
        backend: SGLang's, which no other pass runs on.
        device: where it runs.
    """

    def __init__(self, backend: Any, device: torch.device | str) -> None:
        self.backend, self._device = backend, device
        # [B] int64, what graphs of decode read; filled before and within each of them.
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._verify: Any = None
        self._decode: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the buffers of captured passes."""
        self.backend.init_cuda_graph_state(max_bs, max_num_tokens)
        self._lengths = torch.zeros(max_bs, dtype=torch.int64, device=self._device)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Lay out a pass that is not captured."""
        self._see(forward_batch, forward_batch.seq_lens + 1)
        self.backend.init_forward_metadata(self._decode)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Lay out a captured pass, as far as that is not captured with it."""
        self._see(forward_batch, self._static_lengths(forward_batch))
        self.backend.init_forward_metadata_out_graph(self._decode, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Do what is captured of the layout."""
        self._see(forward_batch, self._static_lengths(forward_batch))
        self.backend.init_forward_metadata_in_graph(self._decode)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend with one row per request; shapes of SGLang's `forward_decode`."""
        assert forward_batch is self._verify
        attended: torch.Tensor = self.backend.forward_decode(
            q, k, v, layer, self._decode, save_kv_cache, **kwargs
        )
        return attended

    def get_fused_kv_write_buffers(self, layer: Any, forward_batch: ForwardBatch) -> Any:
        """Return what SGLang's method of this name does for the decode pass."""
        return self.backend.get_fused_kv_write_buffers(layer, self._decode)

    def shared_read_ends(self, mode: ForwardMode) -> SharedReadEnds:
        """Return where decode is done with buffers that the scheduler writes."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        return self.backend.shared_read_ends(ForwardMode.DECODE)

    def _static_lengths(self, forward_batch: ForwardBatch) -> torch.Tensor:
        lengths = self._lengths[: forward_batch.batch_size]
        return torch.add(forward_batch.seq_lens, 1, out=lengths)

    def _see(self, forward_batch: ForwardBatch, lengths: torch.Tensor) -> None:
        """Keep the batch, and the decode batch that is the same pass.

        Args:
            lengths: [B] int64, of the requests with the row that runs.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self._verify = forward_batch
        decode = self._decode = copy.copy(forward_batch)
        decode.forward_mode, decode.spec_info, decode.seq_lens = ForwardMode.DECODE, None, lengths
        if forward_batch.seq_lens_cpu is not None:
            decode.seq_lens_cpu = forward_batch.seq_lens_cpu + 1
        if forward_batch.seq_lens_sum is not None:
            decode.seq_lens_sum = forward_batch.seq_lens_sum + forward_batch.batch_size
