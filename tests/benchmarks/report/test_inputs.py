"""What the report takes, and what it leaves out."""

from pathlib import Path

import pytest

from benchmarks.report import __main__ as report

ROOT = Path(__file__).resolve().parents[3]
OTHERS = {
    "reliability": '{"points": [], "errors": {}}',
    "sweep": '{"provenance": {}, "rows": [{"setting": "base"}]}',
    "machines": '{"rows": [{"machine": "true"}]}',
    "policy": '{"rows": [{"variant": "x"}]}',
    "demo": '{"rows": [{"arm": "plain", "phase": "cold"}]}',
    "empty": '{"rows": []}',
    "nothing": "{}",
    "list": "[1]",
}


@pytest.fixture
def others(tmp_path):
    for name, text in OTHERS.items():
        (tmp_path / f"{name}.json").write_text(text)
    return [str(tmp_path / f"{name}.json") for name in OTHERS]


def test_files_of_another_kind_are_named_and_left_out(tmp_path, results, others, capsys):
    words = [*others[:2], str(results), *others[2:], "--out", str(tmp_path / "page")]
    assert report.main(words) == 0
    assert (tmp_path / "page/report.html").is_file()
    assert len(list((tmp_path / "page/numbers").glob("*.json"))) == 1
    lines = capsys.readouterr().err.splitlines()
    for line, other in zip(lines, others, strict=True):
        assert line.startswith(f"report: left out {other}: ")
    assert "--reliability" in lines[0] and "bench_sweep" in lines[1] and "machines" in lines[2]


@pytest.mark.parametrize("names", [["list"], list(OTHERS)], ids=["one", "all"])
def test_without_any_results_there_is_an_error(tmp_path, others, names, capsys):
    words = [str(tmp_path / f"{name}.json") for name in names]
    assert report.main([*words, "--out", str(tmp_path / "page")]) == 1
    *left_out, error = capsys.readouterr().err.splitlines()
    assert len(left_out) == len(names) and error.startswith("report: error: no file holds results")
    assert not (tmp_path / "page").exists()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path, results, capsys):
    broken = tmp_path / "broken.json"
    for text in (None, "{"):
        if text is not None:
            broken.write_text(text)
        assert report.main([str(results), str(broken), "--out", str(tmp_path / "page")]) == 1
        assert capsys.readouterr().err.startswith(f"report: error: {broken}: ")


def test_what_is_committed_can_be_reported_together(capsys):
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    found = report.load_all(files)
    lines = capsys.readouterr().err.splitlines()
    assert len(found) + len(lines) == len(files) and len(found) > 3 and lines
    studies = ("bench_sweep", "bench_calibration", "bench_machines", "bench_gpus", "bench_heads")
    studies += ("of soak", "bench_text")
    assert all(any(study in line for study in studies) for line in lines)
