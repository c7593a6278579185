"""Tuning finds thresholds that are known to be better, and says how much is left."""

import json

import pytest
from rich.console import Console

from cast_sglang.trace.fixed_trees import FIXED_TREES, replay_tree
from cast_sglang.trace.replay import Replay, make_policy
from cast_sglang.trace.tuning import print_tuned, sample_steps, tune
from tests.support.traces import SETTINGS, Recorder, make_header, make_tables

EVALUATIONS = 24


@pytest.fixture(scope="module")
def full():
    """A trace whose recorded thresholds are far too high for its costs."""
    tables = make_tables(row_us=20.0, draft_us=100.0)
    trace = Recorder(make_policy("eagle", make_header(tables)), tables, 1, seed=5).run(30)
    settings = {**SETTINGS, "c1": 300.0, "c2": 300.0, "c3": 300.0}
    return trace._replace(header=make_header(tables, is_full=True, settings=settings)), tables


@pytest.fixture(scope="module")
def search(full):
    """A search over the whole trace, and what it said of its progress."""
    calls = []
    tuned = tune(*full, evaluations=EVALUATIONS, progress=lambda *counts: calls.append(counts))
    return tuned, calls


def speed(trace, tables, **thresholds):
    policy = make_policy("fixed", trace.header, **thresholds)
    return tokens_per_second(Replay(trace, tables, policy, rewards=False))


def tokens_per_second(replay):
    outcomes = list(replay)
    return 1e6 * sum(1 + o.accepted for o in outcomes) / sum(o.time_us for o in outcomes)


def test_finds_what_a_grid_finds(full, search):
    trace, tables = full
    tuned, calls = search
    most = EVALUATIONS + 1 + len(FIXED_TREES)
    assert calls[-1][0] <= most and calls[-1][1] == most
    assert tuned.evaluations <= EVALUATIONS
    assert tuned.speeds["recorded"][1] == pytest.approx(speed(trace, tables))
    found = speed(trace, tables, **tuned.thresholds._asdict())
    assert tuned.speeds["tuned"][1] == pytest.approx(found)
    prices = (0.25, 0.5, 1.0, 2.0, 4.0)
    grid = [
        speed(trace, tables, c1=c1, c2=c2, c3=1.0, r=16) for c1 in prices for c2 in prices[1::2]
    ]
    assert found >= 0.97 * max(grid)
    assert found > 1.1 * tuned.speeds["recorded"][1]


def test_is_deterministic_and_takes_a_part_of_a_long_trace(full):
    trace, tables = full
    long = trace._replace(steps=trace.steps * 2)
    first, second = (tune(long, tables, evaluations=4, max_steps=50, seed=7) for _ in range(2))
    assert first == second
    assert first.steps == {1: 50}
    assert json.loads(json.dumps(first.as_dict()))["thresholds"]["r"] == first.thresholds.r


def test_regret(search):
    tuned, _ = search
    for against in ("auto", "fixed tree"):
        regret = 1 - tuned.speeds["tuned"][1] / tuned.speeds[against][1]
        assert tuned.regret("tuned", against, 1) == pytest.approx(regret)
    assert tuned.regret("tuned", "recorded", 1) <= 0.0


def test_the_best_fixed_tree_is_that_of_hindsight(full, search):
    trace, tables = full
    tuned, _ = search
    speeds = {
        str(shape): tokens_per_second(replay_tree(trace, tables, shape, rewards=False))
        for shape in FIXED_TREES
    }
    assert tuned.trees[1] == max(speeds, key=lambda shape: speeds[shape])
    assert tuned.speeds["fixed tree"][1] == pytest.approx(speeds[tuned.trees[1]])


def test_prints_what_to_set(search, capsys):
    tuned, _ = search
    print_tuned(tuned, Console())
    out = capsys.readouterr().out
    assert f"--cast-c1 {tuned.thresholds.c1:g} " in out and "--cast-policy fixed" in out
    assert f"\nr = {tuned.thresholds.r}" in out


def test_sampled_steps_are_stretches(full):
    steps = full[0].steps * 20
    sampled = sample_steps(steps, 200)
    assert 150 < len(sampled) <= 200
    assert sampled[0] is steps[0] and sampled[-1] is steps[-1]
    assert sample_steps(steps[:40], 200) == steps[:40]
