"""What a drafter has to say, and what it need not."""

from pathlib import Path

import pytest

from cast_sglang.config import CastConfig
from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.serving.drafting.base import Drafter
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.served_costs import ServedCosts
from tests.support.builders import make_profile
from tests.support.drafts import STEPS, TOPK, FakeModel, OnePass


@pytest.mark.parametrize("missing", ["layers", "layer_costs"])
def test_a_drafter_proposes_layers_and_says_what_they_cost(missing):
    members = {name: getattr(OnePass, name) for name in ("layers", "layer_costs")}
    del members[missing]
    with pytest.raises(TypeError, match=f"abstract method '?{missing}'?"):
        type("Incomplete", (Drafter,), members)()


def test_a_drafter_without_graphs_runs_as_it_is():
    drafter = OnePass(2, [])
    drafter.capture(GraphSizes({1: (1, TOPK)}))
    assert drafter.graphs is None
    other = OnePass(2, [])
    drafter.graphs = object()
    assert other.graphs is None


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
