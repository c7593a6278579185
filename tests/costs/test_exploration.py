"""Which sizes are tried although the policy chose others, how often, and what that may lose."""

import math

import numpy as np
import pytest

from cast_sglang.costs.correction import Residuals
from cast_sglang.costs.exploration import (
    EXPLORE_EVERY,
    EXPLORE_SHARE,
    REVISIT_EVERY,
    REVISIT_SHARE,
    Exploration,
)
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.noise import WINDOW

LIMITS = Limits(max_batch_size=8, max_context=1024, max_verify_rows=32, max_width=8)
FLAT = np.ones(32)


def make():
    residuals = Residuals(LIMITS)
    return residuals, Exploration(residuals)


def record(residuals, ratio, *, batch_size=4, tokens=8):
    for _ in range(WINDOW * 8):
        residuals.record("verify", batch_size, tokens, ratio)
    residuals.refresh()


def test_dear_buckets_are_explored_more_rarely():
    _, exploration = make()
    costs = np.arange(1.0, 33.0)
    num_steps = 4000
    chosen = [exploration.explore("verify", 1, 4, (4, 32), costs) for _ in range(num_steps)]
    spent = sum(float(costs[size - 1] / costs[3]) - 1 for size in chosen)
    assert 0.5 * EXPLORE_SHARE * num_steps < spent < 1.5 * EXPLORE_SHARE * num_steps


def test_smaller_numbers_are_explored_as_rarely_as_what_they_may_lose():
    _, exploration = make()
    num_steps = 4000
    chosen = [exploration.explore("verify", 1, 20, (2, 20), FLAT) for _ in range(num_steps)]
    spent = chosen.count(2) * (1 - 2 / 20)
    assert 0.5 * EXPLORE_SHARE * num_steps < spent < 1.5 * EXPLORE_SHARE * num_steps


def test_plain_decoding_is_tried_until_it_is_known_and_then_as_often_as_it_is_cheap():
    residuals, exploration = make()
    loss, num_steps = 0.4, 2000
    tries = [exploration.explore_plain(4, loss) for _ in range(num_steps)].count(True)
    assert 0.8 * EXPLORE_SHARE * num_steps < loss * tries <= EXPLORE_SHARE * num_steps
    assert not any(exploration.explore_plain(4, math.inf) for _ in range(num_steps))
    record(residuals, 0.6, tokens=1)
    later = [exploration.explore_plain(4, loss) for _ in range(num_steps)].count(True)
    assert loss * later <= REVISIT_SHARE * num_steps + loss  # the first was saved for before
    # Where it is hardly slower it is tried more often, which costs no more.
    close = [exploration.explore_plain(4, 0.01) for _ in range(num_steps)].count(True)
    assert close == pytest.approx(num_steps / EXPLORE_EVERY, abs=1)


def test_exploration_is_rare_and_keeps_to_the_sizes():
    residuals, exploration = make()
    sizes = (2, 8, 10, 20)
    chosen = [exploration.explore("verify", 1, 8, sizes, FLAT) for _ in range(EXPLORE_EVERY * 10)]
    assert set(chosen) <= set(sizes)
    assert sum(size != 8 for size in chosen) <= 10
    # Once the neighbours are known, hardly ever.
    for size in sizes:
        record(residuals, 1.0, batch_size=1, tokens=size)
    chosen = [exploration.explore("verify", 1, 8, sizes, FLAT) for _ in range(EXPLORE_EVERY * 10)]
    assert chosen.count(8) >= len(chosen) - 1


def test_known_sizes_are_tried_again_once_their_samples_may_be_old():
    residuals, exploration = make()
    record(residuals, 1.0, tokens=8)
    chosen = [exploration.explore("verify", 4, 8, (8, 12), FLAT) for _ in range(EXPLORE_EVERY)]
    assert chosen == [8] * (EXPLORE_EVERY - 1) + [12]
    record(residuals, 1.0, tokens=12)
    later = [exploration.explore("verify", 4, 8, (8, 12), FLAT) for _ in range(2 * REVISIT_EVERY)]
    assert later.count(12) == 2 and later.index(12) == REVISIT_EVERY - 1


def test_each_pass_and_batch_size_waits_for_itself():
    _, exploration = make()
    for _ in range(EXPLORE_EVERY - 1):
        assert exploration.explore("verify", 1, 8, (4, 8), FLAT) == 8
    assert exploration.explore("draft", 1, 8, (4, 8), FLAT) == 8
    assert exploration.explore("verify", 8, 8, (4, 8), FLAT) == 8
    assert not exploration.explore_plain(1, 0.0)


def test_ranks_that_share_a_state_try_the_same():
    ranks = [make(), make()]
    for ratio, (residuals, _) in zip((1.7, 0.6), ranks, strict=True):
        record(residuals, ratio)
    state = ranks[0][0].state()
    chosen = []
    for residuals, exploration in ranks:
        residuals.refresh(state)
        chosen.append([exploration.explore("verify", 4, 8, range(2, 33), FLAT) for _ in range(600)])
    assert chosen[0] == chosen[1] and set(chosen[0]) > {8}


def test_reset_forgets_what_was_tried():
    _, exploration = make()
    waits = []
    for _ in range(2):
        waits.append([exploration.explore_plain(4, 0.0) for _ in range(EXPLORE_EVERY)])
        exploration.explore_plain(4, 0.0)
        exploration.reset()
    assert waits[0] == waits[1] == [False] * (EXPLORE_EVERY - 1) + [True]
