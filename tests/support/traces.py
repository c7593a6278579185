"""Traces of the simulated models of `simulator.py`, recorded as a worker records."""

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, extend_units, step_units
from cast_sglang.costs.schema import CostProfile
from cast_sglang.ops import reference
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.trace.file import TraceWriter
from cast_sglang.trace.full_width import layers_kept
from cast_sglang.trace.records import (
    Continuation,
    Trace,
    TracedPass,
    TracedRequest,
    TracedStep,
    TraceHeader,
    packed,
    tables_digest,
)
from cast_sglang.tree import DraftTree, parents_of
from tests.support.builders import make_identity, make_profile, make_table
from tests.support.simulator import LAYERS, TOKENS, TOPK, Text

SETTINGS = {
    "policy": "auto",
    "c1": 4.0,
    "c2": 3.0,
    "c3": 2.5,
    "r": 16,
    "lookup": "linear",
    "residuals": "off",
}


def make_tables(row_us: float = 300.0, draft_us: float = 500.0) -> CostProfile:
    """A profile whose costs rise with the rows of the batch: trees of many sizes pay."""
    tokens = (1, 2, 4, 8, 16, 32)
    sizes = {"batch_sizes": (1, 4, 8), "contexts": (128, 1024), "tile": 1}
    slope = row_us / 200.0  # a row of `make_table` takes 2 % of the base
    target = make_table(10_000.0, token_counts=tokens, **sizes)
    scaled = [[[10_000.0 + (us - 10_000.0) * slope for us in r] for r in p] for p in target.time_us]
    target = msgspec.structs.replace(target, time_us=scaled)
    draft = make_table(draft_us, token_counts=(1, 2, 4, 8), **sizes)
    extend = make_table(1.2 * draft_us, token_counts=(1, 2, 4, 9), **sizes)
    return make_profile(
        make_identity(device_name="made up"),
        target=target,
        draft=draft,
        draft_extend=extend,
        step_overhead_us=[500.0, 500.0, 500.0],
    )


def make_header(profile: CostProfile | None, **changes: object) -> TraceHeader:
    values = {
        "identity": make_identity(device_name="made up"),
        "profile": None if profile is None else profile.provenance,
        "tables": "" if profile is None else tables_digest(profile),
        "settings": SETTINGS,
        "num_steps": LAYERS,
        "topk": TOPK,
        "num_draft_tokens": TOKENS,
        "verify_sizes": list(range(2, TOKENS + 1)),
        "max_batch_size": 8,
        "max_context": 1024,
        "is_ragged": False,
        "shares_out": False,
        "extends_by_outcome": True,
        "is_full": False,
        "has_tokens": True,
        "date": "2026-01-01T00:00:00+00:00",
    }
    return TraceHeader(**{**values, **changes})


class _Layer(NamedTuple):
    probs: np.ndarray  # [B, W, K]
    true: np.ndarray
    tokens: np.ndarray


