"""Which graphs verify and draft extend get, and which of them a step runs with."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.serving.launch.graph_plan import choose_sizes, plan_graphs
from tests.support.builders import make_profile

TOPK, TOKENS, EXTEND = 4, 16, 6
LIMITS = Limits(8, 256, TOKENS, TOPK, max_extend_rows=EXTEND)


def chosen(batch_sizes, cost_model=None, **settings):
    sizes = settings.get("verify_sizes") or tuple(range(2, TOKENS + 1))
    return choose_sizes(batch_sizes, LIMITS, CastConfig(**settings), sizes, cost_model)


def model_of(profile):
    limits = Limits(8, 256, max_verify_rows=TOKENS, max_width=TOPK, max_extend_rows=EXTEND)
    return CostModel(profile, limits)


def test_before_a_profile_the_sizes_that_it_measures_are_captured():
    plan = chosen([1, 8])
    assert plan.verify.at(1) == plan.verify.at(8) == (2, 3, 4, 5, 6, 8, 9, 12, 16)
    assert plan.widths.at(8) == (1, 2, 3, 4)
    # An accepted path is no longer than the tree is deep, nor than its nodes.
    assert plan.extend.at(1) == (2, 3, 4, 5, 6)


def test_a_profile_leaves_the_sizes_that_pay_and_those_of_small_trees():
    model = model_of(make_profile())
    plan = chosen([1, 4, 8], model)
    for batch in (1, 4, 8):
        costs = model.step_costs(batch, 1)
        verify, widths = costs.verify.tolist(), costs.draft.tolist()
        for size in range(2, TOKENS + 1):
            cheapest = min(verify[m - 1] for m in plan.verify.at(batch) if m >= size)
            assert cheapest <= 1.02 * verify[size - 1]
        for width in range(1, TOPK + 1):
            assert min(widths[w - 1] for w in plan.widths.at(batch) if w >= width) <= (
                1.02 * widths[width - 1]
            )
        assert {TOPK + 1, 2 * TOPK + 1, TOKENS} <= set(plan.verify.at(batch))
        rows = {min(EXTEND, size) for size in plan.verify.at(batch)}
        assert set(plan.extend.at(batch)) == rows


def test_sizes_that_are_asked_for_are_all_captured():
    plan = chosen([1], model_of(make_profile()), verify_sizes=(2, 3, 7))
    assert plan.verify.sizes == (2, 3, 7)


def test_the_fixed_tree_has_one_size():
    plan = chosen([1, 2], policy="eagle")
    assert plan.verify.sizes == (TOKENS,) and plan.widths.sizes == (TOPK,)
    assert plan.extend.sizes == (EXTEND,)


def test_nothing_is_planned_where_sglang_captured_nothing():
    assert plan_graphs(None, LIMITS, CastConfig(), (2, 3), None) is None


@pytest.mark.parametrize("kind", ["flat", "steep", "too steep"])
def test_the_set_follows_the_costs(kind):
    added = {"flat": 0.0, "steep": 0.1, "too steep": 0.6}[kind]
    rows = 1.0 + added * np.arange(TOKENS)
    model = SimpleNamespace(
        step_costs=lambda batch, context: SimpleNamespace(
            verify=rows, draft=rows[:TOPK], plain_overhead=0.0
        )
    )
    plan = chosen([1, 8], model)
    if kind == "flat":
        assert plan.verify.at(1) == (TOPK + 1, 2 * TOPK + 1, TOKENS)
        assert plan.widths.at(1) == (TOPK,)
        return
    assert plan.widths.at(1) == (1, 2, 3, 4)
    every = tuple(range(2, TOKENS + 1))
    if kind == "steep":
        assert plan.verify.at(1) == every
    else:  # the ninth node is accepted with a chance of 5 / 9 at most
        assert plan.verify.at(1) == every[: every.index(9) + 1]
        # The largest size has the buffers that the others are captured in.
        assert plan.verify.at(8) == (*plan.verify.at(1), TOKENS)
        # Other policies promise a shape.
        assert chosen([1, 8], model, policy="fixed").verify.at(1) == every
        # Copies may be accepted as far as there are rows.
        deep = dataclasses.replace(LIMITS, max_extend_rows=TOKENS)
        assert choose_sizes([1], deep, CastConfig(), every, model).verify.at(1) == every
