"""Growing a tree: what is asked in which order, where it ends, and a drafter in one file."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.drafting.base import Drafter
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.grow import Growth, compile_ops, grow_tree
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.served_costs import ServedCosts
from cast_sglang.serving.step_room import StepRoom
from tests.support.builders import make_profile
from tests.support.drafts import STEPS, TOPK, FakeModel, Widths, decider_of, forward_batch, grow


def growth(drafter, policy, max_layers=STEPS, recorder=None, batch=2):
    return Growth(
        model=FakeModel(),
        drafter=drafter,
        max_layers=STEPS,
        decider=decider_of(policy, max_layers, batch),
        calibration=None,
        reads=HostReads("cpu"),
        clock=PassClock("cpu"),
        recorder=recorder,
        room=StepRoom(max_layers, 1 + TOPK * STEPS),
        forward_batch=forward_batch(batch, 0),
    )


class OnePass(Drafter):
    """Proposes all layers in one pass: the whole of a new drafter."""

    def __init__(self, batch, log):
        generator = torch.Generator().manual_seed(0)
        self.probs = torch.rand(STEPS, batch, TOPK, generator=generator).sort(-1, True).values
        self.log = log

    def layers(self, forward_batch):
        self.depth = 1
        self.log.append("layers")
        return self

    def layer_costs(self, costs):
        return costs._replace(
            overhead=costs.overhead + float(costs.draft[0]),
            draft=np.full_like(costs.draft, 1e-3),
        )

    def prepare(self, frontier):
        self.log.append("prepare")

    def run(self, frontier, width):
        self.log.append(f"run {width}")
        probs = self.probs[self.depth].repeat_interleave(width, dim=0)
        self.depth += 1
        return probs, torch.zeros(probs.shape, dtype=torch.int64)


def test_a_drafter_is_asked_layer_by_layer():
    log = []
    tree, widths = grow_tree(growth(OnePass(2, log), Widths([3, 1])))
    assert widths == (3, 1) and tree.num_layers == 3
    layer = ["prepare", "run 3", "prepare", "run 1"]
    # The layer that is decided against has been prepared meanwhile.
    assert log == ["layers", *layer, "prepare"]


def test_decisions_go_by_what_the_drafter_says_that_layers_cost():
    limits = Limits(max_batch_size=8, max_context=256, max_verify_rows=12, max_width=TOPK)
    costs = ServedCosts(CastConfig(), PassClock("cpu"), None)
    costs.use(FoundProfile(make_profile(), Path("some.json"), []), limits)
    costs.look_up(2, 100.0, OnePass(2, []).layer_costs)
    measured = costs.model.step_costs(2, 100.0)
    for used in (costs.table, costs.current):
        assert (used.draft < measured.draft).all()
        assert used.overhead > measured.overhead
    # Where each layer is a pass, they are the measured ones, and the same object.
    eagle = EagleDrafter(FakeModel(), STEPS)
    assert eagle.layer_costs(measured) is measured


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
    compile_ops(FakeModel(), Calibration(), max_layers=STEPS, max_rows=12, verify_sizes=sizes)
