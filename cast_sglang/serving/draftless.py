"""A server without a draft model: it decodes plainly, and verifies copies where they pay."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cast_sglang.costs.limits import Limits
from cast_sglang.serving.drafting.copied import CopyDraftWorker
from cast_sglang.serving.worker import CastWorker

if TYPE_CHECKING:
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

__all__ = ["DraftlessWorker"]


class DraftlessWorker(CastWorker):
    """CAST's steps around a draft worker without a model."""

    draft_worker_class = CopyDraftWorker
    has_draft = False
    _draft_worker: CopyDraftWorker

    def __init__(
        self, server_args: ServerArgs, gpu_id: int, nccl_port: int, target_worker: TpModelWorker
    ) -> None:
        super().__init__(server_args, gpu_id, nccl_port, target_worker)
        self.calibration = None  # there are no probabilities to calibrate
        self._draft_worker.plain_input = self._build_trivial_verify_input

    @property
    def limits(self) -> Limits:
        return dataclasses.replace(super().limits, max_width=0, max_extend_rows=0)

    @property
    def last_shared_read_runner(self) -> ModelRunner:
        """The runner whose pass is the last of a step."""
        return self.target_worker.model_runner

    @property
    def spec_v2_attn_backends(self) -> tuple[object, ...]:
        """The attention backends that a step runs on."""
        return (self.target_worker.model_runner.attn_backend,)
