"""Inputs for the ops, at odd sizes and with the values at which kernels go wrong."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from cast_sglang.ops.contract import AcceptanceCurve
from cast_sglang.policy.acceptance import GREEDY, SAMPLED, Acceptance
from cast_sglang.policy.outcomes import VerifiedNodes

KINDS = ("random", "ties", "zeros", "ones", "denormal", "mixed")


def values(generator: torch.Generator, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Draw float32 values in [0, 1]."""
    x = torch.rand(shape, generator=generator)
    if kind == "ties":
        return (x * 4).round() / 4
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "ones":
        return torch.ones(shape)
    if kind == "denormal":
        return x * 1e-39
    if kind == "mixed":
        special = torch.tensor([0.0, 1.0, 1e-40, 1e-45, 0.5])
        drawn = special[torch.randint(5, shape, generator=generator)]
        return torch.where(x < 0.6, drawn, x)
    return x


class LayerCase(NamedTuple):
    """Arguments of `grow_layer`."""

    parent_scores: torch.Tensor
    probs: torch.Tensor
    tokens: torch.Tensor
    layer_start: int


def layer(generator: torch.Generator, batch: int, width: int, topk: int, kind: str) -> LayerCase:
    # Parents are columns of a wider frontier, as in a step.
    parents = values(generator, (batch, topk), kind)[:, :width]
    shape = (batch * width, topk)
    tokens = torch.randint(2**40, shape, generator=generator)
    start = int(torch.randint(2000, (), generator=generator))
    return LayerCase(parents, values(generator, shape, kind), tokens, start)


@functools.cache
def learned(seed: int) -> Acceptance:
    """Return a map, not to be changed, of drafts too sure of themselves, or not sure enough."""
    acceptance, rng = Acceptance(), np.random.default_rng(seed)
    shares, depths = rng.random((2, 600)), rng.integers(1, 12, (2, 600))
    accepted = rng.random((2, 600)) < shares ** [[0.7], [1.5]]
    nodes = VerifiedNodes(shares, depths, np.ones((2, 600), bool), accepted)
    acceptance.update(nodes, np.array([GREEDY, SAMPLED]))
    return acceptance


def curve_at(acceptance: Acceptance, bucket: int, batch: int) -> AcceptanceCurve:
    """Return the curves by which `acceptance` calibrates nodes of a bucket of depths.

    Every third request is greedy.
    """
    kinds = torch.where(torch.arange(batch) % 3 == 0, GREEDY, SAMPLED)
    return acceptance.curve_at((1, 2, 3, 5, 9)[bucket], kinds)


def parents(generator: torch.Generator, batch: int, num_candidates: int) -> torch.Tensor:
    """Draw the parents of all candidates, each the root or any candidate before."""
    share = torch.rand(batch, num_candidates, generator=generator)
    return (share * torch.arange(1, num_candidates + 1)).long() - 1


class TreeCase(NamedTuple):
    """Arguments of `build_tree` that are read."""

    parent_rows: torch.Tensor
    seq_lens: torch.Tensor
    num_steps: int


def tree(
    generator: torch.Generator,
    batch: int,
    topk: int,
    widths: list[int],
    num_draft_tokens: int,
    kind: str = "random",
    is_ragged: bool = False,
) -> TreeCase:
    """Draw trees of the given widths and choose nodes as a step does.

    With kind "grafted" every node hangs below any one before it, or nowhere.
    """
    num_candidates = topk + topk * sum(widths)
    num_nodes = min(num_draft_tokens - 1, num_candidates)
    seq_lens = torch.randint(1, 100_000, (batch,), generator=generator)
    if kind == "grafted":
        any_row = torch.rand(batch, num_nodes, generator=generator) * torch.arange(2, num_nodes + 2)
        return TreeCase(any_row.long() - 1, seq_lens, num_nodes)
    parent_rows = torch.full((batch, num_nodes), -1)
    for b in range(batch):
        scores = values(generator, (topk,), kind).sort(descending=True).values.tolist()
        newest, parents = range(topk), [-1] * topk
        for width in widths:
            ranked = sorted(newest, key=lambda node: (-scores[node], node))[:width]
            parents += [node for node in ranked for _ in range(topk)]
            newest = range(len(scores), len(scores) + width * topk)
            probs = values(generator, (width, topk), kind).sort(dim=1, descending=True).values
            scores += [
                scores[p] * q for p, row in zip(ranked, probs.tolist(), strict=True) for q in row
            ]
        order = sorted(range(num_candidates), key=lambda node: (-scores[node], node))
        # Where it is ragged, nothing in the rest of the row.
        rows = (
            int(torch.randint(num_nodes + 1, (), generator=generator)) if is_ragged else num_nodes
        )
        kept = [-1, *sorted(order[:rows])]
        for row, node in enumerate(kept[1:]):
            parent_rows[b, row] = kept.index(parents[node])
    return TreeCase(parent_rows, seq_lens, len(widths) + 1)


class TreeLinks(NamedTuple):
    """Outputs of `build_tree`."""

    tree_mask: torch.Tensor
    positions: torch.Tensor
    retrieve_index: torch.Tensor
    retrieve_next_token: torch.Tensor
    retrieve_next_sibling: torch.Tensor


def poisoned_links(batch: int, num_draft_tokens: int) -> TreeLinks:
    """Return outputs full of what the op must overwrite; the mask has cells to spare."""
    cells = batch * num_draft_tokens
    links = torch.full((3, batch, num_draft_tokens), -77)
    mask = torch.arange(cells * num_draft_tokens + 5) % 2 == 0
    return TreeLinks(mask, torch.full((cells,), -77), *links)


def slots(
    generator: torch.Generator,
    lens: list[int],
    width: int,
    max_depth: int,
    depth: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Return arguments of `list_slots`; what is written is poisoned, with cells to spare."""
    batch = len(lens)
    table = torch.randint(1, 2**31 - 1, (batch + 3, max(lens) + 5), generator=generator).to(dtype)
    rows = torch.randperm(batch + 3, generator=generator)[:batch]
    # Of the K nodes of a wider layer, as in a step.
    path = torch.randint(1, 2**40, (batch, width + 2, max_depth), generator=generator)[:, :width]
    seq_lens, at = torch.tensor(lens), torch.tensor([depth])
    indptr = torch.full((batch * width + 1,), -7, dtype=torch.int32)
    indices = torch.full((width * (sum(lens) + batch * depth) + 5,), -7)
    return [table, rows, seq_lens, path, at, indptr, indices]
