"""A short real run of the pair at the end of a measurement, by the loop that serves requests.

Tables say what single passes take. What whole steps take, which drafts the target accepts, and so
what a unit of time must bring, only serving shows. So a measurement ends with requests on text that
the package brings (code, questions, prose), greedy and sampled, at growing batch sizes. The profile
keeps what they taught, and a server starts from there.
"""

from __future__ import annotations

import logging
import time
from array import array
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from cast_sglang.costs.schema import ServingRecord
from cast_sglang.serving.host_patches.event_loop import fed_by
from cast_sglang.serving.stats import StepStats
from cast_sglang.serving.texts import read_texts

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

    from cast_sglang.costs.profiles import FoundProfile
    from cast_sglang.serving.worker import CastWorker

__all__ = ["complete_profile", "serve_texts"]

# Tokens of a prompt and of an answer, at most. An answer takes some twenty steps.
PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
# Most requests are sampled, at the temperature that an OpenAI client asks for by default.
TEMPERATURES = (0.0, 1.0)
# Where a step takes 10 ms the run ends after some ten seconds; where it takes 100 ms and more, the
# largest batches are left out.
BUDGET_SECONDS = 60.0

logger = logging.getLogger(__name__)


def complete_profile(
    scheduler: Scheduler, found: FoundProfile, budget_seconds: float = BUDGET_SECONDS
) -> FoundProfile:
    """Serve by a profile that was just measured, and add what that showed.

    Args:
        scheduler: idle; every rank calls this with its own, and the same profile.

    Effects: the worker uses the returned profile, and starts from what it holds.
    """
    worker: CastWorker = scheduler.draft_worker
    worker.use_profile(found)
    record = serve_texts(scheduler, budget_seconds)
    if record is not None:
        found = found._replace(profile=msgspec.structs.replace(found.profile, serving=record))
        worker.use_profile(found)
    return found


def serve_texts(scheduler: Scheduler, budget_seconds: float) -> ServingRecord | None:
    """Serve texts at batch size 1, 2, 4 and so on, as long as the budget lasts.

    Args:
        scheduler: idle, with a profile in use; every rank calls this with its own.

    Returns:
        What rank 0 saw; None where nothing could be seen: no tokenizer, or no room or time for an
        answer.

    Effects: the worker's statistics, answer lengths and trace see nothing of it.
    """
    from sglang.srt.managers.scheduler import dispatch_event_loop

    if scheduler.tokenizer is None:
        logger.info("CAST: no short run on text: the server has no tokenizer")
        return None
    worker: CastWorker = scheduler.draft_worker
    run, times = _Run(scheduler, budget_seconds), _StepTimes()
    stats, recorder = worker.cast_stats, worker.tools.recorder
    worker.cast_stats, worker.tools.recorder = times, None
    devices = [] if worker.device == "cpu" else [worker.gpu_id]
    try:
        with torch.random.fork_rng(devices), fed_by(scheduler, run.ingest):
            dispatch_event_loop(scheduler)
    finally:
        worker.cast_stats, worker.tools.recorder = stats, recorder
    scheduler.flush_cache(empty_cache=False)
    record = times.record(worker.learned.content())
    if scheduler.tp_group.world_size > 1:
        record = scheduler.tp_group.broadcast_object(record, src=0)
    return record


class _StepTimes(StepStats):
    """Keeps the predicted and the measured time of each step."""

    def __init__(self) -> None:
        super().__init__()
        self._ratios: list[float] = []

    def record_time(self, predicted_us: float, measured_us: float) -> None:
        self._ratios.append(measured_us / predicted_us)

    def record(self, learned: dict[str, Any]) -> ServingRecord | None:
        """Return what the steps showed; None where there were none."""
        if not self._ratios:
            return None
        ratios = np.array(self._ratios)
        errors = np.abs(1.0 / ratios - 1.0)
        median, p95 = np.quantile(errors, [0.5, 0.95])
        return ServingRecord(
            steps=len(ratios),
            median_ratio=round(float(np.median(ratios)), 4),
            median_error=round(float(median), 4),
            p95_error=round(float(p95), 4),
            learned=learned,
        )


class _Run:
    """Hands the scheduler one batch of requests after the other, each once the last has ended."""

    def __init__(self, scheduler: Scheduler, budget_seconds: float) -> None:
        self._scheduler = scheduler
        self._deadline = time.perf_counter() + budget_seconds
        self._began = 0.0
        self._num_requests = 0
        self._prompts = cycle(_encoded(scheduler.tokenizer, text) for text in read_texts())
        worker: CastWorker = scheduler.draft_worker
        limits = worker.limits
        most = limits.max_batch_size
        sizes = [1 << octave for octave in range(most.bit_length())]
        # Two batches of one request, so that one is greedy and one sampled.
        self._batch_sizes = [1, *sizes, *([most] if most > sizes[-1] else [])]
        # A short context is shared by prompt and answer, half each.
        room = min(limits.max_context, scheduler.max_total_num_tokens) // 2
        self._prompt_tokens = min(PROMPT_TOKENS, room)
        self._answer_tokens = min(ANSWER_TOKENS, room - worker.max_draft_tokens)

    def ingest(self) -> None:
        """Send the next batch when the last one has ended; end the loop after all of them."""
        if not self._scheduler.is_fully_idle():
            return
        if self._next_fits():
            self._send(self._batch_sizes.pop(0))
        else:
            self._scheduler.gracefully_exit = True

    def _next_fits(self) -> bool:
        """Return whether the next batch ends in time, as rank 0 sees it.

        It takes no longer than twice as long as the one before, of half as many requests.
        """
        now = time.perf_counter()
        last = now - self._began if self._began else 0.0
        self._began = now
        fits = bool(self._batch_sizes) and now + 2 * last < self._deadline
        group = self._scheduler.tp_group
        if group.world_size > 1:
            fits = group.broadcast_object(fits, src=0)
        return fits and self._answer_tokens > 0

    def _send(self, batch_size: int) -> None:
        logger.info("CAST: short run on text: %d requests at once", batch_size)
        for prompt in islice(self._prompts, batch_size):
            temperature = TEMPERATURES[self._num_requests % len(TEMPERATURES)]
            rid = f"cast-short-run-{self._num_requests}"
            self._num_requests += 1
            self._scheduler.handle_generate_request(
                _request(self._scheduler, rid, self._cut(prompt), temperature, self._answer_tokens)
            )

    def _cut(self, prompt: list[int]) -> list[int]:
        return prompt[-self._prompt_tokens :]


def _encoded(tokenizer: Any, text: tuple[str, str]) -> list[int]:
    """Return the token ids of a prompt, as a chat where it is one and there is a template."""
    kind, content = text
    if kind == "chat" and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    return list(tokenizer.encode(content)) or [0]


def _request(
    scheduler: Scheduler, rid: str, prompt: list[int], temperature: float, max_new_tokens: int
) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    params.normalize(scheduler.tokenizer)
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", prompt),
        input_embeds=None,
        token_type_ids=None,
        mm_inputs=None,
        sampling_params=params,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
