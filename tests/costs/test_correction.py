"""Online correction of the cost tables, against devices whose true costs are known."""

import math
import random

import numpy as np
import pytest
import torch

from cast_sglang.costs.correction import (
    HORIZON,
    MAX_SCALE,
    REFRESH_EVERY,
    REPORT_AFTER,
    CorrectedCosts,
    Residuals,
)
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, cost_of, plain_units, step_units
from cast_sglang.costs.passes import NAMES
from cast_sglang.policy.fixed import select_count
from tests.support.builders import make_profile, make_table

LIMITS = Limits(max_batch_size=8, max_context=1024, max_verify_rows=32, max_width=8)
SIZES = (2, 4, 8, 16, 32)


def scale(residuals, tokens, operation="verify", batch_size=4):
    return float(residuals.scales(operation, batch_size, 32)[tokens - 1])


def spread(residuals, sizes=SIZES):
    """Return how far sizes of one pass are scaled apart, at most."""
    scales = [scale(residuals, size) for size in sizes]
    return max(scales) / min(scales)


def record(residuals, ratio, *, times=200, operation="verify", batch_size=4, tokens=8):
    for _ in range(times):
        residuals.record(operation, batch_size, tokens, ratio)
    residuals.refresh()


def serve(residuals, rng, steps, ratio_of, *, sizes=SIZES, noise=0.15):
    """Run steps of two draft layers, a verify pass over one of the sizes and draft extend.

    Args:
        ratio_of: true ratio of a pass, of its name and number of tokens.
    """
    for step in range(steps):
        passes = ("draft", 4), ("draft", 4), ("verify", rng.choice(sizes)), ("draft_extend", 4)
        for name, tokens in passes:
            residuals.record(name, 4, tokens, ratio_of(name, tokens) * noisy(rng, noise))
        if step % REFRESH_EVERY == 0:
            residuals.refresh()
    residuals.refresh()


def noisy(rng, noise):
    return math.exp(rng.gauss(0.0, noise))


def as_the_table(name, tokens):
    return 1.0


def told(ratio=1.0, rest=(0.0, 0.0)):
    """Return residuals that know this ratio of all passes, and this rest of all steps."""
    residuals = Residuals(LIMITS)
    means, rests = (part.copy() for part in residuals.state())
    means[: len(NAMES)] = math.log(ratio)
    rests[:] = rest
    residuals.refresh((means, rests))
    return residuals


def test_without_measurements_the_tables_hold():
    residuals = Residuals(LIMITS)
    residuals.refresh()
    for name in NAMES:
        assert residuals.scales(name, 8, 32).tolist() == [1.0] * 32
    assert residuals.rest(4) == (0.0, 0.0)
    assert list(residuals) == [] and residuals.suspects() == []


def test_measurements_count_from_the_next_refresh():
    residuals = Residuals(LIMITS)
    version = residuals.version
    residuals.record("verify", 4, 8, 1.5)
    residuals.record_step(4, 3, 2.0, 1.0)
    assert scale(residuals, 8) == 1.0 and residuals.rest(4) == (0.0, 0.0)
    assert residuals.version == version
    residuals.refresh()
    assert scale(residuals, 8) > 1.0 and residuals.rest(4)[0] > 0.0
    assert residuals.version > version


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_a_pass_that_is_off_everywhere_is_known_from_one_of_its_sizes(factor):
    def ratio_of(name, tokens):
        return factor if name == "verify" else 1.0

    residuals = Residuals(LIMITS)
    serve(residuals, random.Random(0), 60, ratio_of, sizes=(8,))
    found = math.log(scale(residuals, 8)) / math.log(factor)
    assert 0.8 < found < 1.2
    # What was never measured takes more than half of it, and other passes hardly any.
    for tokens, batch_size in ((1, 1), (2, 4), (32, 8)):
        others = math.log(scale(residuals, tokens, batch_size=batch_size)) / math.log(factor)
        assert 0.5 < others < found
    for name in ("draft", "draft_extend"):
        assert 0.87 < scale(residuals, 4, operation=name) < 1.15


