"""Host time of CAST's decisions for one step, without a model: python -m benchmarks.bench_policy

Draws random draft probabilities, grows a tree with the paper's policy and times what a step spends
on choosing: ranking a layer, breadth and depth, ranking all nodes, reranking. The last line is one
JSON object. Beside it, a server's `/server_info` shows the share of real steps (`policy_share`).
"""

import argparse
import json
import statistics
import time
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table

from cast_sglang.policy import FixedPolicy
from cast_sglang.tree import DraftTree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32,64", help="batch sizes (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="K (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="layers (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="N (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_grad_enabled(False)

    rows = []
    for batch in map(int, options.batches.split(",")):
        seconds = [time_step(options, batch) for _ in range(options.repeats + 5)][5:]
        rows.append({"batch": batch, "policy_us": round(statistics.median(seconds) * 1e6, 1)})
    table = Table(
        "batch",
        "policy us per step",
        title=f"K={options.topk}, D={options.steps}, all layers grown",
    )
    for row in rows:
        table.add_row(str(row["batch"]), str(row["policy_us"]))
    Console(stderr=True).print(table)
    shape = {"topk": options.topk, "steps": options.steps, "tokens": options.tokens}
    print(json.dumps({"device": options.device, **shape, "rows": rows}))


def time_step(options: argparse.Namespace, batch: int) -> float:
    """Return the seconds of all decisions of one step in which every layer is grown."""
    topk, device = options.topk, options.device
    costs = SimpleNamespace(
        draft=torch.linspace(0.1, 0.2, topk), verify=torch.linspace(1.0, 2.0, options.tokens)
    )
    # C1 = C2 = 0 keeps every node and grows every layer: the dearest step for the policy.
    policy = FixedPolicy(0.0, 0.0, 2.5, 16, tuple(range(2, options.tokens + 1)))
    tree = DraftTree(*random_children(batch, topk, device), max_layers=options.steps)
    spent = 0.0
    while tree.num_layers < tree.max_layers:
        began = time.perf_counter()
        frontier = tree.frontier()
        width = policy.breadth(frontier.scores, costs)
        policy.deepen()
        spent += time.perf_counter() - began
        tree.grow(frontier, width, *random_children(batch * width, topk, device))
    began = time.perf_counter()
    ranked = tree.ranked(options.tokens - 1)
    policy.rerank(ranked.scores, costs)
    return spent + time.perf_counter() - began


def random_children(rows: int, topk: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and descending probabilities [rows, topk] that sum to less than 1."""
    probs = torch.rand(rows, topk + 1, device=device)
    probs = (probs / probs.sum(dim=1, keepdim=True))[:, :topk].sort(dim=1, descending=True).values
    return torch.randint(1000, (rows, topk), device=device), probs


if __name__ == "__main__":
    main()
