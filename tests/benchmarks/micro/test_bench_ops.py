"""The benchmark of the ops runs dry without a GPU, and says what it needs."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.micro import bench_ops


def test_without_a_gpu_it_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_ops"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench_ops.main()
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_dry_run_runs_every_op():
    command = [sys.executable, "-m", "benchmarks.micro.bench_ops", "--dry-run", "--batches", "2"]
    command += ["--topk", "2", "--steps", "3", "--tokens", "5"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["op"] for row in result["rows"]][-1] == "3 layers"
    assert all(row["fused_ran"] and row["reference_ran"] for row in result["rows"])
