"""Tracer: records a server's steps as a trace, for replay and pictures.

Recording waits for the device once per step, to read the step's outcome. A step is written when all
is known of it: its time, and for each request which of the tree's candidates the text went on with,
which the next steps tell.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.runtime_context import get_parallel, get_schedule

from cast_sglang.costs.limits import longest_context
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.serving.launch.identity import host_identity, published
from cast_sglang.trace.file import TraceWriter
from cast_sglang.trace.records import (
    Continuation,
    TracedPass,
    TracedRequest,
    TracedStep,
    TraceHeader,
    packed,
    tables_digest,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from cast_sglang.serving.drafting.worker import CastDraftWorker
    from cast_sglang.serving.pass_clock import TimedPass
    from cast_sglang.serving.step import DraftShape
    from cast_sglang.serving.worker import CastWorker
    from cast_sglang.tree import DraftTree, Selection

__all__ = ["Tracer"]

# Settings that name files of this machine.
_PATH_SETTINGS = ("profile", "calibration_file", "trace")


class _Drafted(NamedTuple):
    """The tree of the step that runs, on the device."""

    tree: DraftTree
    num_layers: int
    selection: Selection
    probs: list[torch.Tensor]
    chances: list[torch.Tensor]


class _Outcome(NamedTuple):
    """What verify said, on the host."""

    accept_index: np.ndarray  # [B, *], rows counted through the batch, -1 for none
    tokens: list[list[int]]  # new tokens of each request
    target_probs: np.ndarray  # [B, N - 1]


@dataclasses.dataclass(slots=True)
class _OpenStep:
    """A step that is not written yet."""

    step: TracedStep
    continuations: dict[int, Continuation]  # by request; none for a plain step
    passes: list[TracedPass]
    measured_us: float | None = None
    is_done: bool = False

    @property
    def is_known(self) -> bool:
        return all(path.is_closed for path in self.continuations.values())

    def go_on(self, running: Mapping[int, list[int]]) -> None:
        """Follow the new tokens of each running request; those of others will not come."""
        for request, path in self.continuations.items():
            if request in running:
                path.go_on(running[request])
            else:
                path.end()


class Tracer:
    """Collects steps and writes them; its owner calls it in the order of the methods below."""

    def __init__(self, worker: CastWorker) -> None:
        self._worker = worker
        self._writer: TraceWriter | None = None  # made with the first step, which has a profile
        self._has_tokens = worker.config.trace_tokens
        self._open: deque[_OpenStep] = deque()
        self._requests: dict[str, int] = {}  # numbers of the running requests
        self._num_requests = 0
        self._last_done: _OpenStep | None = None
        self._probs: list[torch.Tensor] = []
        self._chances: list[torch.Tensor] = []
        self._drafted: _Drafted | None = None
        self._outcome: _Outcome | None = None
        self._contexts: list[int] = []

    @classmethod
    def of(cls, worker: CastWorker) -> Tracer | None:
        """Return the worker's tracer; None without --cast-trace, and on all ranks but the first."""
        if worker.config.trace == "none" or get_parallel().tp_rank != 0:
            return None
        return cls(worker)

    def begin(self, batch: ScheduleBatch) -> None:
        """Note which requests the step is for."""
        running = {}
        for request in batch.reqs:
            number = self._requests.get(request.rid)
            if number is None:
                number, self._num_requests = self._num_requests, self._num_requests + 1
            running[request.rid] = number
        self._requests = running
        if batch.seq_lens_cpu is not None:
            self._contexts = batch.seq_lens_cpu.tolist()
        else:
            self._contexts = [len(r.origin_input_ids) + len(r.output_ids) for r in batch.reqs]
        self._drafted = self._outcome = None

    def timed(self, timed: TimedPass) -> None:
        """Take note of a pass that the device has finished."""
        if self._last_done is not None:
            self._last_done.passes.append(TracedPass(**timed._asdict()))

    def drafted(self, depth: int, probs: torch.Tensor, chances: torch.Tensor) -> None:
        """Take note of a layer's candidates: the draft's probabilities, and the calibrated ones."""
        if depth == 1:
            self._probs, self._chances = [], []
        self._probs.append(probs)
        self._chances.append(chances)

    def selected(self, tree: DraftTree, num_layers: int, selection: Selection) -> None:
        """Take note of the step's tree and what is verified of it."""
        self._drafted = _Drafted(tree, num_layers, selection, self._probs, self._chances)

    def verified(self, batch: ScheduleBatch, result: GenerationBatchResult, rows: int) -> None:
        """Take note of the outcome; waits for the device."""
        batch_size = len(batch.reqs)
        lens = result.accept_lens.tolist()
        tokens = result.next_token_ids.view(batch_size, -1).tolist()
        self._outcome = _Outcome(
            accept_index=result.accept_index.numpy(force=True),
            tokens=[row[:count] for row, count in zip(tokens, lens, strict=True)],
            target_probs=np.empty((batch_size, 0)),
        )
        if self._drafted is not None and rows > 1:
            logits = result.logits_output.next_token_logits.view(batch_size, rows, -1)
            probs = _target_probs(logits, self._drafted, batch.sampling_info)
            self._outcome = self._outcome._replace(target_probs=probs.numpy(force=True))

    def record(
        self, step: int, shape: DraftShape, draft: CastDraftWorker, predicted_us: float | None
    ) -> None:
        """Put the step together; it is written when its time and what follows are known."""
        outcome, numbers = self._outcome, list(self._requests.values())
        if outcome is None:
            return
        expanded: list[np.ndarray] = []
        weights = [1.0] * len(numbers) if draft.weights is None else draft.weights.tolist()
        if self._drafted is None:
            requests = [
                TracedRequest(request=number, context=context, weight=weight)
                for number, context, weight in zip(numbers, self._contexts, weights, strict=True)
            ]
            continuations: dict[int, Continuation] = {}
        else:
            expanded = [kept.numpy(force=True) for kept in self._drafted.tree.expanded]
            requests, continuations = self._traced_requests(
                self._drafted, outcome, numbers, weights
            )
        auto = draft.policy if isinstance(draft.policy, AutoPolicy) else None
        traced = TracedStep(
            step=step,
            context=sum(self._contexts) / len(self._contexts),
            widths=[kept.shape[1] for kept in expanded],
            num_layers=0 if self._drafted is None else self._drafted.num_layers,
            num_draft_tokens=shape.num_draft_tokens,
            extend_rows=float(draft.last_extend_rows),
            requests=requests,
            predicted_us=predicted_us,
            policy_us=shape.policy_seconds * 1e6,
            price=None if auto is None else auto.price(len(requests)),
            answer_tokens=self._worker.answers.mean_tokens,
        )
        self._open.append(_OpenStep(traced, continuations, []))
        running = dict(zip(numbers, outcome.tokens, strict=True))
        for open_step in self._open:
            open_step.go_on(running)
        self._write_known()

    def done(self, measured_us: float | None) -> None:
        """Take note of the time of the oldest step without one; None if it is not known."""
        for step in self._open:
            if not step.is_done:
                step.is_done, step.measured_us = True, measured_us
                self._last_done = step
                return

    def discard(self) -> None:
        """Forget steps whose results will not come."""
        self._open = deque(step for step in self._open if step.is_done)

    def flush(self) -> None:
        """Write all steps that are done, although what follows is not known of all."""
        for step in self._open:
            if step.is_done:
                step.go_on({})
        while self._open and self._open[0].is_done:
            self._write(self._open.popleft())

    def _write_known(self) -> None:
        # The last step that is done may still get times of its passes.
        while self._open and self._open[0].is_done and self._open[0].is_known:
            if self._open[0] is self._last_done:
                return
            self._write(self._open.popleft())

    def _write(self, open_step: _OpenStep) -> None:
        if self._writer is None:
            config = self._worker.config
            file = Path(config.trace).expanduser()
            self._writer = TraceWriter(file, config.trace_mb << 20, self._header())
        paths = open_step.continuations
        requests = [
            msgspec.structs.replace(request, follows=path.follows, is_open=path.is_open)
            if (path := paths.get(request.request)) is not None
            else request
            for request in open_step.step.requests
        ]
        step = msgspec.structs.replace(
            open_step.step,
            requests=requests,
            measured_us=open_step.measured_us,
            passes=open_step.passes,
        )
        self._writer.write(step)
        if not self._writer.is_open:
            self._worker.draft_worker.tracer = None  # the rest of the run costs nothing

    def _traced_requests(
        self, drafted: _Drafted, outcome: _Outcome, numbers: list[int], weights: list[float]
    ) -> tuple[list[TracedRequest], dict[int, Continuation]]:
        batch_size = len(numbers)
        topk, num_candidates = drafted.tree.topk, drafted.tree.num_candidates

        def by_request(layers: list[torch.Tensor]) -> np.ndarray:
            return torch.cat([x.reshape(batch_size, -1) for x in layers], dim=1).numpy(force=True)

        probs, chances = by_request(drafted.probs), by_request(drafted.chances)
        is_calibrated = drafted.probs[0] is not drafted.chances[0]
        tokens = drafted.tree.tokens.numpy(force=True)
        kept = drafted.tree.expanded
        expanded = by_request(kept) if kept else np.empty((batch_size, 0), dtype=np.int64)
        index = drafted.selection.top_scores_index.numpy(force=True)
        rows = index.shape[1] + 1
        requests, continuations = [], {}
        for b, number in enumerate(numbers):
            # Row 0 is the root, and candidate M stands for none.
            accepted_rows = [row - b * rows for row in outcome.accept_index[b].tolist() if row >= 0]
            is_verified = index[b] < num_candidates
            requests.append(
                TracedRequest(
                    request=number,
                    context=self._contexts[b],
                    probs=packed(probs[b], "float32"),
                    chances=packed(chances[b], "float32") if is_calibrated else b"",
                    expanded=packed(expanded[b], "int32"),
                    verified=packed(index[b][is_verified], "int32"),
                    target_probs=packed(outcome.target_probs[b][is_verified], "float32"),
                    accepted=[int(index[b, row - 1]) for row in accepted_rows if row > 0],
                    weight=weights[b],
                    tokens=packed(tokens[b], "int32") if self._has_tokens else b"",
                )
            )
            continuations[number] = Continuation(tokens[b], expanded[b], topk)
        return requests, continuations

    def _header(self) -> TraceHeader:
        worker = self._worker
        draft, config = worker.draft_worker, worker.config
        profile = None if worker.profile is None else worker.profile.profile
        settings = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items()
            if name not in _PATH_SETTINGS
        }
        return TraceHeader(
            identity=published(host_identity(resolving_view(worker.server_args))),
            profile=None if profile is None else profile.provenance,
            tables="" if profile is None else tables_digest(profile),
            settings=settings,
            num_steps=worker.speculative_num_steps,
            topk=worker.topk,
            num_draft_tokens=worker.max_draft_tokens,
            verify_sizes=list(draft.verify_sizes),
            max_batch_size=get_schedule().max_running_requests,
            max_context=longest_context(
                worker.target_worker.model_runner.model_config.context_len,
                worker.max_draft_tokens,
            ),
            is_ragged=draft.is_ragged,
            shares_out=draft.shares_out,
            extends_by_outcome=worker.device == "cpu",
            is_full=config.trace_full,
            has_tokens=config.trace_tokens,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def _target_probs(
    logits: torch.Tensor, drafted: _Drafted, sampling_info: SamplingBatchInfo
) -> torch.Tensor:
    """Return [B, N - 1] float32, the target's probability of each verified node given its parent.

    At the step's temperature; of a greedy request 1 for the likeliest token, 0 for the others.
    Top-k and top-p of the request are not applied.

    Args:
        logits: [B, N, V], row 0 of each request after the root.
    """
    selection, topk = drafted.selection, drafted.tree.topk
    index = selection.top_scores_index
    parents = selection.parent_list.gather(1, index // topk)
    # A node stands in row 1 + its place in the ascending list; -1, the root, comes to row 0.
    place = torch.searchsorted(index.contiguous(), parents.contiguous())
    rows = torch.where(parents < 0, 0, place + 1).clamp(max=logits.shape[1] - 1)
    likeliest = logits.argmax(dim=2).gather(1, rows) == selection.draft_tokens
    if sampling_info.is_all_greedy:
        return likeliest.float()
    scaled = logits.float() / sampling_info.temperatures.view(-1, 1, 1)
    picked = scaled[torch.arange(len(rows), device=rows.device)[:, None], rows]
    probs = picked.gather(2, selection.draft_tokens.unsqueeze(2)).squeeze(2)
    probs = (probs - picked.logsumexp(dim=2)).exp()
    is_greedy = (sampling_info.top_ks == 1).view(-1, 1)
    return torch.where(is_greedy, likeliest.float(), probs)
