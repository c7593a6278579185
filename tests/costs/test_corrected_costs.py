"""Costs of a step with the corrections that serving learned, and what is chosen by them."""

import math
import random

import numpy as np
import pytest

from cast_sglang.costs.correction import MAX_OVERLAP, REFRESH_EVERY, CorrectedCosts, Residuals
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, cost_of, plain_units, step_units
from cast_sglang.costs.passes import NAMES
from cast_sglang.policy.select_count import select_count
from tests.support.builders import make_profile, make_table
from tests.support.passes import LIMITS, noisy, scale, serve


def told(ratio=1.0, rest=(0.0, 0.0, 0.0)):
    """Return residuals that know this ratio of all passes, and this rest of all steps."""
    residuals = Residuals(LIMITS)
    means, rests = (part.copy() for part in residuals.values())
    means[: len(NAMES)] = math.log(ratio)
    rests[:] = rest
    residuals.refresh((means, rests))
    return residuals


def smooth_profile(wrong=(1, 0), factor=1.0, overhead_us=None):
    """One batch size and context, every count measured; those in `wrong` are off by `factor`."""
    counts = tuple(range(1, 33))
    shape = {"batch_sizes": (4,), "contexts": (128,)}
    table = make_table(tile=1, token_counts=counts, **shape)
    for count in range(wrong[0], wrong[1] + 1):
        table.time_us[0][0][count - 1] *= factor
    small = make_table(base_us=50.0, token_counts=(1, 8), **shape)
    return make_profile(target=table, draft=small, draft_extend=small, step_overhead_us=overhead_us)


def corrected(residuals, **options):
    """Return the costs of the table, and those corrected."""
    model = CostModel(smooth_profile(**options), LIMITS)
    return model.step_costs(4, 100), CorrectedCosts(model, residuals).step_costs(4, 100)


def test_the_unit_is_the_corrected_time_of_verifying_one_row():
    residuals = Residuals(LIMITS)
    serve(residuals, random.Random(0), 50, lambda name, tokens: 1.5 if tokens == 8 else 0.9)
    raw, costs = corrected(residuals)
    assert costs.verify[0] == 1.0
    assert costs.unit_us == pytest.approx(raw.unit_us * scale(residuals, 1))
    for name in NAMES:
        table, found = getattr(raw, name), getattr(costs, name)
        scaled = table * residuals.scales(name, 4, len(table))
        np.testing.assert_allclose(found * costs.unit_us, scaled * raw.unit_us, rtol=1e-5)
        assert found.dtype == np.float32


def test_what_scales_all_passes_alike_moves_no_price():
    raw, costs = corrected(told(ratio=1.5))
    assert costs.unit_us == pytest.approx(1.5 * raw.unit_us)
    for name in NAMES:
        np.testing.assert_allclose(getattr(costs, name), getattr(raw, name), rtol=1e-5)
    assert costs.overhead == costs.plain_overhead == 0.0


def test_the_rest_of_a_step_of_its_layers_and_of_drafting_is_part_of_the_costs():
    raw, costs = corrected(told(ratio=1.25, rest=(0.2, 0.01, 0.3)), overhead_us=[80.0])
    assert raw.overhead > 0.0
    # The first layer comes out of draft extend; a plain step has none.
    assert costs.plain_overhead == pytest.approx((raw.overhead + 0.2) / 1.25)
    assert costs.overhead == pytest.approx((raw.overhead + 0.2 + 0.01 + 0.3) / 1.25)
    np.testing.assert_allclose(costs.draft, raw.draft + 0.01 / 1.25, rtol=1e-5)
    np.testing.assert_allclose(costs.draft_extend, raw.draft_extend, rtol=1e-5)
    # So a step with three layers is longer by all of these.
    passes = cost_of(raw.verify, 8) + 2 * cost_of(raw.draft, 4) + cost_of(raw.draft_extend, 3)
    whole = 1.25 * step_units(costs, (4, 4), 8, 3)
    assert whole == pytest.approx(1.25 * passes + raw.overhead + 0.5 + 3 * 0.01, rel=1e-5)
    assert 1.25 * plain_units(costs) == pytest.approx(1.25 + raw.overhead + 0.2, rel=1e-5)


