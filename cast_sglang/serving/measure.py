"""Time single forward passes of a running engine: the `Meter` behind `cast-sglang profile`.

The engine is started as a server would be, with its own workers, attention backends and ranks. Its
scheduler, idle meanwhile, is asked to measure: it builds batches of the wanted shape on free KV
slots and runs the same methods that serve requests. Contents do not matter to time, so the slots
hold whatever they hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cast_sglang.errors import HostError
from cast_sglang.grid import default_grid
from cast_sglang.metering import Limits
from cast_sglang.profiler import run_profile, summarize, write_profile
from cast_sglang.profiles import user_profile_path
from cast_sglang.serving.identity import host_identity, published

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

    from cast_sglang.serving.worker import CastWorker

logger = logging.getLogger(__name__)

RPC_METHOD = "cast_profile"


def profile_server(
    server_argv: list[str],
    output: str | None,
    *,
    quick: bool = False,
    budget_seconds: float | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Start an engine with the given server flags, measure its cost profile and save it.

    Args:
        server_argv: SGLang's flags, at least --model-path and --speculative-draft-model-path.
        output: file of the profile; None for the one in the user's cache directory.

    Returns:
        The facts of the run (`profiler.summarize`).

    Raises:
        CastError: the flags do not fit, or the measurement failed.
    """
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    # Measuring needs no profile, and the widest trees exercise every shape at start-up.
    os.environ.update(CAST_PROFILE="none", CAST_POLICY="eagle")
    load_plugins()
    server_args = prepare_server_args([*server_argv, "--speculative-algorithm", "CAST"])
    engine = Engine(server_args=server_args)
    try:
        with tempfile.TemporaryDirectory() as directory:
            facts = Path(directory) / "facts.json"
            try:
                engine.collective_rpc(
                    RPC_METHOD,
                    output=output and os.path.abspath(output),
                    facts=str(facts),
                    quick=quick,
                    budget_seconds=budget_seconds,
                    command=command,
                )
            except AssertionError as error:  # how SGLang reports a failed call
                raise HostError(f"profiling failed: {error}") from error
            return dict(json.loads(facts.read_text()))
    finally:
        engine.shutdown()


def handle_rpc(scheduler: Scheduler, parameters: dict[str, Any]) -> Any:
    """Run the measurement in a scheduler process; every rank of the engine gets the same call."""
    from sglang.srt.managers.io_struct import RpcReqOutput

    group = scheduler.tp_group
    meter = EngineMeter(scheduler.draft_worker)
    error = ""
    try:
        if group.world_size == 1:
            _measure(meter, parameters)
        elif group.rank_in_group == 0:
            _measure(_LeadingMeter(meter, group), parameters)
        else:
            _follow(meter, group)
    except Exception as caught:
        logger.exception("profiling failed")
        error = " ".join(str(caught).split()) or type(caught).__name__
    return RpcReqOutput(success=not error, message=error)


def _measure(meter: Any, parameters: dict[str, Any]) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    from cast_sglang.journal import journal_path
    from cast_sglang.metering import Sampling

    identity = published(host_identity(resolving_view(meter.worker.server_args)))
    output = parameters["output"] or str(user_profile_path(identity))
    quick = parameters["quick"]
    try:
        measured = run_profile(
            meter,
            grid=default_grid(meter.limits(), quick=quick),
            sampling=Sampling.quick() if quick else Sampling(),
            budget_seconds=parameters["budget_seconds"],
            journal=journal_path(output),
            host=repr(identity),
            progress=True,
        )
    finally:
        meter.close()
    write_profile(measured, identity, output, parameters["command"])
    Path(parameters["facts"]).write_text(json.dumps(summarize(measured, output)))


