"""A server on the CPU platform that takes the path of a GPU: `triton`, graphs, overlap.

Attention is `triton`'s, run by Triton's interpreter. Run as a program this module is a command of
`sglang` whose passes are captured too: SGLang's graph runners and CAST's captured layers are built
as on a GPU, and replay what they recorded (`tests.support.graphs`). The scheduler overlaps, and the
host copies what it reads. What else asks for CUDA itself takes the way of the CPU:
`docs/gpu.md` lists it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import IO

from benchmarks.harness.servers import Server

# Kernels are interpreted from their import on, so this is no server that is forked.
ENVIRONMENT = {"TRITON_INTERPRET": "1"}
REPLAYS_FILE = "TEST_REPLAYS_FILE"  # gets a line for each replay
DENSE = "TEST_DENSE_BACKENDS"  # where it is set, those of `tests.support.dense_attention` are there
DELTA_RULE = "TEST_DELTA_RULE"  # where it is set, prompts pass gated delta nets in plain torch
BATCHES = (1, 4)  # three requests are padded to four


class CapturedServer(Server):
    """A server of this module."""

    def _start_process(self, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        arguments = command[command.index("serve") :]
        program = [sys.executable, "-m", "tests.support.interpreted", *arguments]
        return super()._start_process(program, log)


def capture_on_the_cpu() -> None:
    """Make SGLang and CAST capture passes, by the stand-in."""
    import torch
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner, decode_cuda_graph_runner
    from sglang.srt.model_executor.runner_utils import pool
    from sglang.srt.runtime_context import get_context, get_exec

    from cast_sglang.cpu.platform import CastCpuPlatform
    from cast_sglang.serving.worker import CastWorker
    from tests.support.graphs import RecordedRunnerGraphs

    class Counted(RecordedRunnerGraphs):
        def replay(self, key, batch):
            rows = key.variant_label or f"{self.runner.captured_req_width} rows"
            with open(os.environ[REPLAYS_FILE], "a") as file:
                print(type(self.runner).__name__, key.size, rows, sep=",", file=file)
            return super().replay(key, batch)

    @contextlib.contextmanager
    def graph_capture(stream=None):
        yield SimpleNamespace(stream=stream)

    # Of models that wait for a GPU without a question.
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args: None
    stream = torch.cpu.Stream()
    torch.cpu.is_current_stream_capturing = lambda: False
    ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph
    CastCpuPlatform.get_full_graph_backend_cls = lambda platform: Counted
    for module in (pool, decode_cuda_graph_runner):
        module.get_or_create_global_graph_capture_stream = lambda: stream
    for module in (parallel_state, decode_cuda_graph_runner):
        module.graph_capture = graph_capture
    init = CastWorker.init_cuda_graphs

    def init_cuda_graphs(worker):
        # What SGLang does first on a GPU.
        config = get_exec().graph.cuda_graph_config
        phase = {"bs": list(BATCHES), "backend": Backend.FULL}
        config = with_phase(config, Phase.DECODE, **phase)
        get_context().override("test.graphs", cuda_graph_config=config)
        runner = worker.target_worker.model_runner
        for each in (runner, worker.draft_worker.draft_runner):
            each.graph_shared_output = GraphSharedOutput.create_for_model_runner(each)
        runner.decode_cuda_graph_runner = DecodeCudaGraphRunner(runner)
        init(worker)

    CastWorker.init_cuda_graphs = init_cuda_graphs


def run_behind_the_host() -> None:
    """Make the scheduler overlap, and CAST read what it decides by as from a device."""
    import torch

    from cast_sglang.serving import host_reads
    from cast_sglang.serving.algorithm import CastAlgorithm
    from cast_sglang.serving.drafting import worker as draft_worker

    handle, init = CastAlgorithm.handle_server_args, host_reads.HostReads.__init__

    def handle_server_args(algorithm, server_args):
        handle(algorithm, server_args)
        server_args.disable_overlap_schedule = False

    def init_reads(reads, device):
        init(reads, device)
        reads._module = torch.cpu

    CastAlgorithm.handle_server_args = handle_server_args
    host_reads.HostReads.__init__ = init_reads
    host_reads._pinned = lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8)
    draft_worker.is_on_host = lambda tensor: False


if __name__ == "__main__":
    from tests.support.preloaded import serve
    from tests.support.waits import WAITS_FILE, watch_steps

    if DELTA_RULE in os.environ:
        from tests.support import delta_rule

        delta_rule.install()
    if DENSE in os.environ:
        from tests.support import dense_attention

        dense_attention.install()
    if "CAST" in sys.argv:  # and not to a plain server
        capture_on_the_cpu()
        run_behind_the_host()
    if WAITS_FILE in os.environ:
        watch_steps()
    serve(["sglang", *sys.argv[1:]])
