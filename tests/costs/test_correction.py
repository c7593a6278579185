"""Online correction of the cost tables, against devices whose true costs are known."""

import math
import random

import numpy as np
import pytest
import torch

from cast_sglang.costs.correction import (
    DEADBAND,
    MAX_SCALE,
    CorrectedCosts,
    Residuals,
)
from cast_sglang.costs.exploration import Exploration
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.costs.noise import MIN_SAMPLES, WINDOW
from cast_sglang.policy.fixed import select_count
from tests.support.builders import make_profile, make_table

LIMITS = Limits(max_batch_size=8, max_context=1024, max_verify_rows=32, max_width=8)


def record(residuals, ratio, *, times=WINDOW * 8, operation="verify", batch_size=4, tokens=8):
    for _ in range(times):
        residuals.record(operation, batch_size, tokens, ratio)
    residuals.refresh()


def scale(residuals, tokens, operation="verify", batch_size=4):
    return float(residuals.scales(operation, batch_size, 32)[tokens - 1])


def test_without_measurements_the_tables_hold():
    residuals = Residuals(LIMITS)
    assert not residuals.refresh()
    assert residuals.scales("verify", 8, 32).tolist() == [1.0] * 32
    assert list(residuals) == [] and residuals.suspects() == []


def test_a_bucket_takes_its_median_ratio():
    residuals = Residuals(LIMITS)
    rng = random.Random(0)
    for _ in range(2000):
        # A tenth of the passes met a disturbance.
        ratio = rng.gauss(1.5, 0.05) * (4 if rng.random() < 0.1 else 1)
        residuals.record("verify", 4, 8, ratio)
    record(residuals, 1.0, tokens=32)
    assert scale(residuals, 7) == scale(residuals, 8) == pytest.approx(1.5, rel=0.05)
    assert scale(residuals, 32) == pytest.approx(1.0)
    # The neighbouring batch sizes have their own evidence.
    assert scale(residuals, 8, batch_size=3) == scale(residuals, 8)
    assert scale(residuals, 8, batch_size=5) == 1.0
    assert scale(residuals, 8, operation="draft") == 1.0


def test_what_was_never_measured_is_a_little_cheaper_than_its_neighbours():
    residuals = Residuals(LIMITS, table_error=0.05)
    assert residuals.scales("verify", 4, 32).tolist() == [1.0] * 32  # nothing was measured
    record(residuals, 1.2, tokens=2)
    record(residuals, 1.0, tokens=8)
    residuals.refresh()
    found = {tokens: scale(residuals, tokens) for tokens in (1, 2, 3, 6, 8, 32)}
    # A lone root is left to the tries of plain decoding.
    assert found == pytest.approx({1: 1.2, 2: 1.2, 3: 1.14, 6: 0.95, 8: 1.0, 32: 0.95}, rel=0.01)
    assert scale(residuals, 3, operation="draft") == 1.0


def test_noise_alone_moves_no_bucket_against_another():
    """Each size taken eight times with 15 % of noise: a right table keeps its shape."""
    ranges = []
    for seed in range(20):
        residuals, rng = Residuals(LIMITS), random.Random(seed)
        for tokens in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            for _ in range(8):
                residuals.record("verify", 4, tokens, 1.2 * math.exp(rng.gauss(0.0, 0.15)))
        residuals.refresh()
        scales = residuals.scales("verify", 4, 32)
        assert 1.0 < float(np.median(scales)) < 1.4
        ranges.append(float(scales.max() / scales.min()))
    assert sum(ranges) / len(ranges) < 1.06
    # And a size that is dear by more than noise is known after as many passes.
    for _ in range(8):
        residuals.record("draft", 4, 4, 1.2 * math.exp(rng.gauss(0.0, 0.15)))
        residuals.record("draft", 4, 8, 2.4 * math.exp(rng.gauss(0.0, 0.15)))
    residuals.refresh()
    draft = residuals.scales("draft", 4, 32)
    assert float(draft[7] / draft[3]) > 1.5


def test_buckets_without_evidence_follow_the_rest():
    residuals = Residuals(LIMITS)
    for tokens in (4, 8, 16):
        record(residuals, 2.0, tokens=tokens)
    assert residuals.scales("verify", 4, 32).tolist() == [2.0] * 32


def test_scales_are_clipped_and_small_changes_ignored():
    residuals = Residuals(LIMITS)
    record(residuals, 100.0)
    assert scale(residuals, 8) == MAX_SCALE
    residuals = Residuals(LIMITS)
    record(residuals, 1 + DEADBAND / 2)
    assert scale(residuals, 8) == 1.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_ratios_are_ignored(bad):
    residuals = Residuals(LIMITS)
    record(residuals, bad)
    assert list(residuals) == []


def test_buckets_without_evidence_follow_the_nearest():
    residuals = Residuals(LIMITS)
    record(residuals, 1.0, tokens=2)
    record(residuals, 0.5, tokens=16)
    assert scale(residuals, 1) == scale(residuals, 3) == 1.0
    assert scale(residuals, 12) == scale(residuals, 32) == 0.5


def test_reset_forgets():
    residuals = Residuals(LIMITS)
    record(residuals, 2.0)
    version = residuals.version
    residuals.reset()
    assert scale(residuals, 8) == 1.0 and residuals.version > version