class EngineMeter:
    """Times passes of one rank's `CastWorker`."""

    def __init__(self, worker: CastWorker) -> None:
        self.worker = worker
        self._batches: dict[tuple[int, int], _Rows] = {}
        self._fill_slots()

    def limits(self) -> Limits:
        from sglang.srt.runtime_context import get_schedule

        worker = self.worker
        model_config = worker.target_worker.model_runner.model_config
        return Limits(
            max_batch_size=get_schedule().max_running_requests,
            max_context=model_config.context_len,
            max_verify_rows=worker.max_draft_tokens,
            max_width=worker.topk,
            max_tokens=worker.token_to_kv_pool_allocator.size,
        )

    def verify(self, batch_size: int, context: int, rows: int) -> float:
        """Time `worker.verify`: forward, acceptance, KV moves."""
        batch = self._batch(batch_size, context)
        batch.spec_info = self._chain(batch, rows)
        return self._time(lambda: self.worker.verify(batch))

    def draft(self, batch_size: int, context: int, width: int) -> float:
        """Time one layer in the middle of a tree: metadata, forward, best children."""
        from sglang.srt.speculative.eagle_worker_common import prepare_for_draft

        draft = self.worker.draft_worker
        batch = self._batch(batch_size, context)
        steps = self.worker.speculative_num_steps
        forward_batch, _, _ = prepare_for_draft(
            batch.spec_info,
            draft.req_to_token_pool,
            batch,
            None,
            draft.draft_runner,
            draft.topk,
            steps,
        )
        slots = forward_batch.out_cache_loc.view(batch_size, steps, draft.topk)
        depth = max(1, steps // 2)
        path_slots = slots[:, :depth, :width].transpose(1, 2).contiguous()
        forward_batch.input_ids = torch.ones_like(path_slots[:, :, 0]).flatten()
        forward_batch.positions = (forward_batch.seq_lens + depth - 1).repeat_interleave(width)
        forward_batch.out_cache_loc = path_slots[:, :, -1].flatten()
        hidden_states = forward_batch.spec_info.hidden_states
        forward_batch.spec_info.hidden_states = hidden_states.repeat_interleave(width, dim=0)
        with self._draft_context():
            return self._time(lambda: draft.forward_layer(forward_batch, path_slots))

    def draft_extend(self, batch_size: int, context: int, rows: int) -> float:
        """Time the draft's pass over the rows that an accepted path can reach."""
        batch = self._batch(batch_size, context)
        batch.spec_info = self._chain(batch, rows)
        result = self.worker.verify(batch)
        accepted = torch.full_like(result.accept_lens, rows)
        result = dataclasses.replace(
            result,
            accept_lens=accepted,
            accept_index=result.accept_index.new_zeros((batch_size, rows)),
        )
        with self._draft_context():
            return self._time(
                lambda: self.worker.draft_worker._draft_extend_for_decode(batch, result)
            )

    def plain(self, batch_size: int, context: int) -> None:
        """A server with a draft cannot run a plain step; its twin is a verify pass of one row."""

    def step_overhead(self, batch_size: int) -> float:
        """Time a whole step and subtract its passes."""
        worker, draft = self.worker, self.worker.draft_worker
        batch = self._batch(batch_size, self._shortest_context)
        inside = 0.0

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                results: list[Any] = []
                inside += self._time(lambda: results.append(call(*args, **kwargs)))
                return results[0]

            return run

        with contextlib.ExitStack() as stack:
            for owner, name in (
                (worker, "verify"),
                (draft, "forward_layer"),
                (draft, "_draft_extend_for_decode"),
            ):
                setattr(owner, name, timed(getattr(owner, name)))
                stack.callback(delattr, owner, name)
            whole = self._time(lambda: worker.forward_batch_generation(batch))
        worker.discard_pending_steps()
        return max(whole - inside, 1e-7)

    def close(self) -> None:
        """Nothing to release: no slot was allocated."""

    _shortest_context = 64

    def _time(self, call: Callable[[], Any]) -> float:
        from cast_sglang.serving.worker import synchronize

        synchronize(self.worker.device)
        began = time.perf_counter()
        call()
        synchronize(self.worker.device)
        return time.perf_counter() - began

    @contextlib.contextmanager
    def _draft_context(self) -> Iterator[None]:
        from sglang.srt.speculative.spec_utils import draft_tp_context

        with draft_tp_context(self.worker.draft_worker.parallel_layout):
            yield

    def _fill_slots(self) -> None:
        """Give every request row its own slots; rows longer than the pool share them."""
        table = self.worker.req_to_token_pool.req_to_token
        size = self.worker.token_to_kv_pool_allocator.size
        positions = torch.arange(table.numel(), device=table.device).view(table.shape)
        table.copy_(positions % size + 1)

    def _batch(self, batch_size: int, context: int) -> ScheduleBatch:
        """Return a decode batch as the scheduler would hand it to the worker."""
        key = (batch_size, context)
        if key not in self._batches:
            self._batches[key] = _Rows(self.worker, batch_size, context)
        return self._batches[key].batch()

    def _chain(self, batch: ScheduleBatch, rows: int) -> Any:
        """Return a verify input of `rows` nodes in a line; the mask's shape sets the time."""
        from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

        worker, draft = self.worker, self.worker.draft_worker
        if rows == 1:
            return worker._build_trivial_verify_input(batch)
        batch_size, topk = len(batch.reqs), worker.topk
        # Candidate number k * topk is the first child of expanded node k.
        index = torch.arange(rows - 1, device=worker.device) * topk
        parents = torch.cat((index.new_full((1,), -1), index[:-1]))
        verify_input = build_eagle_verify_input(
            batch,
            batch.spec_info,
            torch.nn.functional.pad(
                parents, (0, max(0, 1 + topk * (rows - 1) - len(parents)))
            ).repeat(batch_size, 1),
            index.repeat(batch_size, 1),
            torch.ones((batch_size, rows - 1), dtype=torch.int64, device=worker.device),
            None,
            target_worker=worker.target_worker,
            topk=topk,
            num_steps=rows,
            num_draft_tokens=rows,
            tree_mask_mode=draft.tree_mask_mode,
            device=worker.device,
        )
        verify_input.spec_steps = rows - 1
        return verify_input


class _Rows:
    """The parts of a synthetic batch that can be kept between calls."""

    def __init__(self, worker: CastWorker, batch_size: int, context: int) -> None:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        self._worker = worker
        self._context = context
        self._reqs = [
            Req(
                rid=f"cast-profile-{row}",
                origin_input_text="",
                origin_input_ids=array("q", [1] * context),
                sampling_params=SamplingParams(temperature=0.0, max_new_tokens=1 << 20),
            )
            for row in range(batch_size)
        ]

    def batch(self) -> ScheduleBatch:
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

        worker, batch_size = self._worker, len(self._reqs)
        device, model_config = worker.device, worker.target_worker.model_runner.model_config
        batch = ScheduleBatch.init_new(
            self._reqs,
            worker.req_to_token_pool,
            worker.token_to_kv_pool_allocator,
            None,
            model_config,
            False,
            worker.speculative_algorithm,
        )
        batch.forward_mode = ForwardMode.DECODE
        batch.seq_lens_cpu = torch.full((batch_size,), self._context, dtype=torch.int64)
        batch.seq_lens = batch.seq_lens_cpu.to(device)
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        batch.seq_lens_sum = self._context * batch_size
        # Row 0 is where SGLang lets padded requests write.
        batch.req_pool_indices = torch.arange(1, batch_size + 1, device=device)
        batch.multimodal_inputs = [None] * batch_size
        batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, model_config.vocab_size)
        batch.spec_info = self._draft_input(batch_size)
        return batch

    def _draft_input(self, batch_size: int) -> Any:
        from sglang.srt.speculative.eagle_info import EagleDraftInput
        from sglang.srt.speculative.eagle_utils import get_draft_recurrent_hidden_state_spec

        worker, device = self._worker, self._worker.device
        hidden_size, dtype = get_draft_recurrent_hidden_state_spec(worker.draft_worker.draft_runner)
        return EagleDraftInput(
            topk_p=torch.full((batch_size, worker.topk), 0.5, device=device),
            topk_index=torch.ones((batch_size, worker.topk), dtype=torch.int64, device=device),
            hidden_states=torch.zeros((batch_size, hidden_size), dtype=dtype, device=device),
            bonus_tokens=torch.ones(batch_size, dtype=torch.int32, device=device),
        )


class _LeadingMeter:
    """Rank 0's meter under tensor parallelism: tells the others what to run before running it."""

    def __init__(self, meter: EngineMeter, group: Any) -> None:
        self._meter, self._group = meter, group
        self.worker = meter.worker

    def limits(self) -> Limits:
        return self._meter.limits()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*args: int) -> Any:
            self._group.broadcast_object((name, args), src=0)
            return getattr(self._meter, name)(*args)

        return run

    def close(self) -> None:
        self._group.broadcast_object(None, src=0)


def _follow(meter: EngineMeter, group: Any) -> None:
    """Run what rank 0 runs until it is done."""
    while (call := group.broadcast_object(None, src=0)) is not None:
        name, args = call
        getattr(meter, name)(*args)
