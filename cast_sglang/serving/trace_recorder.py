"""TraceRecorder: records a server's steps as a trace, for replay and pictures.

Recording waits for the device once per step, to read the step's outcome. A step is written when its
time is known, and for each request which of the tree's candidates the text went on with: the steps
after it show that.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import torch

from cast_sglang.serving.launch.identity import without_local_paths
from cast_sglang.trace.file import TraceWriter
from cast_sglang.trace.records import (
    Continuation,
    TracedPass,
    TracedRequest,
    TracedStep,
    TraceHeader,
    copied_fields,
    packed,
    tables_digest,
)

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from cast_sglang.config import CastConfig
    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.costs.limits import Limits
    from cast_sglang.costs.schema import CostProfile, HostIdentity
    from cast_sglang.serving.pass_clock import TimedPass
    from cast_sglang.serving.step import Copied, Drafted, StepReport, Verified

__all__ = ["Recording", "TraceRecorder"]

# Settings that name files of this machine.
_PATH_SETTINGS = ("profile", "calibration_file", "trace")


class Recording(NamedTuple):
    """The facts of a server for the header of its trace, without the profile."""

    config: CastConfig
    identity: HostIdentity
    limits: Limits
    max_layers: int  # D, layers that a tree may have
    verify_sizes: tuple[int, ...]
    is_ragged: bool  # requests of unequal numbers of rows run as such
    shares_out: bool  # one budget of verified nodes for the batch
    extends_by_outcome: bool  # draft extend runs no more rows than were accepted
    verify_graphs: GraphSizes | None  # sizes with a captured graph, here and below
    width_graphs: GraphSizes | None
    extend_graphs: GraphSizes | None
    plans_chains: bool = False  # the length of a chain is decided before its first layer runs


class _VerifiedOnHost(NamedTuple):
    """What verify found, on the host."""

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

    def follow(self, running: Mapping[int, list[int]]) -> None:
        """Follow the new tokens of each running request; those of the others will not come."""
        for request, path in self.continuations.items():
            if request in running:
                path.go_on(running[request])
            else:
                path.end()


class TraceRecorder:
    """Collects the records of each step and writes them as a trace.

    Of a step its owner calls, in this order: `begin_step`; `on_layer` for each layer and
    `on_drafted`, but for a plain step; `on_verified`; `on_step`. `on_step_timed` follows when the
    step's results have reached the host, `on_pass_timed` when the device has finished a pass.

    Args:
        recording: of the server.
        profile: in use; None where there is none, or none yet (`use_profile`).
    """

    def __init__(self, recording: Recording, profile: CostProfile | None = None) -> None:
        self._recording, self._profile = recording, profile
        self._learned: dict[str, Any] = {}
        self._writer: TraceWriter | None = None  # made with the first step, which has a profile
        self._has_tokens = recording.config.trace_tokens
        self._open: deque[_OpenStep] = deque()
        # Numbers of the running requests; two of them may have the same name.
        self._requests: dict[Req, int] = {}
        self._num_requests = 0
        self._last_done: _OpenStep | None = None
        self._probs: list[torch.Tensor] = []  # of the tree that grows, one entry per layer
        self._chances: list[torch.Tensor] = []  # the same as calibrated
        self._drafted: Drafted | None = None
        self._copied: Copied | None = None
        self._outcome: _VerifiedOnHost | None = None
        self._contexts: list[int] = []

    @property
    def is_full(self) -> bool:
        """Whether the file takes no more, so that no further step need be recorded."""
        return self._writer is not None and not self._writer.is_open

    def use_profile(self, profile: CostProfile, learned: Mapping[str, Any]) -> None:
        """Name this profile in the header; without effect once a step has been written.

        Args:
            learned: what the server starts from, for the header's field of that name.
        """
        self._profile, self._learned = profile, dict(learned)

    def begin_step(self, batch: ScheduleBatch) -> None:
        """Number the requests of the step, and read how long they are."""
        running = {}
        for request in batch.reqs:
            number = self._requests.get(request)
            if number is None:
                number, self._num_requests = self._num_requests, self._num_requests + 1
            running[request] = number
        self._requests = running
        if batch.seq_lens_cpu is not None:
            self._contexts = batch.seq_lens_cpu.tolist()
        else:
            self._contexts = [len(r.origin_input_ids) + len(r.output_ids) for r in batch.reqs]
        self._drafted = self._copied = self._outcome = None

    def on_pass_timed(self, timed: TimedPass) -> None:
        """Add a pass that the device has finished to the last step that is done."""
        if self._last_done is not None:
            self._last_done.passes.append(TracedPass(**timed._asdict()))

    def on_layer(self, depth: int, probs: torch.Tensor, chances: torch.Tensor) -> None:
        """Keep a layer's candidates.

        Args:
            depth: of the layer, 1 for the root's children.
            probs: the draft's probabilities of the candidates given their parents, request-major.
            chances: the same as calibrated.
        """
        if depth == 1:
            self._probs, self._chances = [], []
        self._probs.append(probs)
        self._chances.append(chances)

    def on_drafted(self, drafted: Drafted, copied: Copied | None = None) -> None:
        """Keep the step's tree, what is verified of it, and what was copied into it."""
        self._drafted, self._copied = drafted, copied

    def on_verified(self, verified: Verified) -> None:
        """Read the outcome; waits for the device."""
        lens = verified.accept_lens.tolist()
        tokens = verified.tokens.view(len(lens), -1).tolist()
        self._outcome = _VerifiedOnHost(
            accept_index=verified.accept_index.numpy(force=True),
            tokens=[row[:count] for row, count in zip(tokens, lens, strict=True)],
            target_probs=np.empty((len(lens), 0)),
        )
        if self._drafted is not None and verified.num_draft_tokens > 1:
            probs = _target_probs(verified, self._drafted)
            self._outcome = self._outcome._replace(target_probs=probs.numpy(force=True))

    def on_step(self, report: StepReport) -> None:
        """Put the step together; it is written when its time and what follows are known."""
        outcome, numbers, copied = self._outcome, list(self._requests.values()), self._copied
        if outcome is None:
            return
        expanded: list[np.ndarray] = []
        weights = [1.0] * len(numbers) if report.weights is None else report.weights.tolist()
        if self._drafted is None:
            requests = [
                TracedRequest(request=number, context=context, weight=weight)
                for number, context, weight in zip(numbers, self._contexts, weights, strict=True)
            ]
            continuations: dict[int, Continuation] = {}
        else:
            expanded = [nodes.numpy(force=True) for nodes in self._drafted.tree.expanded]
            requests, continuations = self._traced_requests(
                self._drafted, outcome, numbers, weights
            )
        traced = TracedStep(
            step=report.number,
            context=sum(self._contexts) / len(self._contexts),
            widths=[nodes.shape[1] for nodes in expanded],
            num_layers=0 if self._drafted is None else self._drafted.tree.num_layers,
            num_draft_tokens=report.shape.num_draft_tokens,
            extend_rows=float(report.extend_rows),
            requests=requests,
            predicted_us=report.predicted_us,
            expected_us=report.expected_us,
            **report.room._asdict(),
            **report.prompts._asdict(),
            policy_us=report.policy_us,
            price=report.price,
            copy_chances=b"" if copied is None else packed(copied.chances, "float32"),
        )
        self._open.append(_OpenStep(traced, continuations, []))
        running = dict(zip(numbers, outcome.tokens, strict=True))
        for open_step in self._open:
            open_step.follow(running)
        self._write_known()

    def on_step_timed(self, measured_us: float | None) -> None:
        """Give the oldest step without a time its own; None if that is not known."""
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
                step.follow({})
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
            config = self._recording.config
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

    def _traced_requests(
        self, drafted: Drafted, outcome: _VerifiedOnHost, numbers: list[int], weights: list[float]
    ) -> tuple[list[TracedRequest], dict[int, Continuation]]:
        batch_size = len(numbers)

        def by_request(layers: list[torch.Tensor]) -> np.ndarray:
            return torch.cat([x.reshape(batch_size, -1) for x in layers], dim=1).numpy(force=True)

        probs, chances = by_request(self._probs), by_request(self._chances)
        is_calibrated = self._probs[0] is not self._chances[0]
        tokens, parents = (
            part[:, : probs.shape[1]].numpy(force=True)
            for part in (drafted.tree.tokens, drafted.tree.parents)
        )
        layers = drafted.tree.expanded
        expanded = by_request(layers) if layers else np.empty((batch_size, 0), dtype=np.int64)
        index = drafted.selection.top_scores_index.numpy(force=True)
        rows = index.shape[1] + 1
        drawn = drafted.tree.is_drawn
        is_drawn = [False] * batch_size if drawn is None else drawn.tolist()
        requests, continuations = [], {}
        for b, number in enumerate(numbers):
            # Row 0 is the root, and candidate M stands for none.
            accepted_rows = [row - b * rows for row in outcome.accept_index[b].tolist() if row >= 0]
            found = None if self._copied is None else (self._copied.grafts, self._copied.paths[b])
            copies, number_of, *further = copied_fields(found, b, probs.shape[1])
            nodes = number_of[np.minimum(index[b], len(number_of) - 1)]
            is_verified = nodes >= 0
            all_parents, all_tokens = map(np.append, (parents[b], tokens[b]), further)
            requests.append(
                TracedRequest(
                    request=number,
                    context=self._contexts[b],
                    probs=packed(probs[b], "float32"),
                    chances=packed(chances[b], "float32") if is_calibrated else b"",
                    expanded=packed(expanded[b], "int32"),
                    verified=packed(nodes[is_verified], "int32"),
                    target_probs=packed(outcome.target_probs[b][is_verified], "float32"),
                    accepted=[int(nodes[row - 1]) for row in accepted_rows if row > 0],
                    weight=weights[b],
                    is_drawn=is_drawn[b],
                    tokens=packed(all_tokens, "int32") if self._has_tokens else b"",
                    **copies,
                )
            )
            continuations[number] = Continuation(all_tokens, all_parents)
        return requests, continuations

    def _header(self) -> TraceHeader:
        recording, profile = self._recording, self._profile
        config, limits = recording.config, recording.limits
        settings = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items()
            if name not in _PATH_SETTINGS
        }
        return TraceHeader(
            identity=without_local_paths(recording.identity),
            profile=None if profile is None else profile.provenance,
            tables="" if profile is None else tables_digest(profile),
            learned=self._learned,
            settings=settings,
            num_steps=recording.max_layers,
            topk=limits.max_width,
            num_draft_tokens=limits.max_verify_rows,
            verify_sizes=list(recording.verify_sizes),
            max_extend_rows=limits.max_extend_rows or 0,
            max_batch_size=limits.max_batch_size,
            max_context=limits.longest_context,
            is_ragged=recording.is_ragged,
            shares_out=recording.shares_out,
            plans_chains=recording.plans_chains,
            extends_by_outcome=recording.extends_by_outcome,
            is_full=config.trace_full,
            has_tokens=config.trace_tokens,
            verify_graphs=_tiers(recording.verify_graphs),
            width_graphs=_tiers(recording.width_graphs),
            extend_graphs=_tiers(recording.extend_graphs),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


def _tiers(sizes: GraphSizes | None) -> dict[int, list[int]] | None:
    return None if sizes is None else sizes.tiers


def _target_probs(verified: Verified, drafted: Drafted) -> torch.Tensor:
    """Return [B, N - 1] float32, the target's probability of each verified node given its parent.

    At the step's temperature; of a greedy request 1 for the likeliest token, 0 for the others.
    Top-k and top-p of the request are not applied.
    """
    sampling_info, num_rows = verified.sampling_info, verified.num_draft_tokens
    logits = verified.logits.view(-1, num_rows, verified.logits.shape[-1])
    selection = drafted.selection
    rows = selection.parent_rows.clamp(min=0)  # a row that does not exist is not read
    likeliest = logits.argmax(dim=2).gather(1, rows) == selection.draft_tokens
    if sampling_info.is_all_greedy:
        return likeliest.float()
    scaled = logits.float() / sampling_info.temperatures.view(-1, 1, 1)
    picked = scaled[torch.arange(len(rows), device=rows.device)[:, None], rows]
    probs = picked.gather(2, selection.draft_tokens.unsqueeze(2)).squeeze(2)
    probs = (probs - picked.logsumexp(dim=2)).exp()
    is_greedy = (sampling_info.top_ks == 1).view(-1, 1)
    return torch.where(is_greedy, likeliest.float(), probs)
