"""The serving benchmark end to end, at its smallest."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

from benchmarks import bench_serving
from benchmarks.harness import pairs, servers
from benchmarks.harness.pairs import ROOT
from tests.support.launches import examine, profile
from tests.support.preloaded import PreloadedServer, run

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


def test_it_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_serving.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--smoke" in done.stdout, done.stderr


@pytest.fixture
def preloaded(monkeypatch, tmp_path) -> None:
    """Let the benchmark fork its servers, and the commands that find or measure a profile."""

    def run_command(command: Sequence[str], env: dict[str, str], ok: Sequence[int] = (0,)) -> str:
        name, *flags = command[1:]
        program = {"doctor": examine, "profile": profile}[name]
        if program is examine:
            flags.remove("--json")  # which it adds
        code, output = run(program, flags, env, tmp_path / f"{name}.log")
        assert code in ok, output
        return output

    monkeypatch.setattr(servers, "Server", PreloadedServer)
    monkeypatch.setattr(pairs, "_run", run_command)
    # A run of tests has a handler of its own.
    monkeypatch.setattr(bench_serving, "exit_on_sigterm", lambda: None)


def test_smoke(preloaded, tmp_path, capsys):
    argv = ["--smoke", "--out", str(tmp_path), "--temperatures", "0,1"]
    argv += ["--tasks", "code,best-of-2", "--requests", "2", "--tokens", "48"]
    code = bench_serving.main(argv)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "2 of 2 servers are up" in err
    assert out.strip().endswith("results.json")

    content = json.loads((tmp_path / "results.json").read_text())
    rows = {
        (row["arm"], row["batch"], row["temperature"], row["task"]): row for row in content["rows"]
    }
    # Samples of one prompt are all the same at temperature 0.
    cells = [(0.0, "code"), (1.0, "code"), (1.0, "best-of-2")]
    assert set(rows) == {
        (arm, batch, *cell) for arm in ("plain", "cast:auto") for batch in (1, 4) for cell in cells
    }
    for (arm, _, temperature, _), row in rows.items():
        assert row["tok_s_median"] > 0 and row["vs_plain"] > 0
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"]
        # In float32 there are no near ties.
        assert row["identical_to_plain"] is (True if temperature == 0 else None)
        if arm == "cast:auto":
            assert row["accept_length"] >= 1 and row["mean_verify_rows"] >= 1
            assert row["table_rate"] > 0
            # Where no draft pays, every step may be plain, and nothing is decided about trees.
            assert row["mean_policy_us"] > 0 or row["plain_share"] == 1
    assert content["complete"] and content["summary"]
    assert content["provenance"]["profiles"]["cast:auto"]
    with open(tmp_path / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.extended
def test_cold_smoke(preloaded, tmp_path, capsys):
    argv = ["--smoke", "--out", str(tmp_path), "--batches", "2", "--requests", "2"]
    code = bench_serving.main([*argv, "--tokens", "32", "--cold", "1"])
    err = capsys.readouterr().err
    assert code == 0, err
    assert err.count("2 of 2 servers are up") == 2
    content = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["arm"], row["phase"]): row for row in content["rows"]}
    assert set(rows) == {
        (arm, phase) for arm in ("plain", "cast:auto") for phase in ("warm", "cold")
    }
    plain, cast = rows["plain", "cold"], rows["cast:auto", "cold"]
    assert len(cast["tok_s"]) == 1 and cast["vs_plain"] > 0 and cast["identical_to_plain"]
    # Both served the same text, which is about a hundred steps of the arm that gains more a step.
    assert plain["num_requests"] == cast["num_requests"] >= 3 * 2
    assert 50 < cast["steps_a_run"] < 200 and cast["steps_a_run"] < plain["steps_a_run"]
    assert content["provenance"]["cold_profiles"].keys() == {"cast:auto"}