def test_no_time_becomes_negative():
    """Steps that seem to take no time, as where a clock is wrong."""
    residuals = Residuals(LIMITS)
    for step in range(3000):
        expected = plain_units(corrected(residuals)[1])
        residuals.record_step(4, step % 4, 0.01, expected)
        if step % REFRESH_EVERY == 0:
            residuals.refresh()
    raw, costs = corrected(residuals)
    step, layer, drafted = residuals.rest(4)
    assert step == -MAX_OVERLAP <= drafted < 0.0 and 0.0 <= layer < 0.01
    assert plain_units(costs) == 1.0 - MAX_OVERLAP and costs.draft.min() >= raw.draft.min()


def test_costs_are_kept_until_the_corrections_change():
    residuals = Residuals(LIMITS)
    costs = CorrectedCosts(CostModel(smooth_profile(), LIMITS), residuals)
    first = costs.step_costs(4, 100)
    assert costs.step_costs(4, 120) is first  # of the same bucket of contexts
    assert costs.step_costs(3, 100) is not first
    residuals.record("verify", 4, 8, 2.0)
    assert costs.step_costs(4, 100) is first
    residuals.refresh()
    second = costs.step_costs(4, 100)
    assert second.verify[7] > first.verify[7]
    residuals.reset()
    assert costs.step_costs(4, 100).verify.tolist() == first.verify.tolist()


def test_what_is_impossible_to_look_up_is_an_error():
    costs = CorrectedCosts(CostModel(smooth_profile(), LIMITS), Residuals(LIMITS))
    with pytest.raises(ValueError, match="batch size"):
        costs.step_costs(9, 100)


class Server:
    """Chooses verify sizes by a table and measures them on a device with noise and drift."""

    def __init__(self, table, truth, seed=0):
        limits = Limits(4, 512, max_verify_rows=32, max_width=8)
        self.model, self.truth = CostModel(table, limits), CostModel(truth, limits)
        self.residuals = Residuals(limits)
        self.costs = CorrectedCosts(self.model, self.residuals)
        self.rng = random.Random(seed)
        self.scores = 0.8 ** np.arange(1, 32, dtype=np.float32)
        self.utility = self.scores.cumsum()

    def choose(self, costs):
        return 1 + select_count(self.scores[None], costs.verify[1:], 2.0)[0]

    def step(self, index):
        chosen = self.choose(self.costs.step_costs(4, 100))
        table, truth = self.model.step_costs(4, 100), self.truth.step_costs(4, 100)
        predicted = float(table.verify[chosen - 1]) * table.unit_us
        slow = 1.3 if (index // 100) % 2 else 1.0
        measured = slow * float(truth.verify[chosen - 1]) * truth.unit_us
        # The draft's table is right.
        for name in ("draft", "draft", "draft_extend"):
            self.residuals.record(name, 4, 4, slow * noisy(self.rng, 0.05))
        self.residuals.record("verify", 4, chosen, measured / predicted * noisy(self.rng, 0.05))
        if index % REFRESH_EVERY == 0:
            self.residuals.refresh()
        gained = 1 + float(self.utility[chosen - 2])
        return gained, float(truth.verify[chosen - 1])


@pytest.mark.parametrize("wrong", [(5, 16), (3, 8), (9, 12), (9, 32)])
def test_sizes_that_a_table_has_too_cheap_are_left(wrong):
    truth, table = smooth_profile(), smooth_profile(wrong, 0.5)
    server = Server(table, truth)
    costs = server.truth.step_costs(4, 100)
    best = server.choose(costs)
    right = (1 + float(server.utility[best - 2])) / float(costs.verify[best - 1])
    steps = [server.step(index) for index in range(1500)]
    gained, cost = (sum(values) for values in zip(*steps[500:], strict=True))
    assert gained / cost > 0.95 * right
