"""The serving benchmark end to end, at its smallest."""

import csv
import json
import subprocess
import sys

import pytest

from benchmarks import bench_serving
from benchmarks.harness import servers
from benchmarks.harness.pairs import ROOT
from tests.support.preloaded import PreloadedServer

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


def test_it_runs_as_a_script(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_serving.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--smoke" in done.stdout, done.stderr


def test_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(servers, "Server", PreloadedServer)
    # A run of tests has a handler of its own.
    monkeypatch.setattr(bench_serving, "exit_on_sigterm", lambda: None)
    argv = ["--smoke", "--out", str(tmp_path), "--temperatures", "0,1"]
    code = bench_serving.main([*argv, "--tasks", "code,best-of-2", "--requests", "2"])
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
