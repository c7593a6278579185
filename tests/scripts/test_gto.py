"""Tuning for served trees: what the target says of them, groups, and the clipped surrogate."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from draft_trainer import gto, loop  # noqa: E402
from draft_trainer.draft_model import Draft, init_from_target  # noqa: E402
from draft_trainer.evaluate import TreeShape  # noqa: E402
from draft_trainer.gto_trees import Chooser, Load, Trees, judge  # noqa: E402
from draft_trainer.one_pass import CascadeDraft, ParallelDraft  # noqa: E402

from tests.scripts.test_one_pass_heads import store, target  # noqa: E402
from tests.support.profiles import write_profile  # noqa: E402
from tests.support.small_models import ALL_TOKENS, SMALL, with_opinions  # noqa: E402

__all__ = ["store", "target"]  # fixtures

ENVELOPE = TreeShape(num_steps=3, topk=3, num_draft_tokens=8)


@pytest.fixture
def load(tmp_path) -> Load:
    return Load(write_profile(tmp_path / "made-up.json"), 4, 64)


def heads():
    torch.manual_seed(1)
    return [
        with_opinions(Draft(SMALL, ALL_TOKENS)),
        with_opinions(CascadeDraft(SMALL, ALL_TOKENS, False, 3)),
        with_opinions(ParallelDraft(SMALL, ALL_TOKENS, False, 2, 4)),
    ]


each_head = pytest.mark.parametrize("which", [0, 1, 2], ids=["eagle3", "cascade", "parallel"])


def settings_of(load, **changes) -> gto.GtoSettings:
    sizes = {"envelope": ENVELOPE, "group_size": 4, "num_groups": 2}
    return gto.GtoSettings(load, **{**sizes, **changes})


def task_of(target, store, head, settings, batch_tokens=64) -> gto.GtoTask:
    held_out = lambda row: row.name == "p:2"  # noqa: E731
    data = target, store, held_out, batch_tokens, 8
    reference = copy.deepcopy(head)
    return gto.GtoTask(head, reference, *data, save=lambda: None, settings=settings)


@each_head
def test_nodes_are_judged_as_texts_of_their_own(target, store, load, which):
    """The target's probability of each node is that of a pass over its whole path as text."""
    head, text = heads()[which], gto.Text(target, store, store.rows[1])
    bases = text.bases[4:8]
    trees = Chooser(load, ENVELOPE).choose(head, target, text.embeds, text.features, bases)
    tokens = list(store.rows[1].tokens)
    with torch.no_grad():
        roots = target(torch.tensor([tokens])).states[0, bases + 1]  # those on disk are rounded
        judged = judge(target, text.committed, roots, bases, trees)
    for i, base in enumerate(bases.tolist()):
        paths = {0: tokens[: base + 2]}
        chances = {0: 1.0}
        expected = 0.0
        nodes = zip(trees.tokens[i].tolist(), trees.parent_rows[i].tolist(), strict=True)
        for row, (token, parent) in enumerate(nodes, 1):
            if parent < 0:
                continue
            with torch.no_grad():
                states = target(torch.tensor([paths[parent]])).states
                prob = target.logits(states)[0, -1].softmax(-1)[token].item()
            paths[row], chances[row] = [*paths[parent], token], chances[parent] * prob
            expected += chances[row]
        assert judged.rewards[i].expected == pytest.approx(expected, rel=1e-3)
        # The accepted path: the target's likeliest token, as long as the tree has it.
        at, path = tokens[: base + 2], []
        while True:
            with torch.no_grad():
                best = int(target.logits(target(torch.tensor([at])).states)[0, -1].argmax())
            if [*at, best] not in paths.values():
                break
            at, path = [*at, best], [*path, best]
        assert judged.paths[i, : judged.path_lens[i]].tolist() == path


def test_a_tree_without_some_rows_is_judged_by_those_it_has(target, store):
    text = gto.Text(target, store, store.rows[0])
    bases = text.bases[:1]
    whole = Trees(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 1]]), [1])
    cut = Trees(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, -1]]), [1])
    with torch.no_grad():
        judged = [
            judge(target, text.committed, text.states[bases + 1], bases, trees)
            for trees in (whole, cut)
        ]
    assert whole.num_rows.tolist() == [4] and cut.num_rows.tolist() == [3]
    assert judged[1].rewards[0].expected < judged[0].rewards[0].expected


@each_head
def test_dearer_rows_make_smaller_trees(target, store, tmp_path, which):
    text = gto.Text(target, store, store.rows[1])
    bases, head, sizes = text.bases[4:12], heads()[which], []
    for row_us in (10.0, 20_000.0):
        load = Load(write_profile(tmp_path / f"{row_us}.json", row_us), 4, 64)
        chooser = Chooser(load, ENVELOPE)
        for _ in range(20):
            trees = chooser.choose(head, target, text.embeds, text.features, bases)
            with torch.no_grad():
                judged = judge(target, text.committed, text.states[bases + 1], bases, trees)
            chooser.learn(trees, judged)
        sizes.append(float(trees.num_rows.float().mean()))
    assert sizes[1] < sizes[0]


def test_groups_are_neighbours_and_share_no_prefix():
    bases = torch.arange(10, 49)
    for seed in range(20):
        groups = gto.draw_groups(bases, 8, 3, np.random.default_rng(seed))
        assert len(groups) == 3
        for group in groups:
            assert group.diff().tolist() == [1] * 7
        every = torch.cat(groups)
        assert len(every.unique()) == len(every) and every.min() >= 10 and every.max() <= 48
    assert gto.draw_groups(bases[:5], 8, 3, np.random.default_rng(0)) == []