def test_a_size_that_was_not_measured_follows_its_bucket_then_its_octave_then_its_pass():
    residuals = Residuals(LIMITS)
    record(residuals, 2.0, times=5, tokens=8)
    same, bucket, octave, of_pass = (
        scale(residuals, 8),
        scale(residuals, 7),
        scale(residuals, 16),
        scale(residuals, 8, batch_size=8),
    )
    assert same > 1.01 * bucket > 1.01**2 * octave > 1.01**3 * of_pass > 1.01**4
    # Tokens 7-8 and requests 3-4 share a bucket.
    assert scale(residuals, 6) == scale(residuals, 9) == octave
    assert scale(residuals, 8, batch_size=3) == same
    assert scale(residuals, 8, batch_size=2) == scale(residuals, 1, batch_size=1) == of_pass
    assert scale(residuals, 8, operation="draft") == 1.0


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("settled", [0, 200])
def test_a_size_that_departs_is_known_after_twenty_passes(settled, factor):
    """One size costs twice the table, or half, from the start or after long; noise is 15 %."""

    def ratio_of(name, tokens):
        return factor if (name, tokens) == ("verify", 8) else 1.0

    found = []
    for seed in range(8):
        residuals, rng = Residuals(LIMITS), random.Random(seed)
        serve(residuals, rng, settled, as_the_table)
        serve(residuals, rng, 20 * len(SIZES), ratio_of)
        others = [math.log(scale(residuals, size)) for size in SIZES if size != 8]
        apart = math.log(scale(residuals, 8)) - np.mean(others)
        found.append(apart / math.log(factor))
        assert np.abs(others).max() < 0.25
    # The first measurements weigh more than those after thousands of passes.
    assert np.mean(found) > (0.6 if settled else 0.85) and min(found) > 0.35
    assert max(found) < 1.2


def test_noise_alone_moves_no_size_against_another():
    ranges = []
    for seed in range(10):
        residuals = Residuals(LIMITS)
        serve(residuals, random.Random(seed), 200, lambda name, tokens: 1.2)
        assert 1.0 < scale(residuals, 8) < 1.4
        ranges.append(spread(residuals))
    assert np.mean(ranges) < 1.1 and max(ranges) < 1.2


def test_the_speed_of_the_moment_ends_in_no_table():
    """All passes take 1.3 times as long for 300 passes, in which other sizes are taken."""
    during, after = [], []
    for seed in range(10):
        residuals, rng = Residuals(LIMITS), random.Random(seed)
        serve(residuals, rng, 75, as_the_table, sizes=(2, 4))
        serve(residuals, rng, 75, lambda name, tokens: 1.3, sizes=(8, 16))
        during.append(scale(residuals, 8) / scale(residuals, 4))
        serve(residuals, rng, 75, as_the_table, sizes=(2, 4))
        after.append(scale(residuals, 8) / scale(residuals, 4))
        assert 0.87 < scale(residuals, 4) < 1.15
    # If all of it was put down to the sizes, these would be 1.3.
    assert 0.95 < np.mean(during) < 1.1
    assert 0.95 < np.mean(after) < 1.1
    assert max(during + after) < 1.2


def test_a_single_disturbance_does_little():
    residuals = Residuals(LIMITS)
    serve(residuals, random.Random(0), 100, as_the_table)
    before = residuals.scales("verify", 4, 32)
    record(residuals, 100.0, times=1)
    assert (residuals.scales("verify", 4, 32) / before).max() < 1.15
    # Nor does it as the first of all measurements.
    residuals = Residuals(LIMITS)
    record(residuals, 100.0, times=1)
    assert scale(residuals, 8) < MAX_SCALE
    serve(residuals, random.Random(0), 100, as_the_table)
    assert spread(residuals) < 1.2


def test_scales_are_clipped():
    residuals = Residuals(LIMITS)
    record(residuals, 100.0, times=1000)
    assert scale(residuals, 8) == MAX_SCALE
    residuals.reset()
    record(residuals, 0.01, times=1000)
    assert scale(residuals, 8) == 1.0 / MAX_SCALE


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_are_ignored(bad):
    residuals = Residuals(LIMITS)
    record(residuals, bad)
    residuals.record_step(4, 3, bad, 1.0)
    residuals.record_step(4, 3, 1.0, bad)
    residuals.refresh()
    assert list(residuals) == []
    assert residuals.scales("verify", 4, 32).tolist() == [1.0] * 32
    assert residuals.rest(4) == (0.0, 0.0)
    # Nor do they make what follows count for less.
    clean = Residuals(LIMITS)
    for each in (residuals, clean):
        each.refresh()
        record(each, 1.5, times=3)
    assert scale(residuals, 8) == scale(clean, 8)


def test_reset_forgets():
    residuals, fresh = Residuals(LIMITS), Residuals(LIMITS)
    record(residuals, 2.0)
    residuals.record_step(4, 3, 2.0, 1.0)
    residuals.refresh()
    version = residuals.version
    residuals.reset()
    assert residuals.version > version
    assert scale(residuals, 8) == 1.0 and residuals.rest(4) == (0.0, 0.0)
    assert list(residuals) == []
    # What comes next counts as at first.
    for each in (residuals, fresh):
        record(each, 1.5, times=3)
        each.record_step(4, 3, 2.0, 1.0)
        each.refresh()
    assert scale(residuals, 8) == scale(fresh, 8)
    assert residuals.rest(4) == fresh.rest(4)


