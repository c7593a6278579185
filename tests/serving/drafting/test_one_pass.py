"""Drafters of one pass: where their children come from, and what a tree is made of."""

from types import SimpleNamespace

import pytest
import torch

from cast_sglang.serving.drafting import one_pass as module
from cast_sglang.serving.drafting.one_pass import (
    CascadeDrafter,
    ParallelDrafter,
    ProductLayers,
    one_pass_drafter,
)
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.tree import parents_of
from tests.support.drafts import HIDDEN, STEPS, TOPK, FakeModel, forward_batch, grow

BATCH, VOCAB = 2, 11


class HeadModel(FakeModel):
    """A draft model of one pass, whose logits are its states."""

    def __init__(self, num_layers=STEPS):
        super().__init__()
        layers = SimpleNamespace(layers=[None] * num_layers)
        self.runner.model = SimpleNamespace(model=layers, later_logits=self.later_logits)
        self.runner.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(one_pass_depth=num_layers)
        )
        self.num_layers = num_layers

    def later_logits(self, states):
        return states.view(len(states), self.num_layers - 1, HIDDEN)

    def best_children(self, logits):
        best = logits.softmax(-1).topk(TOPK)
        return best.values, best.indices


def extended(model, seed=0):
    """Return a drafter, and a draft input behind draft extend."""
    drafter, batch = CascadeDrafter(model), forward_batch(BATCH, seed)
    states = torch.randn(BATCH, (model.num_layers - 1) * HIDDEN)
    batch.spec_info.hidden_states = states
    root = batch.spec_info.topk_p.clone(), batch.spec_info.topk_index.clone()
    drafter.extended(batch.spec_info)
    return drafter, batch, root, states


def test_a_cascade_holds_the_children_of_all_layers():
    model = HeadModel()
    drafter, batch, root, states = extended(model)
    held = batch.spec_info
    assert drafter.layers_held == STEPS
    assert held.topk_p.shape == held.topk_index.shape == (BATCH, STEPS * TOPK)
    # What SGLang keeps of states has the shape that it expects.
    assert torch.equal(held.hidden_states, states[:, :HIDDEN])
    for part, expected in zip(drafter.root(held), root, strict=True):
        assert torch.equal(part, expected) and part.is_contiguous()
    layers = drafter.layers(batch)
    for layer in range(STEPS - 1):
        probs, tokens = layers.run(None, 2)
        best = states.view(BATCH, STEPS - 1, HIDDEN)[:, layer].softmax(-1).topk(TOPK)
        assert torch.equal(probs, best.values.repeat_interleave(2, dim=0))
        expected = model.to_target_vocab(best.indices).repeat_interleave(2, dim=0)
        assert torch.equal(tokens, expected)


def test_a_tree_is_the_product_of_the_layers(monkeypatch):
    from tests.support import drafts

    model = HeadModel()
    drafter, batch, root, states = extended(model)
    monkeypatch.setattr(drafts, "forward_batch", lambda size, seed: batch)
    widths, ranked, selection, _ = grow(drafter, model, [2, 3], BATCH, 0)
    assert widths == (2, 3)
    by_layer = [root[0], *states.view(BATCH, STEPS - 1, HIDDEN).softmax(-1).topk(TOPK)[0].unbind(1)]
    for b in range(BATCH):
        scores = by_layer[0][b]
        below = scores.topk(TOPK).values[:2, None] * by_layer[1][b]
        deepest = below.flatten().topk(3).values[:, None] * by_layer[2][b]
        every = torch.cat([scores, below.flatten(), deepest.flatten()])
        torch.testing.assert_close(ranked.scores[b], every.sort(descending=True).values)
    assert selection.draft_tokens.shape == (BATCH, 6 * TOPK)
    assert parents_of(torch.tensor([0]).numpy(), TOPK).tolist() == [-1] * TOPK + [0] * TOPK


def test_layers_hand_out_copies():
    """The tree keeps what it gets, and layers of one width share one table."""
    probs = torch.rand(BATCH, 2, TOPK)
    layers = ProductLayers(probs, torch.zeros(BATCH, 2, TOPK, dtype=torch.int64))
    first, _ = layers.run(None, 1)
    first.zero_()
    assert probs[:, 0].any()


@pytest.fixture
def masked(monkeypatch):
    """Stand in for SGLang's preparation of a pass; collect what it is given."""
    calls = []

    def prepare(spec_info, batch, tokens, width, runner, graphs, **rest):
        assert graphs is None
        calls.append(SimpleNamespace(spec_info=spec_info, batch=batch, tokens=tokens, width=width))
        batch.spec_info, batch.input_ids = spec_info, tokens  # as SGLang does
        return calls[-1]

    monkeypatch.setattr(module, "prepare_for_draft_extend", prepare)
    return calls


def parallel():
    model = HeadModel()
    del model.runner.model.later_logits
    table = torch.arange(9 * 40).view(9, 40).int()
    model.runner.req_to_token_pool = SimpleNamespace(req_to_token=table)

    def forward(prepared):
        rows = len(prepared.tokens)
        logits = torch.arange(rows * VOCAB, dtype=torch.float32).view(rows, VOCAB).sin()
        output = SimpleNamespace(next_token_logits=logits)
        return SimpleNamespace(logits_output=output)

    model.runner.forward = forward
    return ParallelDrafter(model), model, table


def decode_batch():
    return SimpleNamespace(
        reqs=[object()] * BATCH,
        req_pool_indices=torch.tensor([3, 5]),
        seq_lens=torch.tensor([10, 20]),
        spec_info="the draft input",
        out_cache_loc="its slots",
    )


def test_masked_slots_lie_behind_the_committed_ones(masked):
    drafter, model, table = parallel()
    batch = decode_batch()
    drafter.begin(batch, PassClock("cpu"), 4)
    [seen] = masked
    assert seen.width == 3 and seen.spec_info.is_masked
    assert seen.spec_info.num_tokens_per_req == 3
    assert seen.spec_info.num_accept_tokens.tolist() == [3, 3]
    assert seen.batch.out_cache_loc.tolist() == [*table[3, 10:13], *table[5, 20:23]]
    # The batch itself is as it was: its step has just begun.
    assert (batch.spec_info, batch.out_cache_loc) == ("the draft input", "its slots")
    layers = drafter.layers(forward_batch(BATCH, 0))
    logits = torch.arange(6 * VOCAB, dtype=torch.float32).view(2, 3, VOCAB).sin()
    for layer in range(3):
        best = logits[:, layer].softmax(-1).topk(TOPK)
        probs, tokens = layers.run(None, 1)
        torch.testing.assert_close(probs, best.values)
        assert torch.equal(tokens, model.to_target_vocab(best.indices))


def test_a_tree_of_one_layer_needs_no_masked_slot(masked):
    drafter, _, _ = parallel()
    drafter.begin(decode_batch(), PassClock("cpu"), 4)
    drafter.begin(decode_batch(), PassClock("cpu"), 1)
    assert len(masked) == 1
    drafter.layers(forward_batch(BATCH, 0))  # which is not asked for a layer


def test_the_head_says_how_it_drafts():
    assert isinstance(one_pass_drafter(HeadModel()), CascadeDrafter)
    model = HeadModel()
    del model.runner.model.later_logits
    assert isinstance(one_pass_drafter(model), ParallelDrafter)
    model.runner.model_config.hf_config = SimpleNamespace()
    assert one_pass_drafter(model) is None


def test_costs_stay_as_they_were_measured():
    for drafter in (CascadeDrafter(HeadModel()), parallel()[0]):
        assert drafter.takes_one_pass
        assert drafter.layer_costs("costs") == "costs"
