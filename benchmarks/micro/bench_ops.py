"""Device time of the tensor ops, fused against reference: python -m benchmarks.micro.bench_ops

Times each op, and all ops of one step in a row, at every batch size: launched one by one, as the
host sees it, and replayed from one CUDA graph of many calls, as the device sees it. Each number is
the median over `--repeats` timings between CUDA events, of `--calls` calls each. The last line is
one JSON object.

Needs a CUDA device, and ends with exit code 2 where there is none. `--dry-run` needs none: it runs
each op once on the CPU, the fused ones through Triton's interpreter, and times nothing.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.provenance import PACKAGES, git_commit

MODULES = ("fused", "reference")
COLUMNS = ("fused_eager", "reference_eager", "fused_graph", "reference_graph")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,64", help="batch sizes (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=10, help="K (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="layers (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="N (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=20, help="per timing (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="run each op once on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("bench_ops: no CUDA device to time on (--dry-run needs none)", file=sys.stderr)
        sys.exit(2)
    torch.set_grad_enabled(False)
    if options.dry_run:
        # Triton reads this when it is imported, which is only now.
        os.environ["TRITON_INTERPRET"] = "1"
        options.batches = options.batches.split(",")[0]
        device = "cpu"
    else:
        device = "cuda"
    rows = []
    for batch in map(int, options.batches.split(",")):
        rows += measure(options, batch, device)
    report(options, rows, device)


def measure(options: argparse.Namespace, batch: int, device: str) -> list[dict[str, Any]]:
    """Return one row for each op at this batch size."""
    from cast_sglang.ops import fused, reference

    work = {name: ops_of_a_step(module, options, batch, device)
            for name, module in zip(MODULES, (fused, reference), strict=True)}  # fmt: skip
    rows = []
    for op in work["fused"]:
        row: dict[str, Any] = {"op": op, "batch": batch}
        for name in MODULES:
            call = work[name][op]
            if device == "cpu":
                call()
                row[f"{name}_ran"] = True
                continue
            calls = functools.partial(repeat, call, options.calls)
            row[f"{name}_eager"] = time_us(calls, options)
            row[f"{name}_graph"] = time_us(captured(calls), options)
        rows.append(row)
    return rows


def ops_of_a_step(
    ops: Any, options: argparse.Namespace, batch: int, device: str
) -> dict[str, Callable[[], object]]:
    """Return a call of each op at the sizes of a fully grown tree, and of all of a step's."""
    topk, steps, num_tokens = options.topk, options.steps, options.tokens
    generator = torch.Generator().manual_seed(batch)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device)

    probs = rand(batch * topk, topk).sort(dim=1, descending=True).values
    tokens = torch.randint(1000, (batch * topk, topk), generator=generator).to(device)
    root = ops.grow_layer(rand(batch, 1), probs[:batch], tokens[:batch], 0)
    layers, start, proposers = [root], topk, [torch.full((batch, 1), -1, device=device)]
    for _ in range(steps - 1):
        layers.append(ops.grow_layer(layers[-1].frontier.scores, probs, tokens, start))
        start += topk * topk
        proposers.append(layers[-2].frontier.node_index)
    scores = torch.cat([layer.scores for layer in layers], dim=1)
    all_tokens = torch.zeros(scores.shape, dtype=torch.int64, device=device)
    num_tokens = min(num_tokens, scores.shape[1] + 1)
    ranked = ops.rank_nodes(scores, num_tokens - 1)
    parents = torch.cat(proposers, dim=1).repeat_interleave(topk, dim=1)
    candidates = all_tokens, parents, num_tokens
    _, _, parent_rows = ops.select_nodes(ranked.node_index, *candidates)

    seq_lens = torch.randint(1, 4096, (batch,), generator=generator).to(device)
    links = torch.empty(3, batch, num_tokens, dtype=torch.int64, device=device)
    mask = torch.empty(batch * num_tokens**2, dtype=torch.bool, device=device)
    positions = torch.empty(batch * num_tokens, dtype=torch.int64, device=device)
    built = (parent_rows, seq_lens, mask, positions, *links, steps)

    # Every call writes what nothing reads, so any layer stands for all.
    frontier = layers[-1].frontier.scores
    curve = identity_curve(batch, device)
    calls: dict[str, Callable[[], object]] = {
        "grow_layer": lambda: ops.grow_layer(frontier, probs, tokens, start),
        "grow_layer, calibrated": lambda: ops.grow_layer(frontier, probs, tokens, start, curve),
        "rank_nodes": lambda: ops.rank_nodes(scores, num_tokens - 1),
        "select_nodes": lambda: ops.select_nodes(ranked.node_index, *candidates),
        "build_tree": lambda: ops.build_tree(*built),
    }

    def whole_step() -> None:
        for _ in range(steps - 1):
            calls["grow_layer, calibrated"]()
        for op in ("rank_nodes", "select_nodes", "build_tree"):
            calls[op]()

    return calls | {f"{steps} layers": whole_step}


def identity_curve(batch: int, device: str) -> Any:
    """Return 16 pieces of the line g(p) = p, for two kinds of requests in turn."""
    from cast_sglang.ops.contract import AcceptanceCurve

    knots = torch.linspace(0, 1, 17, device=device)[1:-1]
    lines = torch.zeros(2, 16, device=device), torch.ones(2, 16, device=device)
    return AcceptanceCurve(knots, *lines, torch.arange(batch, device=device) % 2)


def repeat(call: Callable[[], object], times: int) -> None:
    """Call something several times."""
    for _ in range(times):
        call()


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a CUDA graph of the call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_us(calls: Callable[[], object], options: argparse.Namespace) -> float:
    """Return the microseconds of one of the calls that `calls` makes: the median over repeats."""
    for _ in range(3):
        calls()
    timings = []
    for _ in range(options.repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        calls()
        ended.record()
        ended.synchronize()
        timings.append(began.elapsed_time(ended) * 1e3 / options.calls)
    return round(statistics.median(timings), 2)


def report(options: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> None:
    shape = {"topk": options.topk, "steps": options.steps, "tokens": options.tokens}
    columns = [column for column in COLUMNS if column in rows[0]]
    title = f"{shape}, us per call" if columns else f"{shape}, every op ran on the CPU"
    table = Table("op", "batch", *columns, title=title)
    for row in rows:
        cells = [str(row[column]) for column in columns]
        table.add_row(row["op"], str(row["batch"]), *cells)
    Console(stderr=True).print(table)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = {package: metadata.version(package) for package in PACKAGES}
    where = {"device": name, "versions": versions, "git_commit": git_commit()}
    print(json.dumps({**where, **shape, "unit": "us", "rows": rows}))


if __name__ == "__main__":
    main()
