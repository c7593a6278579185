"""Time one speculative step on the CPU platform, split into matrix products and everything else.

Runs SGLang's own scheduler in this process, so the forwards measured are those that serve requests:
target verify, one draft layer, draft extend, and the whole step around them. Each line is the
call with the least time outside `linear`, which is what the platform is answerable for.

    python benchmarks/bench_cpu_platform.py --target TARGET --draft DRAFT --batch-size 8
"""

import argparse
import array
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["SGLANG_PLATFORM"] = "cast_cpu"
# The platform sets this for the processes a server spawns; here it must precede torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


class Meter:
    """Least time of each phase, in total and outside matrix products with weights."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.linear_s = 0.0
        self.calls: dict[str, list[tuple[float, float]]] = defaultdict(list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        linear, start = self.linear_s, self.clock()
        yield
        total = self.clock() - start
        self.calls[name].append((total, self.linear_s - linear))

    def wrap(self, owner: Any, attribute: str, name: Callable[..., str]) -> None:
        """Time every call of `owner.attribute` under the name computed from its arguments."""
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name(*args, **kwargs)):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)

    def wrap_linear(self, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            out = original(*args, **kwargs)
            self.linear_s += self.clock() - start
            return out

        setattr(owner, attribute, timed)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for name, calls in sorted(self.calls.items()):
            total, linear = min(calls, key=lambda call: call[0] - call[1])
            rows.append(
                {
                    "phase": name,
                    "calls": len(calls),
                    "total_ms": round(total * 1e3, 3),
                    "linear_ms": round(linear * 1e3, 3),
                    "other_ms": round((total - linear) * 1e3, 3),
                }
            )
        return rows


def make_scheduler(args: argparse.Namespace) -> Any:
    """SGLang's scheduler with its model workers, without the processes around it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    argv = ["--model-path", args.target, "--dtype", args.dtype, "--random-seed", "0"]
    if args.draft:
        argv += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", args.draft]
        argv += ["--speculative-num-steps", str(args.num_steps)]
        argv += ["--speculative-eagle-topk", str(args.topk)]
        argv += ["--speculative-num-draft-tokens", str(args.num_draft_tokens)]
    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    ports = PortArgs.init_new(server_args)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    from sglang.srt.managers.scheduler import Scheduler

    return Scheduler(server_args, ports)


def submit(scheduler: Any, batch_size: int, context: int, max_new_tokens: int) -> None:
    """Queue requests with random prompts of `context` tokens."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    generator = torch.Generator().manual_seed(0)
    vocab_size = scheduler.model_config.vocab_size
    for index in range(batch_size):
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0, ignore_eos=True)
        params.normalize(None)
        prompt = torch.randint(1, vocab_size, (context,), generator=generator).tolist()
        request = TokenizedGenerateReqInput(
            rid=str(index),
            input_text="",
            input_ids=array.array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )
        scheduler.process_input_requests([request])


def run_until_idle(scheduler: Any, meter: Meter) -> None:
    """The scheduler's own synchronous loop, without the sockets."""
    while True:
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        scheduler.last_batch = batch
        if not batch:
            return
        name = "scheduler: prefill" if batch.forward_mode.is_extend() else "scheduler: step"
        with meter.phase(name):
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))


def instrument(scheduler: Any, meter: Meter) -> None:
    """Time the forwards of both models and, inside them, their products with weights."""
    from sglang.srt.speculative import eagle_worker_common, eagle_worker_v2

    def forward_name(model: str) -> Callable[..., str]:
        def name(forward_batch: Any, *args: Any, **kwargs: Any) -> str:
            mode = forward_batch.forward_mode.name.lower()
            return f"forward: {model} {mode}, {forward_batch.input_ids.shape[0]} tokens"

        return name

    meter.wrap_linear(torch.nn.functional, "linear")
    meter.wrap_linear(torch, "matmul")
    meter.wrap(scheduler.tp_worker.model_runner, "forward", forward_name("target"))
    if scheduler.draft_worker is not None:
        draft = scheduler.draft_worker.draft_worker
        meter.wrap(draft.draft_runner, "forward", forward_name("draft"))
        meter.wrap(eagle_worker_common, "eagle_sample", lambda *args, **kwargs: "eagle: sample")
        meter.wrap(
            eagle_worker_v2, "build_eagle_verify_input", lambda *args, **kwargs: "eagle: tree"
        )
        meter.wrap(draft, "draft", lambda *args, **kwargs: "eagle: draft, all layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="target checkpoint")
    parser.add_argument("--draft", help="EAGLE-3 draft checkpoint; without it, plain decoding")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="prompt tokens per request")
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--num-draft-tokens", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, help="OpenMP threads; default: all cores")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time of this thread, for one thread on a busy machine",
    )
    args = parser.parse_args()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)

    clock = time.perf_counter if args.clock == "wall" else time.thread_time
    scheduler, meter = make_scheduler(args), Meter(clock)
    submit(scheduler, args.batch_size, args.context, max_new_tokens=4)
    run_until_idle(scheduler, meter)
    meter.calls.clear()
    instrument(scheduler, meter)
    submit(scheduler, args.batch_size, args.context, args.max_new_tokens)
    run_until_idle(scheduler, meter)

    rows = meter.rows()
    print(f"{'phase':<48}{'calls':>6}{'total ms':>10}{'linear ms':>11}{'other ms':>10}")
    for row in rows:
        print(
            f"{row['phase']:<48}{row['calls']:>6}{row['total_ms']:>10.2f}"
            f"{row['linear_ms']:>11.2f}{row['other_ms']:>10.2f}"
        )
    settings = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
