"""A server without models that copies and records: greedy requests of known texts."""

from types import SimpleNamespace

import numpy as np
import torch

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, step_units
from cast_sglang.costs.schema import CostProfile
from cast_sglang.ops import loops
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.serving.copies import Copies
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.step import PLAIN_SHAPE, Drafted, DraftShape, StepReport, Verified
from cast_sglang.serving.step_room import StepRoom
from cast_sglang.serving.trace_recorder import Recording, TraceRecorder
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.records import Trace
from cast_sglang.tree import DraftTree
from tests.support.builders import make_identity

TOPK, LAYERS, ROWS, VOCAB = 3, 4, 12, 400
SIZES = tuple(range(2, ROWS + 1))
COPY_DEPTH = ROWS - 1
LIMITS = Limits(8, 4096, ROWS, TOPK, None, ROWS)


class Request(SimpleNamespace):
    """A request as SGLang holds it, as far as copying reads it; known as an object, not by name."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class CopyingServer:
    """Serves requests by policy `auto` and records the steps; its loop is not that of `Replay`.

    Args:
        path: of the trace.
        copies: whether it copies.
        right: how often the draft proposes the next token of the text.
        least_token: of its other proposals.
    """

    def __init__(
        self, path, profile: CostProfile, *, copies=True, is_ragged=True, right=0.4, least_token=0
    ) -> None:
        self.model, self.path, self.right = CostModel(profile, LIMITS), path, right
        self.is_ragged, self.rng = is_ragged, np.random.default_rng(0)
        self.least_token = least_token
        self.decider = Decider(
            AutoPolicy(SIZES, LAYERS, extends_by_accepted=is_ragged),
            max_missing=ROWS,
            topk=TOPK,
            is_ragged=is_ragged,
        )
        self.copies = None
        if copies:
            self.copies = Copies(
                HostReads("cpu"),
                topk=TOPK,
                num_nodes=ROWS - 1,
                max_tokens=1 << 16,
                vocab_size=VOCAB,
            )
        config = CastConfig(
            trace=str(path), trace_tokens=True, residuals="off", copying="on" if copies else "off"
        )
        recording = Recording(
            config=config,
            identity=make_identity(device_name="made up"),
            limits=LIMITS,
            max_layers=LAYERS,
            verify_sizes=SIZES,
            is_ragged=is_ragged,
            shares_out=False,
            extends_by_outcome=True,
            verify_graphs=None,
            width_graphs=None,
            extend_graphs=None,
        )
        self.recorder = TraceRecorder(recording, profile)
        self.missing: dict[str, int] = {}
        self.number = 0

    def request(self, rid: str, text: list[int], num_prompt: int) -> Request:
        return Request(
            rid=rid,
            text=text,
            origin_input_ids=text[:num_prompt],
            output_ids=[text[num_prompt]],
            sampling_params=SimpleNamespace(top_k=1, custom_params=None),
        )

    def finish(self) -> Trace:
        """Write the rest of the trace and read it."""
        self.recorder.flush()
        return read_trace(self.path)

    def step(self, reqs: list[Request]) -> None:
        self.number += 1
        batch = SimpleNamespace(
            reqs=list(reqs),
            spec_info=SimpleNamespace(bonus_tokens=torch.tensor([r.output_ids[-1] for r in reqs])),
            seq_lens=torch.tensor([self._size(req) - 1 for req in reqs]),
        )
        batch.seq_lens_cpu = batch.seq_lens
        self.recorder.begin_step(batch)
        costs = self.model.step_costs(len(reqs), int(batch.seq_lens.sum()) / len(reqs))
        missing = max(self.missing.get(req.rid, 0) for req in reqs)
        facts = StepFacts(len(reqs), costs, None, missing, LAYERS, ROWS)
        plan = self.decider.begin_step(facts)
        price = self.decider.price(len(reqs))
        for req in reqs:
            before = 0 if plan.catch_up or plan.drafts else self.missing.get(req.rid, 0)
            self.missing[req.rid] = 0 if plan.drafts else min(before + 1, ROWS)
        if plan.drafts:
            shape, selection = self._draft(batch)
        else:
            shape, selection = PLAIN_SHAPE, None
        verified = self._verify(reqs, shape.num_draft_tokens, selection)
        if self.copies is not None:
            self.copies.on_verified(reqs, verified)
        self.recorder.on_verified(verified)
        accepted = verified.accept_lens.numpy() - 1.0
        extend_rows = 1.0 + float(accepted.mean() if self.is_ragged else accepted.max())
        units = step_units(costs, shape.widths, shape.mean_rows, extend_rows)
        if plan.drafts:
            self.decider.end_step(len(reqs), float(accepted.mean()), units)
        report = StepReport(
            number=self.number,
            shape=shape,
            extend_rows=extend_rows if plan.drafts else 0.0,
            weights=None,
            predicted_us=units * costs.unit_us,
            expected_us=units * costs.unit_us,
            room=StepRoom(LAYERS, ROWS, LAYERS * TOPK, COPY_DEPTH * (self.copies is not None)),
            policy_us=1.0,
            price=price,
        )
        self.recorder.on_step(report)
        self.recorder.on_step_timed(units * costs.unit_us)

    def _size(self, req: Request) -> int:
        return len(req.origin_input_ids) + len(req.output_ids)

    def _children(
        self, reqs: list[Request], paths: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and probs [n, K] of nodes; a path is None where the text does not go."""
        rows = []
        for req, path in zip(reqs, paths, strict=True):
            row = self.least_token + self.rng.permutation(VOCAB - self.least_token)[:TOPK]
            known = None if path is None else req.text[self._size(req) + len(path)]
            if self.rng.random() < self.right and known is not None and known not in row:
                row[0] = known
            rows.append(row)
        probs = self.rng.dirichlet(np.ones(TOPK + 1), len(rows))[:, :TOPK]
        probs = np.sort(probs, axis=1)[:, ::-1].copy()
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(probs).float()

    def _draft(self, batch):
        reqs, decider, copies = batch.reqs, self.decider, self.copies
        if copies is not None:
            copies.begin_step(batch, None, None, COPY_DEPTH, decider.least_scores())
        tokens, probs = self._children(reqs, [[] for _ in reqs])
        tree = DraftTree(tokens, probs, LAYERS, loops)
        self.recorder.on_layer(1, probs, probs)
        if copies is not None:
            copies.start()
        widths = []
        while True:
            frontier = tree.frontier()
            shown = None if copies is None else copies.look(tree.newest)
            width = decider.width(frontier.scores, shown)
            if width is None:
                break
            owners, paths = [], []
            for b, req in enumerate(reqs):
                for node in frontier.node_index[b, :width].tolist():
                    owners.append(req)
                    paths.append(self._path(req, tree, b, node))
            tokens, probs = self._children(owners, paths)
            chances = tree.grow(frontier, width, tokens, probs)
            self.recorder.on_layer(tree.num_layers, probs, chances)
            decider.expanded(frontier.scores, chances)
            widths.append(width)
        grafts = None if copies is None else copies.graft_into(tree)
        ranked = tree.ranked(ROWS - 1)
        size, num_rows = decider.rows(ranked.scores)
        if grafts is not None:
            size, num_rows = grafts.fit(size, num_rows, self.is_ragged)
        rows = None if num_rows is None else torch.from_numpy(num_rows)
        selection = tree.select(ranked, size, rows)
        drafted = Drafted(tree, tuple(widths), selection)
        self.recorder.on_drafted(drafted, None if copies is None else copies.traced())
        if copies is not None:
            copies.on_drafted(drafted)
        depth = max(tree.num_layers, 0 if grafts is None else grafts.depth)
        return DraftShape(tuple(widths), size, num_rows, depth), selection

    def _path(self, req, tree, b, node):
        """Return the tokens down to a node, None where the text does not go there."""
        tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
        path = []
        while node >= 0:
            path.insert(0, tokens[node])
            node = parents[node]
        size = self._size(req)
        return path if req.text[size : size + len(path)] == path else None

    def _verify(self, reqs, rows, selection) -> Verified:
        new, accepted = [], []
        logits = torch.zeros(len(reqs) * rows, VOCAB)
        for b, req in enumerate(reqs):
            size, at, path = self._size(req), 0, []
            while True:
                wanted = req.text[size + len(path)]
                logits[b * rows + at, wanted] = 1.0
                found = [
                    row
                    for row in range(at + 1, rows)
                    if int(selection.parent_rows[b, row - 1]) == at
                    and int(selection.draft_tokens[b, row - 1]) == wanted
                ]
                if not found:
                    break
                assert len(found) == 1
                at = found[0]
                path.append(at)
            accepted.append([b * rows, *(b * rows + row for row in path)])
            new.append(req.text[size : size + len(path) + 1])
        index = np.full((len(reqs), rows + 1), -1, np.int32)
        tokens = np.full((len(reqs), rows + 1), -1)
        for b, (row, brought) in enumerate(zip(accepted, new, strict=True)):
            index[b, : len(row)], tokens[b, : len(brought)] = row, brought
            reqs[b].output_ids = reqs[b].output_ids + brought
        return Verified(
            num_draft_tokens=rows,
            accept_index=torch.from_numpy(index),
            accept_lens=torch.tensor([len(row) for row in new], dtype=torch.int32),
            tokens=torch.from_numpy(tokens).flatten().int(),
            logits=logits,
            sampling_info=SimpleNamespace(is_all_greedy=True),
        )


def repeating_text(seed: int, size: int) -> list[int]:
    """Return a text of passages that come again, with other tokens between them."""
    rng = np.random.default_rng(seed)
    passages = [rng.integers(0, VOCAB, rng.integers(5, 25)).tolist() for _ in range(6)]
    text: list[int] = []
    while len(text) < size:
        text += passages[rng.integers(6)] + rng.integers(0, VOCAB, rng.integers(0, 4)).tolist()
    return text[:size]
