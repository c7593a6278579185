"""What serving learns of steps outside of their passes, on devices whose true times are known."""

import math
import random

import numpy as np
import pytest

from cast_sglang.costs.correction import HORIZON, REFRESH_EVERY, Residuals
from tests.support.passes import LIMITS, noisy, scale


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


def test_after_many_steps_of_equal_layers_another_step_counts_no_more_than_at_first():
    residuals, fresh = Residuals(LIMITS), Residuals(LIMITS)
    for _ in range(4 * HORIZON):
        residuals.record_step(4, 4, 1.5, 1.5)
    for each in (residuals, fresh):
        each.record_step(4, 0, 1.3, 1.0)
        each.refresh()
    assert 0.0 < residuals.rest(4)[0] < 0.5 * fresh.rest(4)[0]
    assert abs(residuals.rest(4)[1]) < 0.005


def test_what_is_learned_between_two_refreshes_is_not_learned_twice():
    residuals = Residuals(LIMITS)
    for _ in range(500):
        residuals.record_step(4, 3, 1.3, 1.0)
    residuals.refresh()
    step, layer = residuals.rest(4)
    assert step + 3 * layer == pytest.approx(0.3, abs=0.03)
