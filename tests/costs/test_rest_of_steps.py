"""What serving learns of steps outside of their passes, on devices whose true times are known."""

import math
import random

import numpy as np
import pytest

from cast_sglang.costs.correction import HORIZON, REFRESH_EVERY, Residuals
from tests.support.passes import LIMITS, noisy, scale


class Steps:
    """A device whose speed wanders, and whose steps take more than their passes."""

    def __init__(self, seed, step, layer, drafted=0.0, layers=(0, 2, 3, 5, 8)):
        self.residuals, self.rng = Residuals(LIMITS), random.Random(seed)
        self.step, self.layer, self.drafted, self.layers = step, layer, drafted, layers
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
        step, layer, drafted = self.residuals.rest(4)
        # As the table has it, a verify pass takes 1 and a draft layer 0.1; both are right.
        verify = scale(self.residuals, 8)
        draft = 0.1 * scale(self.residuals, 4, operation="draft")
        expected = verify + step + (draft + layer) * layers + drafted * (layers > 0)
        self.residuals.record("verify", 4, 8, speed * noisy(rng, 0.1))
        for _ in range(layers):
            self.residuals.record("draft", 4, 4, speed * noisy(rng, 0.1))
            self.residuals.record("draft_extend", 4, 4, speed * noisy(rng, 0.1))
        true = 1.0 + self.step + (0.1 + self.layer) * layers + self.drafted * (layers > 0)
        self.residuals.record_step(4, layers, speed * true * noisy(rng, 0.1), expected)


@pytest.mark.parametrize(
    "rest",
    [(0.3, 0.0, 0.0), (0.0, 0.03, 0.0), (0.3, 0.03, 0.0), (-0.1, 0.02, 0.0), (0.1, 0.0, 0.2)],
)
def test_times_of_every_step_of_every_layer_and_of_drafting_are_told_apart(rest):
    found = []
    for seed in range(5):
        device = Steps(seed, *rest)
        found.append(device.run(600))
        assert device.residuals.rest(8) == (0.0, 0.0, 0.0)  # other octaves know nothing
        assert device.residuals.rest(3) == found[-1]
    away = np.array(found) - rest
    assert (np.abs(away.mean(axis=0)) < (0.03, 0.007, 0.04)).all()
    assert (np.abs(away).max(axis=0) < (0.06, 0.02, 0.1)).all()


def test_a_few_plain_steps_tell_that_drafting_is_slow_by_itself():
    """Every 32nd step is plain; the others all have as many layers."""
    layers = [3] * 31 + [0]
    found = []
    for seed in range(5):
        device = Steps(seed, 0.0, 0.0, 0.25)
        device.rng.choice = lambda _, device=device: layers[device.index % 32]
        found.append(device.run(320))
    plain, layer, drafted = np.mean(found, axis=0)
    assert abs(plain) < 0.06 and plain + 3 * layer + drafted == pytest.approx(0.25, abs=0.05)


def test_the_rest_follows_when_it_changes():
    device = Steps(0, 0.3, 0.0)
    device.run(1000)
    device.step = 0.0
    assert device.run(1000)[0] == pytest.approx(0.0, abs=0.12)


def test_a_single_disturbed_step_does_little():
    device = Steps(0, 0.3, 0.02)
    step, layer, drafted = device.run(400)
    device.residuals.record_step(4, 3, 1000.0, 1.7)
    device.residuals.refresh()
    assert device.residuals.rest(4)[0] == pytest.approx(step, abs=0.05)
    assert device.residuals.rest(4)[1] == pytest.approx(layer, abs=0.01)
    assert device.residuals.rest(4)[2] == pytest.approx(drafted, abs=0.05)


def test_after_many_steps_of_equal_layers_another_step_counts_no_more_than_at_first():
    residuals, fresh = Residuals(LIMITS), Residuals(LIMITS)
    for _ in range(4 * HORIZON):
        residuals.record_step(4, 4, 1.5, 1.5)
    for each in (residuals, fresh):
        each.record_step(4, 0, 1.3, 1.0)
        each.refresh()
    assert 0.0 < residuals.rest(4)[0] < fresh.rest(4)[0]
    assert abs(residuals.rest(4)[1]) < 0.005


def test_what_is_learned_between_two_refreshes_is_not_learned_twice():
    residuals = Residuals(LIMITS)
    for _ in range(500):
        residuals.record_step(4, 3, 1.3, 1.0)
    residuals.refresh()
    step, layer, drafted = residuals.rest(4)
    assert step + 3 * layer + drafted == pytest.approx(0.3, abs=0.03)
