"""What a soak does to servers, and what it sees of them."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import faults
from benchmarks.harness.faults import (
    ENDS,
    FAULTS,
    Holding,
    Subject,
    changed_target,
    halve,
    largest_growth,
    schedule,
)
from benchmarks.harness.servers import ServerError


def life(number, *memories, handles=50):
    return [Holding(number, memory, handles, 9) for memory in memories]


def test_growth_is_that_of_the_server_that_grew_most():
    steady = life(1, 90, 100, 101, 99, 100, 102, 101)
    growing = life(2, 50, 100, 100, 100, 110, 120, 130)
    assert largest_growth(steady)["memory_mb"] == pytest.approx(0.01)
    assert largest_growth(steady + growing) == {"memory_mb": 0.2, "handles": 0.0, "threads": 0.0}
    assert largest_growth(life(1, 1, 2, 3, 4, 5, 600))["memory_mb"] == 0.0  # too short to tell


@pytest.mark.parametrize("waves", [len(FAULTS), 40, 100])
def test_all_faults_take_turns_and_no_server_ends_behind_the_first_third(waves):
    faults = schedule(waves)
    assert len(faults) == waves and set(faults) == FAULTS.keys()
    assert not {*faults[waves // 3 + 1 :]} & {*ENDS}


def test_files_are_left_half_written(tmp_path):
    for name in ("calibration/pair.json", "profiles/made-up.json"):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(b"x" * 100)
    assert halve(tmp_path) == ["calibration/pair.json", "profiles/half-written.json"]
    assert (tmp_path / "calibration/pair.json").stat().st_size == 50
    assert (tmp_path / "profiles/half-written.json").stat().st_size == 50
    assert (tmp_path / "profiles/made-up.json").stat().st_size == 100


def test_another_target_has_other_weights_of_the_same_shapes(tmp_path):
    (tmp_path / "own").mkdir()
    weights = {"a": torch.randn(9, 7), "b": torch.randn(5).bfloat16()}
    save_file(weights, tmp_path / "own" / "model.safetensors")
    for _ in range(2):  # whatever an earlier run has left there
        other = changed_target(tmp_path / "own", tmp_path / "other")
        changed = load_file(other / "model.safetensors")
        assert {n: (w.shape, w.dtype) for n, w in changed.items()} == {
            n: (w.shape, w.dtype) for n, w in weights.items()
        }
        assert not any(torch.equal(changed[name], weights[name]) for name in weights)


class Server:
    """A server that ends at some look at it."""

    def __init__(self, looks):
        self.looks, self.log = looks, []

    def check(self):
        self.looks -= 1
        if self.looks <= 0:
            raise ServerError("gone")

    def __getattr__(self, name):
        return lambda: self.log.append(name)


@pytest.mark.parametrize(("looks", "fault"), [(1, "kill"), (2, "sigterm"), (10**9, "sigterm")])
def test_a_server_is_seen_to_end_and_the_next_one_starts(tmp_path, monkeypatch, looks, fault):
    monkeypatch.setattr(faults, "END_SECONDS", 0.5)
    spoiled = []
    monkeypatch.setattr(faults, "halve", spoiled.append)
    servers = {name: Server(looks) for name in ("cast-1", "cast-2")}
    subject = Subject(servers.__getitem__, {}, tmp_path)
    subject.start()
    subject.weights = "other"
    problem = subject.restart(fault)
    assert (problem is not None) == (looks > 2) and spoiled == [tmp_path] * (fault == "kill")
    assert servers["cast-1"].log == ["launch", "wait_until_ready", "stop"]
    assert servers["cast-2"].log == ["launch", "wait_until_ready"]
    assert (subject.life, subject.weights) == (2, "own")


@pytest.mark.parametrize(
    ("messages", "refusal"),
    [
        ([None], None),
        (["Weights were updated, but the cache was not flushed", None], None),
        (["the cache was not flushed"] * 9, "not flushed"),
        (["no such file", None], "no such file"),
    ],
)
def test_weights_are_loaded_again_where_the_cache_was_not_flushed(monkeypatch, messages, refusal):
    answers = iter(messages)

    def post(url, json, timeout):
        message = next(answers)
        return SimpleNamespace(json=lambda: {"success": message is None, "message": message})

    monkeypatch.setattr(faults.httpx, "post", post)
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    server = SimpleNamespace(name="cast-1", url="u")
    with pytest.raises(ServerError, match=refusal) if refusal else nullcontext():
        faults.update_weights(server, "path")
