"""Eager layers against trees of which each node knows its own path."""

from types import SimpleNamespace

import pytest
import torch

from cast_sglang.serving.drafting.layers import EagerLayers, take_rows
from cast_sglang.tree import Frontier
from tests.support.drafts import HIDDEN, STEPS, TOPK, forward_batch


class Recorder:
    """A draft model that keeps what each pass is given, and returns states that tell nodes."""

    topk = TOPK

    def __init__(self):
        self.passes, self.states = [], []

    def forward_layer(self, batch, path_slots):
        self.passes.append(
            SimpleNamespace(
                tokens=batch.input_ids.clone(),
                positions=batch.positions.clone(),
                written=batch.out_cache_loc.clone(),
                hidden_states=batch.spec_info.hidden_states.clone(),
                path_slots=path_slots.clone(),
            )
        )
        generator = torch.Generator().manual_seed(len(self.passes))
        states = torch.rand(len(batch.input_ids), HIDDEN, generator=generator)
        self.states.append(states)
        return states[:, :TOPK], batch.input_ids.unsqueeze(1).expand(-1, TOPK), states


@pytest.mark.parametrize("widths", [[3], [1, 1, 1], [3, 1, 2], [2, 3, 3, 3, 1]])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_node_gets_its_parents_state_and_the_slots_of_its_ancestors(widths, batch_size):
    batch, model = forward_batch(batch_size, seed=4), Recorder()
    slots = batch.out_cache_loc.view(batch_size, STEPS * TOPK).clone()
    roots = batch.spec_info.hidden_states.clone()
    layers = EagerLayers(model, batch)
    generator = torch.Generator().manual_seed(5)
    paths = {(b, -1): ([], roots[b]) for b in range(batch_size)}  # slots and state, by node
    above, num_nodes = 1, 0
    for depth, width in enumerate(widths):
        parents = torch.randint(above, (batch_size, TOPK), generator=generator)
        tokens = torch.randint(50, (batch_size, TOPK), generator=generator)
        frontier = Frontier(tokens.float(), tokens, tokens, parents)
        layers.prepare(frontier)
        probs, children = layers.run(frontier, width)
        assert probs.shape == children.shape == (batch_size * width, TOPK)
        seen, below = model.passes[-1], {}
        assert seen.path_slots.shape == (batch_size, width, depth + 1)
        for row in range(batch_size * width):
            b, w = divmod(row, width)
            parent = -1 if depth == 0 else int(parents[b, w])
            path, state = paths[b, parent]
            path = [*path, int(slots[b, num_nodes + w])]  # one behind another
            assert seen.tokens[row] == tokens[b, w]
            assert seen.positions[row] == batch.seq_lens[b] + depth
            assert seen.path_slots[b, w].tolist() == path and seen.written[row] == path[-1]
            assert torch.equal(seen.hidden_states[row], state)
            below[b, w] = path, model.states[-1][row]
        paths, above, num_nodes = below, width, num_nodes + width


@pytest.mark.parametrize("shape", [(1, 4), (3, 2), (2, 5, 3), (2, 1, 3, 2)])
def test_rows_are_taken_within_each_request(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    rows = torch.randint(shape[1], (shape[0], 6), generator=generator)
    taken = take_rows(x, rows)
    assert taken.shape == (shape[0], 6, *shape[2:])
    for b in range(shape[0]):
        for w, row in enumerate(rows[b].tolist()):
            assert torch.equal(taken[b, w], x[b, row])