def test_what_was_not_measured_for_long_is_uncertain_again():
    def moved(residuals):
        """Return how far some slow passes move the scale."""
        before = scale(residuals, 8)
        record(residuals, 1.6, times=4)
        return math.log(scale(residuals, 8) / before)

    at_first = moved(Residuals(LIMITS))
    waited = {}
    for refreshes in (0, HORIZON // REFRESH_EVERY // 8, HORIZON // REFRESH_EVERY):
        residuals = Residuals(LIMITS)
        serve(residuals, random.Random(0), 200, as_the_table)
        for _ in range(refreshes):
            residuals.refresh()
        waited[refreshes] = moved(residuals) / at_first
    right_away, soon, late = waited.values()
    assert right_away < 0.5
    assert right_away < soon < late
    assert late == pytest.approx(1.0, abs=0.15)


def test_no_part_becomes_less_certain_than_at_first():
    waited, fresh = Residuals(LIMITS), Residuals(LIMITS)
    for _ in range(10 * HORIZON // REFRESH_EVERY):
        waited.refresh()
    for residuals in (waited, fresh):
        record(residuals, 1.6, times=4)
    assert scale(waited, 8) == scale(fresh, 8)


def test_ranks_that_share_a_state_agree():
    first, second = Residuals(LIMITS), Residuals(LIMITS)
    for rank, ratio in ((first, 1.7), (second, 0.6)):
        record(rank, ratio)
        for layers in (0, 3) * 20:
            rank.record_step(4, layers, ratio * (1.0 + 0.1 * layers), 1.0)
    assert scale(first, 8) != scale(second, 8)
    for rank in (first, second):
        rank.refresh(first.state())
    for name in NAMES:
        scales = first.scales(name, 4, 32)
        assert scales.tolist() == second.scales(name, 4, 32).tolist()
    assert first.rest(4) == second.rest(4) != (0.0, 0.0)
    assert scale(first, 8) > 1.3
    # What a rank learns afterwards on its own moves nothing that the others know.
    record_only = scale(second, 8)
    first.record("verify", 4, 8, 3.0)
    first.record_step(4, 3, 9.0, 1.0)
    assert scale(first, 8) == scale(second, 8) == record_only
    assert first.rest(4) == second.rest(4)


class Steps:
    """A device whose speed wanders, and whose steps take more than their passes."""

    def __init__(self, seed, step, layer, layers=(0, 2, 3, 5, 8)):
        self.residuals, self.rng = Residuals(LIMITS), random.Random(seed)
        self.step, self.layer, self.layers = step, layer, layers
        self.index = 0

    def run(self, steps):
        for _ in range(steps):
            self._run_one()
            if self.index % REFRESH_EVERY == 0:
                self.residuals.refresh()
        return self.residuals.rest(4)

    def _run_one(self):
        self.index += 1
        rng, layers = self.rng, self.rng.choice(self.layers)
        speed = math.exp(0.2 * math.sin(self.index / 100))
        step, layer = self.residuals.rest(4)
        # As the table has it, a verify pass takes 1 and a draft layer 0.1; both are right.
        verify = scale(self.residuals, 8)
        draft = 0.1 * scale(self.residuals, 4, operation="draft")
        expected = verify + step + (draft + layer) * layers
        self.residuals.record("verify", 4, 8, speed * noisy(rng, 0.1))
        for _ in range(layers):
            self.residuals.record("draft", 4, 4, speed * noisy(rng, 0.1))
        true = 1.0 + self.step + (0.1 + self.layer) * layers
        self.residuals.record_step(4, layers, speed * true * noisy(rng, 0.1), expected)


@pytest.mark.parametrize("step, layer", [(0.3, 0.0), (0.0, 0.03), (0.3, 0.03), (-0.1, 0.02)])
def test_a_time_of_every_step_and_one_of_every_layer_are_told_apart(step, layer):
    found = []
    for seed in range(5):
        device = Steps(seed, step, layer)
        found.append(device.run(600))
        assert device.residuals.rest(8) == (0.0, 0.0)  # other octaves know nothing
        assert device.residuals.rest(3) == found[-1]
    away = np.array(found) - (step, layer)
    assert (np.abs(away.mean(axis=0)) < (0.03, 0.007)).all()
    assert (np.abs(away).max(axis=0) < (0.06, 0.02)).all()


def test_the_rest_follows_when_it_changes():
    device = Steps(0, 0.3, 0.0)
    device.run(1000)
    device.step = 0.0
    assert device.run(1000)[0] == pytest.approx(0.0, abs=0.12)


def test_a_single_disturbed_step_does_little():
    device = Steps(0, 0.3, 0.02)
    step, layer = device.run(400)
    device.residuals.record_step(4, 3, 1000.0, 1.7)
    device.residuals.refresh()
    assert device.residuals.rest(4)[0] == pytest.approx(step, abs=0.05)
    assert device.residuals.rest(4)[1] == pytest.approx(layer, abs=0.01)


def test_measured_buckets_are_listed():
    residuals = Residuals(Limits(6, 1024, max_verify_rows=20, max_width=8))
    for batch_size, tokens, times in ((3, 7, 3), (4, 8, 2), (6, 19, 4), (1, 1, 1)):
        record(residuals, 1.5, times=times, batch_size=batch_size, tokens=tokens)
    record(residuals, 0.8, times=6, operation="draft", batch_size=2, tokens=6)
    residuals.record("draft_extend", 9, 40, 1.0)  # beyond the limits: in the last bucket
    residuals.refresh()
    rows = [(row.operation, row.batch_sizes, row.tokens, row.samples) for row in residuals]
    assert rows == [
        ("verify", (1, 1), (1, 1), 1),
        ("verify", (3, 4), (7, 8), 5),
        ("verify", (5, 6), (17, 20), 4),
        ("draft", (2, 2), (5, 6), 6),
        ("draft_extend", (5, 6), (17, 20), 1),
    ]
    for row in residuals:
        scales = residuals.scales(row.operation, row.batch_sizes[0], 20)
        first, last = row.tokens
        assert row.ratio == pytest.approx(np.exp(np.log(scales[first - 1 : last]).mean()))


def test_a_bucket_that_is_far_off_is_a_suspect_after_enough_passes():
    residuals = Residuals(LIMITS)
    ratios = {"draft": 1.6, "verify": 0.4, "draft_extend": 1.1}
    for _ in range(REPORT_AFTER):
        assert residuals.suspects() == []
        for name, ratio in ratios.items():
            residuals.record(name, 4, 8, ratio)
    worst, other = residuals.suspects()
    assert (worst.operation, other.operation) == ("verify", "draft")
    assert worst.tokens == other.tokens == (7, 8) and worst.batch_sizes == (3, 4)
    assert worst.ratio == pytest.approx(0.4, rel=0.2)
    assert other.ratio == pytest.approx(1.6, rel=0.2)


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


def test_the_rest_of_a_step_and_of_its_layers_is_part_of_the_costs():
    raw, costs = corrected(told(ratio=1.25, rest=(0.2, 0.01)), overhead_us=[80.0])
    assert raw.overhead > 0.0
    # The first layer comes out of draft extend; a plain step has none.
    assert costs.plain_overhead == pytest.approx((raw.overhead + 0.2) / 1.25)
    assert costs.overhead == pytest.approx((raw.overhead + 0.2 + 0.01) / 1.25)
    np.testing.assert_allclose(costs.draft, raw.draft + 0.01 / 1.25, rtol=1e-5)
    np.testing.assert_allclose(costs.draft_extend, raw.draft_extend, rtol=1e-5)
    # So a step with three layers is longer by one step and three layers.
    passes = cost_of(raw.verify, 8) + 2 * cost_of(raw.draft, 4) + cost_of(raw.draft_extend, 3)
    whole = 1.25 * step_units(costs, (4, 4), 8, 3)
    assert whole == pytest.approx(1.25 * passes + raw.overhead + 0.2 + 3 * 0.01, rel=1e-5)
    assert 1.25 * plain_units(costs) == pytest.approx(1.25 + raw.overhead + 0.2, rel=1e-5)


def test_no_time_becomes_negative():
    raw, costs = corrected(told(rest=(-5.0, -5.0)), overhead_us=[80.0])
    assert costs.overhead == costs.plain_overhead == 0.0
    assert 0.0 < costs.draft.min() == pytest.approx(raw.draft.min() / 2)


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
        scores = 0.8 ** torch.arange(1.0, 32.0)
        self.utility = torch.cat((torch.zeros(1), scores.cumsum(0)))

    def choose(self, costs):
        return max(2, int(select_count(self.utility, torch.from_numpy(costs.verify), 2.0)))

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
        gained = 1 + float(self.utility[chosen - 1])
        return gained, float(truth.verify[chosen - 1])


@pytest.mark.parametrize("wrong", [(5, 16), (3, 8), (9, 12), (9, 32)])
def test_sizes_that_a_table_has_too_cheap_are_left(wrong):
    truth, table = smooth_profile(), smooth_profile(wrong, 0.5)
    server = Server(table, truth)
    costs = server.truth.step_costs(4, 100)
    best = server.choose(costs)
    right = (1 + float(server.utility[best - 1])) / float(costs.verify[best - 1])
    steps = [server.step(index) for index in range(1500)]
    gained, cost = (sum(values) for values in zip(*steps[500:], strict=True))
    assert gained / cost > 0.95 * right