class Recorder:
    """Runs a policy in closed loop over simulated text, and records what a server would.

    This is its own loop, not that of `Replay`, so that the two check each other.
    """

    def __init__(
        self, policy: TreePolicy, profile: CostProfile, batch_size: int = 2, seed: int = 0
    ) -> None:
        self.policy, self.profile = policy, profile
        self.text = Text(batch_size, seed, ease=0.5)
        self.num_missing = 0  # rows that the draft has not seen
        self.rng = np.random.default_rng(seed + 1)
        self.model = CostModel(profile, Limits(8, 1024 + TOKENS, TOKENS, TOPK, None, LAYERS + 1))

    def run(self, steps: int) -> Trace:
        made = [self._step(number) for number in range(1, steps + 1)]
        return Trace(Path("made-up"), make_header(self.profile), made, [])

    def _layer(self, nodes: int, depth: int) -> _Layer:
        probs = self.text.children(nodes)
        tokens = self.rng.random((*probs.shape[:2], 97)).argsort(axis=2)[..., :TOPK].copy()
        return _Layer(probs, self.text.chances(probs, depth), tokens)

    def _step(self, number: int) -> TracedStep:
        self.text.advance()
        batch_size = len(self.text.is_greedy)
        context = 200.0 + number
        costs = self.model.step_costs(batch_size, context)
        price = None
        if isinstance(self.policy, AutoPolicy):
            price = self.policy.price(batch_size)
        # After plain steps the draft catches up, which `speculate` has to know.
        catch_up = extend_units(costs, self.num_missing)
        drafts = self.policy.speculate(batch_size, costs, catch_up)
        self.num_missing = 0 if drafts else min(self.num_missing + 1, TOKENS)
        if not drafts:
            time = step_units(costs, (), 1, 0) * costs.unit_us
            requests = [TracedRequest(request=b, context=200) for b in range(batch_size)]
            return TracedStep(
                step=number,
                context=context,
                widths=[],
                num_layers=0,
                num_draft_tokens=1,
                extend_rows=0.0,
                requests=requests,
                predicted_us=time,
                measured_us=time,
                price=price,
            )
        layers = [self._layer(1, 1)]
        flat = torch.from_numpy(layers[0].tokens.reshape(batch_size, -1))
        tree = DraftTree(flat, torch.from_numpy(layers[0].probs[:, 0]).float(), LAYERS, reference)
        while tree.num_layers < tree.max_layers:
            frontier = tree.frontier()
            width = self.policy.breadth(frontier.scores, costs)
            if not self.policy.deepen():
                break
            layer = self._layer(width, tree.num_layers + 1)
            probs = torch.from_numpy(layer.probs.reshape(-1, TOPK)).float()
            self.policy.expanded(frontier.scores, probs)
            tree.grow(frontier, width, torch.from_numpy(layer.tokens.reshape(-1, TOPK)), probs)
            layers.append(layer)
        num_layers = layers_kept(self.policy, tree.num_layers, costs)
        ranked = tree.ranked(TOKENS - 1, num_layers)
        size = self.policy.rerank(ranked.scores, costs)
        selection = tree.select(ranked, size)
        requests = [
            self._request(b, layers, tree, selection.top_scores_index[b].numpy())
            for b in range(batch_size)
        ]
        widths = [kept.shape[1] for kept in tree.expanded]
        accepted = [len(request.accepted) for request in requests]
        rows = 1.0 + max(accepted)
        units = step_units(costs, widths[: num_layers - 1], size, rows)
        self.policy.observe(batch_size, sum(accepted) / batch_size, units)
        passes = [("verify", size), *(("draft", w) for w in widths), ("draft_extend", int(rows))]
        return TracedStep(
            step=number,
            context=context,
            widths=widths,
            num_layers=num_layers,
            num_draft_tokens=size,
            extend_rows=rows,
            requests=requests,
            predicted_us=units * costs.unit_us,
            measured_us=units * costs.unit_us * 1.25,
            price=price,
            passes=[
                TracedPass(
                    operation=operation,
                    batch_size=batch_size,
                    num_tokens=count,
                    predicted_us=1000.0,
                    measured_us=1250.0,
                )
                for operation, count in passes
            ],
        )

    def _request(
        self, b: int, layers: list[_Layer], tree: DraftTree, verified: np.ndarray
    ) -> TracedRequest:
        probs, true, tokens = (
            np.concatenate([np.asarray(layer[part])[b].ravel() for layer in layers])
            for part in range(3)
        )
        expanded = np.array([node for kept in tree.expanded for node in kept[b].tolist()], int)
        path = Continuation(tokens, parents_of(expanded, TOPK))
        first = 0
        while first is not None and not path.is_closed:  # the target picks a child, or none
            odds = true[first : first + TOPK].cumsum()
            pick = int((odds <= self.rng.random()).sum())
            path.go_on([int(tokens[first + pick]) if pick < TOPK else -1])
            at = np.nonzero(expanded == path.follows[-1])[0] if path.follows else []
            first = TOPK * (1 + int(at[0])) if len(at) else None
        accepted = [node for node in path.follows if node in set(verified.tolist())]
        return TracedRequest(
            request=b,
            context=200,
            probs=packed(probs, "float32"),
            expanded=packed(expanded, "int32"),
            verified=packed(verified, "int32"),
            target_probs=packed(true[verified], "float32"),
            accepted=accepted,
            follows=path.follows,
            tokens=packed(tokens, "int32"),
        )


def write(trace: Trace, path: Path, max_bytes: int = 1 << 30) -> Path:
    """Write a trace as a server does."""
    writer = TraceWriter(path, max_bytes, trace.header)
    for step in trace.steps:
        writer.write(step)
    writer.close()
    return path


def default_policy() -> AutoPolicy:
    return AutoPolicy(tuple(range(2, TOKENS + 1)), LAYERS, extends_by_accepted=True)
