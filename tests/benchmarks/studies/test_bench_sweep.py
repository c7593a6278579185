"""Ablation and sensitivity from a trace: every setting once, on the same steps."""

import json
from itertools import pairwise

import pytest

from benchmarks.studies import bench_sweep
from cast_sglang.costs.profiles import save_profile
from cast_sglang.trace.fixed_trees import FIXED_TREES
from tests.support.traces import Recorder, default_policy, make_tables, write


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """What a sweep leaves behind."""
    directory, tables = tmp_path_factory.mktemp("sweep"), make_tables()
    trace = write(Recorder(default_policy(), tables).run(25), directory / "t.jsonl")
    save_profile(tables, directory / "p.json")
    words = [str(trace), "--profile", str(directory / "p.json"), "--out", str(directory / "out")]
    assert bench_sweep.main(words) == 0
    return directory / "out", json.loads((directory / "out" / "sweep.json").read_text())


def test_every_setting_is_compared_with_the_base(swept):
    directory, content = swept
    rows = {row["setting"]: row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 1 + 4 + 4 * 4 + 3 + len(FIXED_TREES)
    assert rows["base"]["vs_base"] == 1.0
    assert rows["base"]["thresholds"] == {"c1": 2.0, "c2": 2.0, "c3": 1.5, "r": 16}
    for row in rows.values():
        assert row["vs_base"] == pytest.approx(row["tok_s"] / rows["base"]["tok_s"], abs=1e-3)
    assert rows["C3 6"]["rows"] < rows["base"]["rows"] < rows["without DR"]["rows"]
    assert rows["C2 8"]["layers"] < rows["base"]["layers"] < rows["without DP"]["layers"]
    assert rows["R 64"]["thresholds"]["r"] == 64
    for shape in FIXED_TREES:
        row = rows[f"EAGLE-3 {shape}"]
        assert (row["layers"], row["rows"]) == (shape.num_steps, shape.num_draft_tokens)
    lengths = [rows[f"EAGLE-3 {n}-1-{n + 1}"]["accept_length"] for n in range(1, 9)]
    # Nodes that the trace does not hold are drawn, for each length anew.
    assert all(longer > shorter - 0.05 for shorter, longer in pairwise(lengths))
    picture = (directory / "sweep.svg").read_text()
    assert "times its base value" in picture or "<svg" in picture
    assert content["provenance"]["command"].startswith("python -m benchmarks.studies.bench_sweep")


def test_batch_sizes_of_a_few_steps_are_not_drawn():
    rows = [{"group": "base", "batch": b, "steps": n} for b, n in ((0, 70), (8, 51), (1, 19))]
    assert bench_sweep.drawn_batches(rows) == {8: 51}
    few = [{**row, "steps": row["steps"] // 10} for row in rows]
    assert bench_sweep.drawn_batches(few) == {8: 5}


def test_what_cannot_be_read_is_told(tmp_path, capsys):
    assert bench_sweep.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench_sweep.main([str(tmp_path / "t.jsonl"), "--prices", "2-2"])
