"""Growing a tree: what is asked in which order, and where it ends."""

import pytest
import torch

from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.drafting.draws import Draws
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.grow import Growth, compile_ops, grow_tree
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.step_room import StepRoom
from tests.support.drafts import (
    STEPS,
    TOPK,
    Counted,
    FakeModel,
    OnePass,
    Plans,
    Widths,
    decider_of,
    forward_batch,
    grow,
)


def growth(drafter, policy, max_layers=STEPS, recorder=None, batch=2, **changes):
    own = Growth(
        model=FakeModel(),
        drafter=drafter,
        max_layers=STEPS,
        decider=decider_of(policy, max_layers, batch),
        calibration=None,
        reads=HostReads("cpu"),
        clock=PassClock("cpu"),
        recorder=recorder,
        room=StepRoom(max_layers, 1 + TOPK * STEPS, TOPK * STEPS),
        forward_batch=forward_batch(batch, 0),
        draws=Draws("cpu", seed=0, topk=TOPK),
    )
    return own._replace(**changes)


def test_a_drafter_is_asked_layer_by_layer():
    log = []
    tree, widths = grow_tree(growth(OnePass(2, log), Widths([3, 1])))
    assert widths == (3, 1) and tree.num_layers == 3
    layer = ["prepare", "run 3", "prepare", "run 1"]
    # The layer that is decided against has been prepared meanwhile.
    assert log == ["layers", *layer, "prepare"]


@pytest.mark.parametrize("max_layers", [1, 2, STEPS])
def test_a_tree_ends_where_there_is_no_more_room(max_layers):
    policy = Widths([2] * (STEPS - 1))
    tree, widths = grow_tree(growth(OnePass(2, []), policy, max_layers))
    assert widths == (2,) * (max_layers - 1) and tree.num_layers == max_layers
    assert len(policy.seen) == max_layers - 1


def test_a_recorder_gets_each_layer_once():
    layers = []

    class Recorder:
        def on_layer(self, depth, probs, chances):
            layers.append((depth, probs.shape, chances.shape))

    grow_tree(growth(OnePass(2, []), Widths([3, 1]), recorder=Recorder()))
    root, wide, narrow = (2, TOPK), (6, TOPK), (2, TOPK)
    assert layers == [(1, root, root), (2, wide, wide), (3, narrow, narrow)]


def test_tokens_are_the_targets():
    model = FakeModel()
    _, _, selection, _ = grow(EagleDrafter(model, STEPS), model, [2, 1], 2, seed=3)
    assert (selection.draft_tokens >= 100).all()


def test_ops_can_be_compiled_before_the_first_request():
    sizes = (2, 5, 12)
    model, draws = FakeModel(), Draws("cpu", seed=0, topk=TOPK)
    model.num_proposed = TOPK + 2
    compile_ops(model, Calibration(), draws, max_layers=STEPS, max_rows=12, verify_sizes=sizes)


class Chain(OnePass):
    """Proposes one child of each node."""

    def run(self, frontier, width):
        probs, tokens = super().run(frontier, width)
        return probs[:, :1], tokens[:, :1]


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_nothing_is_waited_for_between_the_layers_of_a_planned_chain(layers):
    """But for the roots' children, which decide how long it gets."""
    log, reads, policy = [], Counted(), Plans(layers)
    decider = Decider(policy, max_missing=8, topk=1, plans_chains=True)
    decider.begin_step(StepFacts(2, None, None, 0, STEPS, 12))
    ours = growth(
        Chain(2, log), policy, decider=decider, reads=reads, draws=Draws("cpu", seed=0, topk=1)
    )
    tree, widths = grow_tree(ours)
    assert widths == (1,) * (layers - 1) and tree.num_layers == layers
    # Nor is a layer prepared that is not run.
    assert log == ["layers", *(["prepare", "run 1"] * (layers - 1) or ["prepare"])]
    assert reads.log == ["waited for", "read"][: 1 + (layers > 1)] and policy.seen == []
    decider.rows(tree.ranked(3).scores)
    assert reads.log == ["waited for"] * len(reads.log)
    # The policy then knows what it would have seen of each layer.
    seen = policy.seen
    looked = Widths([1] * (layers - 1))
    grow_tree(growth(Chain(2, []), looked, draws=Draws("cpu", seed=0, topk=1)))
    for ours, theirs in zip(seen, looked.seen, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
