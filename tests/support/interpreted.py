"""A server on the CPU platform whose attention is `triton`'s, run by Triton's interpreter.

Run as a program it is a command of `sglang` whose draft layers are captured: by the stand-in of
`tests.support.graphs`, over the static buffers that graphs read. Verify and draft extend run
eagerly, in the sizes of a server with graphs.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from benchmarks.harness.servers import Server

# Kernels are interpreted from their import on, so this is no server that is forked.
ENVIRONMENT = {"TRITON_INTERPRET": "1"}
REPLAYS_FILE = "TEST_REPLAYS_FILE"  # gets a line for each replayed layer
BATCHES = (1, 4)  # three requests are padded to four


class CapturedLayersServer(Server):
    """A server of this module."""

    def _start_process(self, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        arguments = command[command.index("serve") :]
        program = [sys.executable, "-m", "tests.support.interpreted", *arguments]
        return super()._start_process(program, log)


def capture_on_the_cpu() -> None:
    """Put the stand-in where CAST captures."""
    from cast_sglang.costs.graph_sizes import GraphSizes
    from cast_sglang.serving import worker
    from cast_sglang.serving.drafting import eagle
    from cast_sglang.serving.drafting import worker as draft_worker
    from cast_sglang.serving.drafting.captured_layers import LayerGraphs
    from cast_sglang.serving.graphs.passes import PassGraphs
    from cast_sglang.serving.graphs.plan import GraphPlan
    from tests.support.graphs import RecordedGraphs

    class CountedGraphs(RecordedGraphs):
        def replay(self, key, batch):
            with open(os.environ[REPLAYS_FILE], "a") as file:
                print(key.size, key.variant_label, file=file)
            return super().replay(key, batch)

    def plan(runner, limits, config, verify_sizes, cost_model):
        def sizes(*each):
            return GraphSizes(dict.fromkeys(BATCHES, tuple(sorted(set(each)))))

        rows, topk = limits.max_verify_rows, limits.max_width
        extend = sizes(2, limits.max_extend_rows)
        return GraphPlan(sizes(2, rows - 1, rows), sizes(1, topk), extend)

    def passes(name, sizes):
        graphs = PassGraphs(name, sizes)
        graphs.capture(lambda size: None, None, dict.fromkeys(sizes.sizes))
        return graphs

    def layers(model, max_layers, sizes):
        graphs = LayerGraphs(model, max_layers, sizes)
        graphs.capture(CountedGraphs())
        return graphs

    worker.plan_graphs, eagle.capture_layers = plan, layers
    worker.capture_verify = lambda runner, sizes: passes(
        "verify", GraphSizes({batch: (1, *sizes.at(batch)) for batch in sizes.all_batch_sizes})
    )
    draft_worker.capture_extend = lambda runner, backend, sizes, build: passes("extend", sizes)


if __name__ == "__main__":
    from tests.support.preloaded import serve

    capture_on_the_cpu()
    serve(["sglang", *sys.argv[1:]])