def test_suspects_need_a_full_window():
    residuals = Residuals(LIMITS)
    record(residuals, 1.5, times=MIN_SAMPLES)
    assert residuals.suspects() == []
    record(residuals, 1.5)
    record(residuals, 0.5, tokens=16)
    record(residuals, 1.2, tokens=32)
    worst, other = residuals.suspects()
    assert (worst.tokens, other.tokens) == ((13, 16), (7, 8))
    assert worst.ratio == 0.5 and worst.batch_sizes == (3, 4)


def test_ranks_that_share_a_state_agree():
    first, second = Residuals(LIMITS), Residuals(LIMITS)
    record(first, 1.7)
    record(second, 0.6)
    for residuals in (first, second):
        residuals.refresh(first.state())
    assert first.scales("verify", 4, 32).tolist() == second.scales("verify", 4, 32).tolist()


class Server:
    """Chooses verify sizes by a table and measures them on a device with noise and drift."""

    def __init__(self, table, truth, seed=0):
        limits = Limits(4, 512, max_verify_rows=32, max_width=8)
        self.model, self.truth = CostModel(table, limits), CostModel(truth, limits)
        self.residuals = Residuals(limits)
        self.exploration = Exploration(self.residuals)
        self.costs = CorrectedCosts(self.model, self.residuals)
        self.rng = random.Random(seed)
        scores = 0.8 ** torch.arange(1.0, 32.0)
        self.utility = torch.cat((torch.zeros(1), scores.cumsum(0)))

    def choose(self, costs):
        return max(2, int(select_count(self.utility, torch.from_numpy(costs.verify), 2.0)))

    def step(self, index):
        costs = self.costs.step_costs(4, 100)
        chosen = self.choose(costs)
        chosen = self.exploration.explore("verify", 4, chosen, range(2, 33), costs.verify)
        table, truth = self.model.step_costs(4, 100), self.truth.step_costs(4, 100)
        predicted = float(table.verify[chosen - 1]) * table.unit_us
        slow = 1.3 if (index // 100) % 2 else 1.0
        measured = float(truth.verify[chosen - 1]) * truth.unit_us * slow
        self.residuals.record("verify", 4, chosen, measured * self.rng.gauss(1, 0.05) / predicted)
        if index % 32 == 0:
            self.residuals.refresh()
        gained = 1 + float(self.utility[chosen - 1])
        return gained, float(truth.verify[chosen - 1])


def smooth_profile(wrong=(1, 0), factor=1.0):
    """One batch size and context, every count measured; those in `wrong` are off by `factor`."""
    counts = tuple(range(1, 33))
    shape = {"batch_sizes": (4,), "contexts": (128,)}
    table = make_table(tile=1, token_counts=counts, **shape)
    for count in range(wrong[0], wrong[1] + 1):
        table.time_us[0][0][count - 1] *= factor
    small = make_table(base_us=50.0, token_counts=(1, 8), **shape)
    return make_profile(target=table, draft=small, draft_extend=small)


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("wrong", [(5, 16), (3, 8), (9, 12), (9, 32)])
def test_a_wrong_table_is_recovered_from(factor, wrong):
    truth, table = smooth_profile(), smooth_profile(wrong, factor)
    server = Server(table, truth)
    best = server.choose(server.truth.step_costs(4, 100))
    right = (1 + float(server.utility[best - 1])) / float(
        server.truth.step_costs(4, 100).verify[best - 1]
    )
    steps = [server.step(index) for index in range(3000)]
    gained, cost = (sum(values) for values in zip(*steps[1000:], strict=True))
    assert gained / cost > 0.95 * right


def corrected(residuals):
    return CorrectedCosts(CostModel(smooth_profile(), LIMITS), residuals)


@pytest.mark.parametrize("mostly_plain", [False, True])
def test_plain_steps_are_compared_with_their_neighbours(mostly_plain):
    """The device's speed wanders by far more than the two kinds differ."""
    residuals, rng = Residuals(LIMITS), random.Random(1)
    for index in range(3000):
        speed = math.exp(0.2 * math.sin(index / 300) + rng.gauss(0.0, 0.05))
        is_plain = (index % 24 == 0) != mostly_plain
        residuals.record_step(4, is_plain, speed * (0.9 if is_plain else 1.0))
        if index % 32 == 0:
            residuals.refresh()
    assert residuals.plain_ratio(4) == pytest.approx(0.9, abs=0.03)
    step = corrected(residuals).step_costs(4, 100)
    assert 1.0 + step.plain_overhead == pytest.approx(
        residuals.plain_ratio(4) * (1.0 + step.overhead)
    )
    # Of other batch sizes nothing is known.
    assert residuals.plain_ratio(8) == 1.0


def test_what_rank_0_saw_of_whole_steps_counts_on_all_ranks():
    first, second = Residuals(LIMITS), Residuals(LIMITS)
    for index in range(3 * MIN_SAMPLES):
        is_plain = index >= 2 * MIN_SAMPLES
        first.record_step(1, is_plain, 1.2 if is_plain else 1.0)
        second.record_step(1, is_plain, 1.0)
    for residuals in (first, second):
        residuals.refresh(first.state())
        assert residuals.plain_ratio(1) == pytest.approx(1.2)
