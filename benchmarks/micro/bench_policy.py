"""Host time of a step's decisions, without a model: python -m benchmarks.micro.bench_policy

Draws random draft probabilities, grows a tree with a policy and times what a step spends on
choosing: ranking a layer, breadth and depth, ranking all nodes, reranking; with `auto` also
calibration and learning. The last line is one JSON object. Beside it, a server's `/server_info`
shows the share of real steps (`policy_share`).

On a CPU a pass over the weights leaves nothing of a decision's code and data in the caches. --sweep
reads that many megabytes wherever a step would run a pass.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cast_sglang.costs.model import StepCosts
from cast_sglang.ops import ops_for
from cast_sglang.ops.contract import AcceptanceCurve
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.fixed import FixedPolicy
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.step import Drafted, Verified
from cast_sglang.tree import DraftTree

# What a step spends its time on; `learn` is calibration's part of it.
PARTS = ("speculate", "grow", "expanded", "breadth", "rank", "rerank", "learn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32,64", help="batch sizes (default: %(default)s)")
    parser.add_argument("--policy", default="auto", choices=("auto", "fixed"))
    parser.add_argument("--topk", type=int, default=8, help="K (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="layers (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="N (default: %(default)s)")
    parser.add_argument(
        "--uniform", action="store_true", help="the same number of nodes for each request"
    )
    parser.add_argument(
        "--sweep", type=int, default=0, metavar="MB", help="read in place of each pass (default: 0)"
    )
    parser.add_argument("--repeats", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_grad_enabled(False)

    rows = []
    for batch in map(int, options.batches.split(",")):
        decider = Decider(options)
        laps = [decider.step(batch) for _ in range(options.repeats + 5)][5:]
        parts = {part: statistics.median(lap[part] for lap in laps) * 1e6 for part in PARTS}
        total = statistics.median(sum(lap.values()) for lap in laps) * 1e6
        row = {"batch": batch, "policy_us": total, **parts}
        rows.append({name: round(value, 1) for name, value in row.items()})
    shape = {"policy": options.policy, "uniform": options.uniform, "topk": options.topk}
    shape |= {"steps": options.steps, "tokens": options.tokens, "sweep": options.sweep}
    table = Table("batch", "us per step", *PARTS, title=f"{shape}, all layers grown")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(stderr=True).print(table)
    print(json.dumps({"device": options.device, **shape, "rows": rows}))


class Decider:
    """A policy and what it decides by, as a worker holds them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._swept = torch.zeros(options.sweep << 18, device=options.device)
        self._laps: dict[str, float] = {}
        self._began = 0.0
        num_tokens, topk = options.tokens, options.topk
        self.costs = StepCosts(
            verify=np.linspace(1.0, 2.0, num_tokens, dtype=np.float32),
            # Drafts that cost next to nothing, so that every layer is grown: the dearest step.
            draft=np.linspace(1e-6, 2e-6, topk, dtype=np.float32),
            draft_extend=np.linspace(0.1, 0.2, options.steps + 1, dtype=np.float32),
            unit_us=1e4,
            overhead=0.0,
            plain_overhead=0.0,
        )
        sizes = tuple(range(2, num_tokens + 1))
        self.calibration = None
        if options.policy == "fixed":
            self.policy: TreePolicy = FixedPolicy(0.0, 0.0, 2.5, 16, sizes)
        else:
            self.policy = AutoPolicy(sizes, options.steps)
            self.calibration = Calibration()

    def step(self, batch: int) -> dict[str, float]:
        """Return the seconds of each part of the decisions of one step."""
        topk, device = self.options.topk, self.options.device
        self._laps = dict.fromkeys(PARTS, 0.0)
        tokens, probs = random_children(batch, topk, device)
        top_ks = torch.ones(batch, device=device)
        self._pass()
        if self.calibration is not None:
            self.calibration.begin_step(top_ks)
        self.policy.speculate(batch, self.costs)
        self._lap("speculate")
        curve = self._curve(probs, 1)
        tree = DraftTree(tokens, probs, self.options.steps, ops_for(device), curve)
        self._lap("grow")
        widths: list[int] = []
        while tree.num_layers < tree.max_layers:
            frontier = tree.frontier()
            scores = frontier.scores.cpu()
            width = self.policy.breadth(scores, self.costs)
            deepens = self.policy.deepen()
            self._lap("breadth")
            if not deepens:
                break
            tokens, probs = random_children(batch * width, topk, device)
            self._pass()
            curve = self._curve(probs, tree.num_layers + 1)
            grown = tree.grow(frontier, width, tokens, probs, curve)
            self._lap("grow")
            self.policy.expanded(scores, grown.cpu())
            self._lap("expanded")
            widths.append(width)
        ranked = tree.ranked(self.options.tokens - 1)
        self._lap("rank")
        scores = ranked.scores.cpu()
        num_rows = None
        if not self.options.uniform:
            num_rows = self.policy.share_out(scores, self.costs)
        if num_rows is None:
            num_draft_tokens = self.policy.rerank(scores, self.costs)
        else:
            num_draft_tokens = int(num_rows.max())
        self._lap("rerank")
        selection = tree.select(
            ranked, num_draft_tokens, None if num_rows is None else torch.from_numpy(num_rows)
        )
        self._began = time.perf_counter()
        if self.calibration is not None:
            self.calibration.on_drafted(Drafted(tree, tuple(widths), selection))
            self._lap("learn")
            # Each request takes its first node.
            roots = num_draft_tokens * torch.arange(batch, device=device)
            accepted = torch.stack((roots, roots + 1), dim=1)
            self._pass()
            found: dict[str, Any] = dict.fromkeys(Verified._fields)
            found |= {"num_draft_tokens": num_draft_tokens, "accept_index": accepted}
            self.calibration.on_verified(Verified(**found))
        self.policy.observe(batch, 1.0, 1.5)
        self._lap("learn")
        return self._laps

    def _pass(self) -> None:
        """Stand in for a pass of a model, and start the clock."""
        self._swept.sum()
        self._began = time.perf_counter()

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self._laps[part] += now - self._began
        self._began = now

    def _curve(self, probs: torch.Tensor, depth: int) -> AcceptanceCurve | None:
        return None if self.calibration is None else self.calibration.curve_at(probs, depth)


def random_children(rows: int, topk: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and descending probabilities [rows, topk] that sum to less than 1."""
    probs = torch.rand(rows, topk + 1, device=device)
    probs = (probs / probs.sum(dim=1, keepdim=True))[:, :topk].sort(dim=1, descending=True).values
    return torch.randint(1000, (rows, topk), device=device), probs


if __name__ == "__main__":
    main()