def test_advantages_are_within_their_group():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 10.0]])
    found = gto.advantages(rewards)
    assert found[0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], rel=1e-4)
    assert found[1].tolist() == [0.0, 0.0, 0.0]


def test_ratios_are_clipped_where_they_have_gone_far_enough():
    log_ratios = torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0], requires_grad=True)
    advantage = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0])
    value = gto.surrogate(log_ratios, advantage)
    e = float(torch.tensor(1.0).exp())
    assert value.item() == pytest.approx((2.0 + 1.2 + 1 / e - e - 0.8) / 5)
    value.backward()
    # What has gone far enough the right way is left alone; what went wrong is brought back.
    assert [bool(slope) for slope in log_ratios.grad] == [True, False, True, True, False]


@torch.no_grad()
def test_a_path_is_fed_token_by_token(target, store):
    head, text = heads()[0], gto.Text(target, store, store.rows[1])
    bases = torch.tensor([6, 9])
    paths, lens = torch.tensor([[3, 4, 5], [7, 0, 0]]), torch.tensor([3, 1])
    found = gto.path_log_probs(head, target, text, bases, paths, lens)
    for i, (base, length) in enumerate(zip(bases.tolist(), lens.tolist(), strict=True)):
        output = head.extend(text.embeds[:, : base + 1], text.features[:, : base + 1])
        hidden, chain, total = output.hidden[:, -1:], [], 0.0
        mask = torch.ones(1, base + 1, dtype=torch.bool)
        for step, token in enumerate(paths[i, :length]):
            total += head.logits(hidden)[0, 0].log_softmax(-1)[token].item()
            fed = target.model.embed_tokens(token.view(1, 1))
            at = torch.tensor([base + 1 + step])
            result = head.step(fed, hidden, at, output.cache, mask, chain)
            hidden = result.hidden
            chain.append(result.cache)
        assert found[i].item() == pytest.approx(total / length, rel=1e-3)


@each_head
def test_a_head_that_is_its_reference_gains_nothing(target, store, load, which):
    task = task_of(target, store, heads()[which], settings_of(load))
    assert task.gain(store.rows[1], np.random.default_rng(0)).item() == pytest.approx(0, abs=1e-5)


@each_head
def test_the_gradient_makes_paths_of_better_trees_likelier(target, store, load, which):
    head = heads()[which]
    init_from_target(head, target)
    large = {"envelope": TreeShape(3, 8, 24), "num_groups": 5, "debias": False}
    for seed in range(30):  # until something of an untrained head is accepted
        task = task_of(target, store, head, settings_of(load, **large))
        gain = task.gain(store.rows[1], np.random.default_rng(seed))
        if gain.requires_grad:
            break
    assert gain.item() == pytest.approx(0, abs=1e-3)  # all ratios are 1
    gain.backward()
    slope = sum(float(p.grad.square().sum()) for p in head.parameters() if p.grad is not None)
    assert slope > 0
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.grad is not None:
                parameter += 1e-3 / slope**0.5 * parameter.grad
    again = task_of(target, store, head, settings_of(load, **large))
    again._reference = task._reference
    again.model.zero_grad()
    # The same trees: the policy of this task has learned nothing yet either.
    assert again.gain(store.rows[1], np.random.default_rng(seed)).item() > 0


@each_head
@pytest.mark.parametrize("reward", gto.REWARDS)
def test_tuning_runs_and_reports_what_trees_bring(target, store, load, tmp_path, which, reward):
    head = heads()[which]
    init_from_target(head, target)
    before = [parameter.clone() for parameter in head.parameters()]
    task = task_of(target, store, head, settings_of(load, reward=reward))
    with Progress(disable=True) as bar:
        loop.train(task, tmp_path, minutes=0.01, progress_bar=bar, checkpoint_seconds=60)
    assert any((a != b).any() for a, b in zip(before, head.parameters(), strict=True))
    assert all(p.isfinite().all() for p in head.parameters())
    values = task.evaluate()
    assert 0 <= values["tree_accepted"] <= ENVELOPE.num_draft_tokens - 1
    assert (tmp_path / "gto.pt").exists() and (tmp_path / "gto_loss.csv").exists()


@each_head
def test_served_trees_are_judged_text_by_text(target, store, load, which):
    head, settings = heads()[which], settings_of(load)
    init_from_target(head, target)
    found = gto.served_trees(head, target, store, store.rows[:2], settings)
    assert len(found) == 2 and any(trees.expected > 0 for trees in found)
    for trees in found:
        assert 0 <= trees.greedy <= ENVELOPE.num_steps
        assert 1 < trees.num_rows <= ENVELOPE.num_draft_tokens
    # Of one text they are those of a chooser that has seen nothing else.
    [alone] = gto.served_trees(head, target, store, store.rows[:1], settings)
    assert alone == found[0]


def test_without_a_reward_the_loss_is_the_ordinary_one(target, store, load):
    head = heads()[0]
    losses = [
        task_of(target, store, head, settings_of(load, reward=reward)).batch(0, 0.0).loss
        for reward in ("none", "smooth")
    ]
    ordinary = task_of(target, store, head, settings_of(load))
    expected = super(gto.GtoTask, ordinary).batch(0, 0.0).loss
    assert torch.equal(losses[0], expected) and losses[1].isfinite()


def test_trees_of_a_head_are_no_deeper_than_it_drafts(target, store, load):
    deep = gto.GtoSettings(load, TreeShape(num_steps=4, topk=3, num_draft_tokens=8))
    with pytest.raises(ValueError, match="3 layers at most"):
        task_of(target, store, heads()[1], deep)
