"""Captured draft layers against eager ones, on a model that depends on all of its inputs.

The device is a fake (`tests.support.graphs`).
"""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.drafting.captured_layers import LayerGraphs
from cast_sglang.serving.drafting.draws import Draws
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.grow import Growth, grow_tree
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.step_room import StepRoom
from tests.support.drafts import STEPS, Chains, Counted, FakeModel, Plans, forward_batch, grow
from tests.support.graphs import RecordedGraphs


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def drafter(model):
    return EagleDrafter(model, STEPS)


def captured(drafter, model, tiers):
    graphs = LayerGraphs(model, STEPS, GraphSizes(tiers))
    backend = RecordedGraphs()
    graphs.capture(backend)
    drafter.graphs = graphs
    return backend


ALL = {1: (1, 2, 3), 4: (1, 2, 3)}


def test_the_largest_graphs_are_captured_first(drafter, model):
    backend = captured(drafter, model, {1: (3,), 4: (1, 3)})
    assert backend.log == [
        ("capture", 4, "width 3"),
        ("capture", 4, "width 1"),
        ("capture", 1, "width 3"),
    ]


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_captured_layers_are_the_eager_ones(drafter, model, batch, is_calibrated):
    """Steps of any depth and width one after another, so that what a step leaves is overwritten."""
    calibration = Calibration() if is_calibrated else None
    if calibration is not None:
        calibration.begin_step(torch.ones(batch, dtype=torch.int32))
    cases = [([3, 1, 2, 3], 0), ([], 1), ([1], 2), ([2, 2], 3), ([3, 3, 3, 3], 4)]

    def run(widths, seed):
        return grow(drafter, model, widths, batch, seed, calibration)

    eager = [run(widths, seed) for widths, seed in cases]
    backend = captured(drafter, model, ALL)
    # A larger batch before, whose rows must not be read again.
    grow(drafter, model, [3, 3, 3], 4, seed=9)
    backend.log.clear()
    for (widths, seed), expected in zip(cases, eager, strict=True):
        ours = run(widths, seed)
        assert ours[0] == expected[0] == tuple(widths)
        for part, theirs in zip((*ours[1], *ours[2]), (*expected[1], *expected[2]), strict=True):
            assert torch.equal(part, theirs)
        for part, theirs in zip(ours[3], expected[3], strict=True):
            assert torch.equal(part[0], theirs[0]) and torch.equal(part[1], theirs[1])
    bucket = 1 if batch == 1 else 4
    replayed = [("replay", bucket, f"width {width}") for widths, _ in cases for width in widths]
    assert backend.log == replayed


def test_a_width_without_a_graph_runs_as_the_next_wider(drafter, model):
    wide = grow(drafter, model, [3, 2, 3], 2, seed=5)
    backend = captured(drafter, model, {4: (2, 3)})
    backend.log.clear()
    ours = grow(drafter, model, [3, 1, 3], 2, seed=5)
    assert ours[0] == (3, 2, 3)
    assert torch.equal(ours[2].draft_tokens, wide[2].draft_tokens)
    assert [entry[2] for entry in backend.log] == ["width 3", "width 2", "width 3"]


def test_a_batch_beyond_the_captured_ones_runs_eagerly(drafter, model):
    expected = grow(drafter, model, [2, 3], 4, seed=6)
    backend = captured(drafter, model, {1: (3,), 2: (3,)})
    backend.log.clear()
    ours = grow(drafter, model, [2, 3], 4, seed=6)
    assert backend.log == [] and torch.equal(ours[2].draft_tokens, expected[2].draft_tokens)
    grow(drafter, model, [2, 3], 2, seed=6)
    assert len(backend.log) == 2


class Launches(TorchDispatchMode):
    """Counts the ops inside that take no view of what is there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def chain(model, drafter, layers, batch=3):
    """Grow a planned chain; returns its tokens and scores, what was read, and what was launched."""
    decider, reads = Decider(Plans(layers), max_missing=8, topk=1, plans_chains=True), Counted()
    decider.begin_step(StepFacts(batch, None, None, 0, STEPS, 12))
    prepared = forward_batch(batch, seed=layers)
    children = prepared.spec_info
    children.topk_p, children.topk_index = children.topk_p[:, :1], children.topk_index[:, :1]
    growth = Growth(
        model=model,
        drafter=drafter,
        max_layers=STEPS,
        decider=decider,
        calibration=None,
        reads=reads,
        clock=PassClock("cpu"),
        recorder=None,
        room=StepRoom(STEPS, 1 + STEPS, STEPS),
        forward_batch=prepared,
        draws=Draws("cpu", seed=0, topk=1),
    )
    with Launches() as launches:
        tree, widths = grow_tree(growth)
    assert widths == (1,) * (layers - 1)
    return (tree.tokens, tree.scores), reads.log, launches.count


def test_a_planned_chain_replays_one_graph_as_often_as_it_is_long():
    """Whatever its length, none of its passes is launched kernel by kernel or waited for."""
    model = Chains()
    drafter, lengths = EagleDrafter(model, STEPS), range(1, STEPS + 1)
    eager = [chain(model, drafter, layers)[0] for layers in lengths]
    backend = captured(drafter, model, {1: (1,), 4: (1,)})
    assert [entry[0] for entry in backend.log] == ["capture", "capture"]  # one for each batch size
    backend.replay, launched = hidden(backend.replay), []
    for layers, expected in zip(lengths, eager, strict=True):
        backend.log.clear()
        grown, read, launches = chain(model, drafter, layers)
        assert all(torch.equal(*pair) for pair in zip(grown, expected, strict=True))
        assert backend.log == [("replay", 4, "width 1")] * (layers - 1)
        # The roots' children, which decide how long it gets, and once what the passes have said.
        assert read == ["waited for", "read"][: 1 + (layers > 1)]
        launched.append(launches)
    # Each further pass launches as much as the one before, beside its graph.
    assert len({more - fewer for fewer, more in pairwise(launched[1:])}) == 1


def hidden(replay):
    """Hide from the host what a graph launches."""

    def replay_alone(*args):
        with _disable_current_modes():
            return replay(*args)

    return replay_alone
