"""The examples of CONTRIBUTING.md work: a policy and a drafter, each in one file."""

import re
import sys
import types
from pathlib import Path

import torch

from cast_sglang.config import POLICIES
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.build import PolicySettings, build_policy
from cast_sglang.trace.replay import Replay
from cast_sglang.tree import parents_of
from tests.support.drafts import STEPS, TOPK, FakeModel, Widths, decider_of, forward_batch
from tests.support.simulator import LAYERS, TOKENS
from tests.support.traces import Recorder, make_tables

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


def example(name: str) -> str:
    """Return the code block that follows a marker."""
    [code] = re.findall(rf"<!-- example:{name} -->\n```python\n(.*?)```", TEXT, re.DOTALL)
    return code


def test_the_policy_of_the_example_serves_and_is_replayed(monkeypatch):
    entry = eval("{" + example("line") + "}")
    [(name, home)] = entry.items()
    module = types.ModuleType(f"cast_sglang.policy.{home.partition('.')[0]}")
    exec(example("policy"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(POLICIES, name, home)
    settings = PolicySettings(tuple(range(2, TOKENS + 1)), LAYERS, TOKENS, False, c3=1.0)

    def made() -> TreePolicy:
        return build_policy(name, settings)

    tables = make_tables()
    trace = Recorder(made(), tables, batch_size=2).run(40)
    assert len({len(step.widths) for step in trace.steps}) > 1
    assert len({step.num_draft_tokens for step in trace.steps}) > 1
    for step, replayed in zip(trace.steps, Replay(trace, tables, made()), strict=True):
        assert replayed.choice.widths == step.widths == [1] * len(step.widths)
        assert replayed.choice.num_rows == [step.num_draft_tokens] * 2


def test_the_drafter_of_the_example_grows_trees():
    from cast_sglang.serving.drafting.draws import Draws
    from cast_sglang.serving.drafting.grow import Growth, grow_tree
    from cast_sglang.serving.host_reads import HostReads
    from cast_sglang.serving.pass_clock import PassClock
    from cast_sglang.serving.step_room import StepRoom

    names: dict = {}
    exec(example("drafter"), names)
    model, batch = FakeModel(), forward_batch(2, seed=0)
    drafter = names["EchoDrafter"](model)
    growth = Growth(
        model=model,
        drafter=drafter,
        max_layers=STEPS,
        decider=decider_of(Widths([2, 1])),
        calibration=None,
        reads=HostReads("cpu"),
        clock=PassClock("cpu"),
        recorder=None,
        room=StepRoom(STEPS, 1 + TOPK * STEPS, TOPK * STEPS),
        forward_batch=batch,
        draws=Draws("cpu", seed=0, topk=TOPK),
    )
    tree, widths = grow_tree(growth)
    assert widths == (2, 1)
    root = model.to_target_vocab(batch.spec_info.topk_index)
    assert torch.equal(tree.tokens, root.repeat(1, 4))
    for b in range(2):
        expanded = torch.cat([nodes[b] for nodes in tree.expanded]).numpy()
        probs = batch.spec_info.topk_p[b].repeat(4)
        for node, parent in enumerate(parents_of(expanded, TOPK).tolist()):
            above = 1.0 if parent < 0 else tree.scores[b, parent]
            assert tree.scores[b, node] == above * probs[node]
