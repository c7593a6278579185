"""Heads of one pass in the trainer: they see what serving lets them see, and are trained whole."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from draft_trainer import distill, evaluate, export, loop  # noqa: E402
from draft_trainer.draft_model import Draft, init_from_target  # noqa: E402
from draft_trainer.layers import attend_causal, rope_tables  # noqa: E402
from draft_trainer.one_pass import CascadeDraft, ParallelDraft  # noqa: E402
from draft_trainer.rows import RowStore  # noqa: E402
from draft_trainer.target_model import Target  # noqa: E402

from tests.support.small_models import ALL_TOKENS, SMALL, with_opinions  # noqa: E402

LENGTHS = (20, 28, 12)


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    return with_opinions(Target(SMALL))


@pytest.fixture
def store(target, tmp_path) -> RowStore:
    store = RowStore(tmp_path / "rows", SMALL.state_size)
    store.begin_writing()
    generator = torch.Generator().manual_seed(1)
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(64, (1, length), generator=generator)
        with torch.no_grad():
            states = target(tokens).states[0, :-1]
        store.append(f"p:{number}", tokens[0].tolist(), 3 + number, states)
    return store


def cascade(vocabulary=ALL_TOKENS, **settings) -> CascadeDraft:
    torch.manual_seed(1)
    return with_opinions(CascadeDraft(SMALL, vocabulary, **{"num_layers": 3, **settings}))


def parallel(vocabulary=ALL_TOKENS, **settings) -> ParallelDraft:
    torch.manual_seed(1)
    sizes = {"num_layers": 3, "num_steps": 4, **settings}
    head = with_opinions(ParallelDraft(SMALL, vocabulary, **sizes))
    for parameter in (head.mask_embed, head.mask_hidden):
        parameter.data.normal_()
    return head


HEADS = {"cascade": cascade, "parallel": parallel}
each_head = pytest.mark.parametrize("make", HEADS.values(), ids=list(HEADS))


def text_of(target, length=20):
    """Return embeddings and features of a text, as heads take them."""
    tokens = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(2))
    states = target(tokens).states
    return target.model.embed_tokens(tokens)[:, 1:], states[:, :-1, : -SMALL.hidden_size]


@torch.no_grad()
def test_layers_of_a_cascade_draft_at_the_last_committed_slot(target):
    head, (embeds, features) = cascade(), text_of(target)
    bases = torch.tensor([[4, 11]])
    unrolled = list(head.unroll(embeds, features, bases, None, head.num_steps))
    assert len(unrolled) == len(head.layers) == 3
    for column, base in enumerate(bases[0].tolist()):
        # With nothing behind the base in memory.
        states, _ = head.run(embeds[:, : base + 1], features[:, : base + 1])
        for layer, each in zip(states, unrolled, strict=True):
            torch.testing.assert_close(layer[0, -1], each.hidden[0, column], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masked_slots_are_a_line_behind_the_base(target):
    """As served: committed slots, then masked ones, under one causal mask."""
    head, (embeds, features) = parallel(), text_of(target)
    bases = torch.tensor([[4, 11]])
    unrolled = list(head.unroll(embeds, features, bases, None, head.num_steps))
    assert len(unrolled) == 4
    for column, base in enumerate(bases[0].tolist()):
        masked = head.mask_embed.expand(1, 3, -1)
        line = torch.cat([embeds[:, : base + 1], masked], dim=1)
        hidden = head.fuse(features[:, : base + 1])
        hidden = torch.cat([hidden, head.fuse(head.mask_hidden).expand(1, 3, -1)], dim=1)
        rope = rope_tables(torch.arange(line.shape[1]), SMALL)
        for layer in head.layers:
            queries, cache = layer.project(line, hidden, rope)
            hidden = layer.finish(hidden, attend_causal(queries, cache))
        for step, each in enumerate(unrolled):
            expected = hidden[0, base + step]
            torch.testing.assert_close(each.hidden[0, column], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bases_that_are_kept_draft_as_all_do(target):
    head, (embeds, features) = parallel(), text_of(target)
    bases = torch.arange(3, 15)[None]
    every = list(head.unroll(embeds, features, bases, None, 4))
    some = list(head.unroll(embeds, features, bases, None, 4, np.random.default_rng(0)))
    kept = [set(range(12))]
    for whole, part in zip(every[1:], some[1:], strict=True):
        torch.testing.assert_close(whole.hidden[:, part.columns], part.hidden)
        kept.append(set(part.columns.tolist()))
    # A base that drafts a token has drafted all tokens before it.
    assert all(below < above for above, below in zip(kept, kept[1:], strict=False))
    assert [len(each) for each in kept] == [12, 8, 6, 4]


@each_head
@pytest.mark.parametrize("has_norms", [False, True])
def test_training_reaches_every_weight_that_is_not_the_targets(target, store, make, has_norms):
    head = make(ALL_TOKENS[::2], has_norms=has_norms)
    init_from_target(head, target)
    batch = distill.make_batch(store, store.rows, distill.mark_vocabulary(head), head.num_steps)
    results = distill.self_fed_steps(head, target, batch, np.random.default_rng(0))
    results.loss.backward()
    assert results.agreement.shape == (head.num_steps,)
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert name == "lm_head.weight" and parameter.grad is None
            assert torch.equal(parameter, target.lm_head.weight[ALL_TOKENS[::2]])


@each_head
def test_training_brings_a_head_nearer(target, store, tmp_path, make):
    head = make()
    init_from_target(head, target)
    held_out = lambda row: row.name == "p:2"  # noqa: E731
    task = distill.DraftTask(head, target, store, held_out, 64, 8, save=lambda: None)
    before = distill.heldout_steps(head, target, store, store.rows[:2]).loss
    with Progress(disable=True) as bar:
        loop.train(task, tmp_path, minutes=0.05, progress_bar=bar, checkpoint_seconds=60)
    assert distill.heldout_steps(head, target, store, store.rows[:2]).loss < before


@each_head
@pytest.mark.parametrize("has_norms", [False, True])
def test_a_head_is_read_as_it_was_saved(target, tmp_path, make, has_norms):
    head = make(torch.tensor([0, 2, 3, 10, 63]), has_norms=has_norms).bfloat16().float()
    export.save_draft(head, tmp_path)
    again = export.load_draft(tmp_path, SMALL.num_layers)
    assert type(again) is type(head) and again.shape == SMALL
    assert again.num_steps == head.num_steps and again.has_norms == has_norms
    embeds, features = text_of(target)
    bases = torch.tensor([[3, 9]])
    with torch.no_grad():
        pair = (list(x.unroll(embeds, features, bases, None, 3)) for x in (head, again))
        for one, other in zip(*pair, strict=True):
            torch.testing.assert_close(head.logits(one.hidden), again.logits(other.hidden))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["one_pass_depth"] == head.num_steps
    assert config["num_hidden_layers"] == len(head.layers)
    assert config.get("fc_norm", False) == has_norms and not config.get("norm_output", False)


@torch.inference_mode()
@each_head
def test_trees_of_one_pass_are_products_of_layers(target, make):
    head, tree = make(ALL_TOKENS[::2]), evaluate.TreeShape(3, 2, 6)
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(2))
    states = target(tokens).states
    trees = evaluate.draft_trees(target, head, tokens, states[0, :-1], torch.tensor([9]), tree)
    embeds, features = text_of(target)
    layers = [
        head.logits(each.hidden[0, 0]).softmax(-1).topk(2)
        for each in head.unroll(embeds, features, torch.tensor([[9]]), None, 3)
    ]
    expected = [layers[0].values, (layers[0].values[:, None] * layers[1].values).flatten()]
    torch.testing.assert_close(trees.scores[0, :6], torch.cat(expected), rtol=1e-4, atol=1e-6)
    children = head.vocabulary[layers[1].indices].repeat(2)
    assert torch.equal(trees.tokens[0, 2:6], children)


@torch.no_grad()
def test_the_norms_of_eagle_3_1(target, tmp_path):
    """States are normed one by one before they are fused, and handed on behind the last norm."""
    torch.manual_seed(1)
    head = with_opinions(Draft(SMALL, ALL_TOKENS, has_norms=True))
    for norm in (head.norm, *head.fc_norm):
        norm.weight.data.uniform_(0.5, 1.5)
    embeds, features = text_of(target)
    parts = features.split(SMALL.hidden_size, dim=-1)
    normed = [norm(part) for norm, part in zip(head.fc_norm, parts, strict=True)]
    assert torch.equal(head.fuse(features), head.fc(torch.cat(normed, dim=-1)))
    bases, follow = torch.tensor([[7]]), lambda step: embeds[:, 7 + step, None]
    first, second = head.unroll(embeds, features, bases, follow, 2)
    committed = head.extend(embeds[:, :8], features[:, :8])
    mask = torch.ones(1, 8, dtype=torch.bool)
    fed = head.norm(first.hidden[:, 0, None])
    expected = head.step(embeds[:, 8:9], fed, torch.tensor([8]), committed.cache, mask, [])
    torch.testing.assert_close(second.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
    export.save_draft(head, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["fc_norm"] and config["norm_output"]
    assert "one_pass_depth" not in config
    assert export.load_draft(tmp_path, SMALL.num_layers).has_norms


@pytest.mark.parametrize("sizes", [(1, 4), (3, 1)])
def test_a_head_of_one_pass_has_two_layers_and_tokens_or_more(sizes):
    with pytest.raises(ValueError, match="two layers and drafts two tokens"):
        ParallelDraft(SMALL, ALL_TOKENS, False, *sizes)
