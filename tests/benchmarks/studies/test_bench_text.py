"""What traces tell of texts: counted anew here, on simulated text."""

import json

import numpy as np
import pytest

from benchmarks.studies import bench_text
from cast_sglang.costs.profiles import save_profile
from cast_sglang.trace.records import unpacked
from tests.support.traces import Recorder, default_policy, make_tables, write


@pytest.fixture(scope="module")
def trace():
    return Recorder(default_policy(), make_tables(), batch_size=6).run(30)


def test_first_children_of_the_path_are_counted(trace):
    nodes = bench_text.judged(trace)
    told, seen = [], []
    drafted = [step for step in trace.steps if not step.is_plain]
    for step in drafted:
        for request in step.requests:
            told.append(unpacked(request.probs, "float32")[0])
            seen.append(request.follows[:1] == [0])
    roots = nodes.depths == 1
    assert nodes.chances[roots] == pytest.approx(told)
    assert nodes.first[roots].tolist() == seen
    # Below a root comes a judged node for each further node of the path that has children.
    most = sum(1 + len(request.follows) for step in drafted for request in step.requests)
    assert roots.sum() < len(roots) <= most
    part = bench_text.reliability(nodes, roots)
    assert part["nodes"] == len(seen)
    assert part["accepted_less_calibrated"][0] == pytest.approx(
        np.mean(seen) - np.mean(told), abs=1e-3
    )


def test_runs_of_requests_show_and_chance_does_not():
    count = 400
    random = np.random.default_rng(1)
    steps, requests = np.divmod(np.arange(8 * count), 8)
    blank = np.zeros(8 * count)
    nodes = bench_text.Judged(requests, steps, *([blank] * 7))
    roots = np.ones(8 * count, bool)
    assert abs(bench_text.runs(nodes, roots, random.random(8 * count))[0]) < 0.06
    stays = np.repeat(random.random((count // 4, 8)), 4, axis=0).ravel()
    found, low, high = bench_text.runs(nodes, roots, stays)
    assert low < found < high and found == pytest.approx(0.75, abs=0.06)


def test_the_study_is_written(trace, tmp_path):
    write(trace, tmp_path / "t.jsonl")
    save_profile(make_tables(), tmp_path / "p.json")
    words = [f"made-up={tmp_path}/t.jsonl", "--profile", f"{tmp_path}/p.json", "--out"]
    assert bench_text.main([*words, f"{tmp_path}/out"]) == 0
    text = json.loads((tmp_path / "out" / "text.json").read_text())["texts"]["made-up"]
    [found] = text["replays"].values()
    assert found["to_auto"]["auto"] == [1.0, 1.0, 1.0]
    for middle, low, high in found["to_auto"].values():
        assert low <= middle <= high
    promised = found["lookahead"]["1"]
    assert promised[0] > 0 and promised[1] == pytest.approx(promised[2], rel=0.2)
    assert (tmp_path / "out" / "text.png").stat().st_size > 5000
    assert bench_text.main([f"none={tmp_path}/none", *words[1:], f"{tmp_path}/out"]) == 1
