"""`auto` on machines whose tables are wrong as real ones are, against the best fixed tree."""

import numpy as np
import pytest

from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.auto import AutoPolicy
from tests.support.machines import MACHINES, Machine, Served, serve
from tests.support.simulator import LAYERS, SIZES, Text

pytestmark = pytest.mark.slow

STEPS = 800
# Requests that are easy and hard to draft side by side, where trees of one size suit nobody.
BIMODAL = np.array([-2.0, 2.5])


def served(machine: str, batch_size: int) -> Served:
    ease = np.tile(BIMODAL, batch_size // 2) if batch_size > 1 else 1.0
    policy, text = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True), Text(batch_size, 3, ease)
    return serve(policy, Machine(machine), text, batch_size, STEPS, Acceptance())


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_a_wrong_table_costs_little_from_the_start(batch_size):
    """Bounds hold for each machine, and closer ones for all of them together."""
    rates, plain = [], []
    for machine in MACHINES:
        run = served(machine, batch_size)
        rates.append([run.rate(0, 100), run.rate(100, 400), run.rate(400)])
        plain.append(run.result.rate(400) / run.plain)
    least, mean = np.min(rates, axis=0), np.exp(np.log(rates).mean(axis=0))
    assert (least > [0.85, 0.93, 0.93]).all(), rates
    assert (mean > [0.93, 0.98, 0.985]).all(), rates
    assert min(plain) > 0.96, plain


@pytest.mark.parametrize("batch_size", [1, 8])
def test_text_that_becomes_hard_and_easy_again_is_followed(batch_size):
    """The first 100 steps of a phase, and the rest of it, against the tree that is best for them.

    That tree is another one in each phase, and known in hindsight only.
    """
    rates, whole = [], []
    for machine in ("amd-170m", "gpu-64", "gpu-tiles"):
        text = Text(batch_size, 3, lambda step: -1.0 if 300 <= step < 600 else 2.0)
        policy = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True)
        run = serve(policy, Machine(machine), text, batch_size, 900, Acceptance())
        phases = (300, 400), (400, 600), (600, 700), (700, 900)
        rates.append([run.rate_against_own(*phase) for phase in phases])
        whole.append(run.rate())
    # Over three seeds of text and machine the least were 0.81 and, in the mean of the machines,
    # 0.86; of all steps together against one tree for all 0.94 in the mean.
    assert np.min(rates) > 0.77, rates
    assert (np.mean(rates, axis=0) > 0.83).all(), rates
    assert np.mean(whole) > 0.9, whole


def test_a_right_table_without_noise_is_served_as_well_as_it_can_be():
    policy, text = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True), Text(8, 3, 1.0)
    run = serve(policy, Machine("gpu-64", seed=None), text, 8, STEPS, Acceptance())
    assert run.rate(0, 100) > 0.95 and run.rate(400) > 0.99
    # But for the turns of plain decoding, which lose 0.2 % of the time.
    assert run.result.is_plain.sum() <= 12


def test_a_time_that_the_table_hides_is_found_by_turns():
    """At batch 8 trees of 4 rows take half of what the quick table says of them."""
    late = []
    for seed in (0, 1):
        policy, text = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True), Text(8, 3 + seed, 2.0)
        run = serve(policy, Machine("amx-quick", seed), text, 8, 400, Acceptance())
        late.append(run.rate(100))
    assert min(late) > 0.95, late


@pytest.mark.parametrize(("machine", "ease"), [("amd-gaps", -1.0), ("gpu-gaps", -2.5)])
def test_drafting_that_is_slow_between_its_passes_is_seen(machine, ease):
    """By what the passes take, drafting would pay."""
    batch_size = 8 if machine == "amd-gaps" else 32
    policy, text = AutoPolicy(SIZES, LAYERS, extends_by_accepted=True), Text(batch_size, 3, ease)
    run = serve(policy, Machine(machine), text, batch_size, 1000, Acceptance())
    assert run.result.rate(500) > 0.96 * run.plain
