"""Host time of copying in a step, without a model: python -m benchmarks.micro.bench_copying

Each request has source of the standard library as its prompt and says pieces of it again, with a
token of its own now and then. A tree is grown over made-up drafts, what the text goes on with is
accepted, and `serving.copies.Copies` is timed call by call: reading the texts of new requests
(begin), the automata of what came (update), finding copies after each layer (look), and hanging
them in (graft). The last line is one JSON object.

On a CPU a pass over the weights leaves nothing of a decision's code and data in the caches. --sweep
reads that many megabytes wherever a step would run a pass.
"""

import argparse
import importlib
import inspect
import json
import re
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness.copied import EDITED_MODULES
from cast_sglang.ops import loops
from cast_sglang.serving.copies import Copies
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.step import Drafted, Verified
from cast_sglang.tree import DraftTree

PARTS = ("begin", "look", "graft", "update")
VOCAB = 32_000
# Tokens that are said again between two of the answer's own.
LEAST_PIECE, MOST_PIECE = 8, 60
ANSWER = 4096
# As where a row adds 1 % to a pass that brings two tokens.
LEAST_SCORE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="1,8,32,64", help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="K (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="envelope (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="grown (default: %(default)s)")
    parser.add_argument("--width", type=int, default=3, help="of a layer (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="N (default: %(default)s)")
    parser.add_argument(
        "--sweep", type=int, default=0, metavar="MB", help="read in place of each pass (default: 0)"
    )
    parser.add_argument("--repeats", type=int, default=200, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)

    rows = []
    for batch in map(int, options.batches.split(",")):
        server = Server(options, batch)
        laps = [server.step() for _ in range(options.repeats + 10)][10:]
        parts = {part: statistics.median(lap[part] for lap in laps) * 1e6 for part in PARTS}
        totals = sorted(sum(lap.values()) * 1e6 for lap in laps)
        row = {"batch": batch, "us": statistics.median(totals), **parts}
        row |= {"p95": totals[int(0.95 * len(totals))], "copied": server.copies.num_accepted}
        row["accepted"] = server.num_accepted
        rows.append({name: round(value, 1) for name, value in row.items()})
    names = ("prompt", "topk", "steps", "layers", "width", "tokens", "sweep", "repeats")
    shape = {name: getattr(options, name) for name in names}
    table = Table("batch", "us per step", *PARTS, "p95", "copied", "accepted", title=str(shape))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(stderr=True).print(table)
    print(json.dumps({**shape, "rows": rows}))


def source_tokens() -> np.ndarray:
    """Return numbers of the words and signs of some modules of the standard library."""
    sources = (inspect.getsource(importlib.import_module(name)) for name in EDITED_MODULES)
    words = re.findall(r"\w+|\s+|[^\w\s]", "\n".join(sources))
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return np.array([numbers[word] % VOCAB for word in words])


class Request(SimpleNamespace):
    """A request as SGLang holds it, as far as copying reads it; known as an object, not by name."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Server:
    """Requests that repeat their prompts, and the copies of a server."""

    def __init__(self, options: argparse.Namespace, batch: int) -> None:
        self.options, self.rng = options, np.random.default_rng(0)
        self._swept = torch.zeros(options.sweep << 18)
        self._source = source_tokens()
        self.num_accepted = self._number = 0
        size = {"topk": options.topk, "num_nodes": options.tokens - 1}
        most = 4 * batch * (options.prompt + ANSWER)
        self.copies = Copies(HostReads("cpu"), **size, max_tokens=most, vocab_size=VOCAB)
        self.reqs = [self._request() for _ in range(batch)]
        self._laps: dict[str, float] = {}

    def _request(self) -> Request:
        self._number += 1
        first = self.rng.integers(0, max(1, len(self._source) - self.options.prompt))
        prompt = np.resize(self._source[first:], self.options.prompt)
        parts, size = [prompt], 0
        while size < ANSWER:
            place = self.rng.integers(0, len(prompt) - MOST_PIECE)
            piece = prompt[place : place + self.rng.integers(LEAST_PIECE, MOST_PIECE)]
            parts += [piece, self.rng.integers(0, VOCAB, 1)]
            size += len(piece) + 1
        return Request(
            rid=str(self._number),
            text=np.concatenate(parts),
            origin_input_ids=prompt.tolist(),
            output_ids=[int(parts[1][0])],
            sampling_params=SimpleNamespace(top_k=1, custom_params=None),
        )

    def step(self) -> dict[str, float]:
        """Run a step; return the seconds of each part."""
        self._laps = dict.fromkeys(PARTS, 0.0)
        for place, req in enumerate(self.reqs):
            if len(req.output_ids) > ANSWER - 2 * self.options.tokens:
                self.reqs[place] = self._request()
        sizes = [len(req.origin_input_ids) + len(req.output_ids) for req in self.reqs]
        batch = SimpleNamespace(
            reqs=list(self.reqs),
            spec_info=SimpleNamespace(
                bonus_tokens=torch.tensor([req.output_ids[-1] for req in self.reqs])
            ),
            seq_lens=torch.tensor(sizes) - 1,
        )
        least = np.full(len(self.reqs), LEAST_SCORE, np.float32)
        whose = batch, None, None
        self._timed("begin", self.copies.begin_step, *whose, self.options.steps, least)
        self._timed("begin", self.copies.start)
        tree = self._grown(sizes)
        self._timed("graft", self.copies.graft_into, tree)
        ranked = tree.ranked(self.options.tokens - 1)
        selection = tree.select(ranked, self.options.tokens)
        self.copies.on_drafted(Drafted(tree, (), selection))
        self._timed("update", self.copies.on_verified, self.reqs, self._verified(selection, sizes))
        return self._laps

    def _grown(self, sizes: list[int]) -> DraftTree:
        """Grow a tree whose draft is right about the next token two times in three."""
        options, batch = self.options, len(self.reqs)
        on_path = [-1] * batch  # the candidate that the text goes through
        tokens = self._children(batch, on_path, [[-1]] * batch, sizes, 0)
        tree = DraftTree(torch.from_numpy(tokens), self._probs(batch), options.steps, loops)
        self._timed("look", self.copies.look, tree.newest)
        for depth in range(1, options.layers):
            frontier, width = tree.frontier(), options.width
            kept = frontier.node_index[:, :width].tolist()
            for b, req in enumerate(self.reqs):
                wanted = req.text[sizes[b] + depth - 1]
                on_path[b] = next(
                    (
                        node
                        for node in kept[b]
                        if int(tree.tokens[b, node]) == wanted
                        and int(tree.parents[b, node]) == on_path[b]
                    ),
                    -2,
                )
            tokens = self._children(batch * width, on_path, kept, sizes, depth)
            tree.grow(frontier, width, torch.from_numpy(tokens), self._probs(batch * width))
            self._timed("look", self.copies.look, tree.newest)
        return tree

    def _probs(self, rows: int) -> torch.Tensor:
        probs = np.sort(self.rng.dirichlet(np.full(self.options.topk + 1, 0.3), rows), axis=1)
        return torch.from_numpy(probs[:, :0:-1].copy()).float()

    def _children(
        self, rows: int, on_path: list[int], kept: list[list[int]], sizes: list[int], depth: int
    ) -> np.ndarray:
        tokens = self.rng.integers(0, VOCAB, (rows, self.options.topk))
        tokens += np.arange(self.options.topk) * VOCAB  # distinct, and never said
        row = 0
        for b, nodes in enumerate(kept):
            for node in nodes:
                if node == on_path[b] and self.rng.random() < 2 / 3:
                    tokens[row, 0] = self.reqs[b].text[sizes[b] + depth]
                row += 1
        return tokens

    def _verified(self, selection: Any, sizes: list[int]) -> Verified:
        rows = self.options.tokens
        parents, drafted = selection.parent_rows.numpy(), selection.draft_tokens.numpy()
        index = np.full((len(self.reqs), self.options.steps + 1), -1, np.int32)
        tokens, lens = np.full(index.shape, -1, np.int32), np.zeros(len(self.reqs), np.int32)
        for b, req in enumerate(self.reqs):
            at = 0
            for place in range(self.options.steps + 1):
                index[b, place], tokens[b, place] = b * rows + at, req.text[sizes[b] + place]
                lens[b] = place + 1
                [found] = np.nonzero((parents[b] == at) & (drafted[b] == tokens[b, place]))
                if not len(found):
                    break
                at = int(found[0]) + 1
            req.output_ids += tokens[b, : lens[b]].tolist()
        self.num_accepted += int(lens.sum()) - len(lens)
        return Verified(
            num_draft_tokens=rows,
            accept_index=torch.from_numpy(index),
            accept_lens=torch.from_numpy(lens),
            tokens=torch.from_numpy(tokens).flatten(),
            logits=torch.empty(0),
            sampling_info=None,
        )

    def _timed(self, part: str, call: Any, *arguments: Any) -> None:
        """Stand in for a pass of a model, and time a call."""
        self._swept.sum()
        began = time.perf_counter()
        call(*arguments)
        self._laps[part] += time.perf_counter() - began


if __name__ == "__main__":
    main()
