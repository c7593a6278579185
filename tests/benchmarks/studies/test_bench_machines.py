"""The study of simulated machines: what it writes, and what its table says."""

import json

import pytest

from benchmarks.studies import bench_machines
from benchmarks.studies.bench_machines import STARTS, TEXTS, Row, main, table


@pytest.mark.slow
def test_it_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_machines, "ENDS", (0, 20, 40, 60))
    monkeypatch.setattr(bench_machines, "WINDOW", 20)
    assert main(["--machines", "gpu-tiles", "--batches", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "machines.json").read_text())["rows"]
    assert len(rows) == len(TEXTS) * len(STARTS)
    assert all(0.2 < rate < 2.0 for row in rows for rate in (*row["rates"], *row["curve"]))
    assert (tmp_path / "machines.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(STARTS) and lines[2].startswith("| gpu-tiles | first start |")


def test_the_table_has_geometric_means_and_the_least():
    rows = [
        Row("m", "easy", 1, start, [rate, 1.0, 1.0], plain, [])
        for start in STARTS
        for rate, plain in ((0.5, 2.0), (2.0, 0.9))
    ]
    lines = table(rows)
    assert lines[2] == "| m | first start | 1.000 (0.500) | 1.000 (1.000) | 1.000 (1.000) | 0.900 |"


def test_an_unknown_machine_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--machines", "abacus"])
    assert "no abacus; there are amd-170m" in capsys.readouterr().err
