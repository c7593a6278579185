"""Attention backends of the target's verify passes, one for each number of rows where it takes one.

`triton` runs every number of rows with one object. `fa3` lays a pass out for one number and keeps
the layout by batch size alone. So each number has an object of its own there, as each number of
steps has in SGLang's adaptive mode. One row per request, a plain step, is a decode pass on either.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cast_sglang.serving.host_patches.passes import (
    building_backend,
    leave_room,
    maskless_root,
    running_on,
)

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

__all__ = ["PlainStepBackend", "VerifyBackends"]

# Those that need an object for each number of rows, and those whose decode pass runs plain steps.
ONE_PER_SIZE = ("fa3",)
DECODES_PLAIN_STEPS = ("triton", "fa3")


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
        if self.has_one_per_size:
            leave_room(self.shared)

    @property
    def has_one_per_size(self) -> bool:
        """Whether each number of rows has a backend of its own."""
        return self.name in ONE_PER_SIZE

    @property
    def decodes_plain_steps(self) -> bool:
        """Whether a plain step runs as the decode pass of a plain server, which reads no mask."""
        return self.name in DECODES_PLAIN_STEPS

    def root_input(
        self, build: Callable[[ScheduleBatch], EagleVerifyInput], batch: ScheduleBatch
    ) -> EagleVerifyInput:
        """Return the verify input of a plain step, one row per request.

        Args:
            build: SGLang's builder of it.
        """
        if self.decodes_plain_steps:
            return maskless_root(build, batch, self.shared)
        return build(batch)

    def at(self, rows: int) -> Any:
        """Return the backend of verify passes over so many rows per request."""
        is_plain = rows == 1 and self.decodes_plain_steps
        if not is_plain and (rows == self._most or not self.has_one_per_size):
            return self.shared
        if rows not in self._own:
            backend = self._build(rows)
            self._own[rows] = PlainStepBackend(backend) if is_plain else backend
        return self._own[rows]

    def _build(self, rows: int) -> Any:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        with building_backend(rows):
            backend = ATTENTION_BACKENDS[self.name](self._runner)
        if self.has_one_per_size:
            leave_room(backend)
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


class PlainStepBackend:
    """Runs a verify pass of one row per request as the decode pass that it is.

    Verify leaves its rows out of the lengths, decode counts the row that it runs.

    Args:
        backend: SGLang's, which no other pass runs on.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        # [B] int64, what graphs of decode read; filled before and within each of them.
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._verify: Any = None
        self._decode: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the buffers of captured passes."""
        self.backend.init_cuda_graph_state(max_bs, max_num_tokens)
        self._lengths = torch.zeros(max_bs, dtype=torch.int64, device=self.backend.device)

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
