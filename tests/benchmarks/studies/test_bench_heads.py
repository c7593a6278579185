"""The study of heads: what it takes from folders and runs, and what its tables say."""

import json

import pytest

from benchmarks.studies.bench_heads import comparisons, main, ratio, reach, speed_table

EVALUATION = {
    "accept_length": 2.0,
    "accept_len_histogram": {"1": 4, "2": 3, "3": 2, "6": 1},
    "tree": {"num_steps": 5, "topk": 4, "num_draft_tokens": 8},
    "minutes": 4.0,
    "steps": 90,
    "token_passes": 9000,
    "parameters": 10,
    "agreement": [0.5],
}


def write_head(folder, kind, prompts, greedy, **changes):
    folder.mkdir()
    config = {"architectures": [f"LlamaForCausalLM{kind}Eagle3"], "num_hidden_layers": 1}
    served = [{"expected": each / 2, "greedy": each, "num_rows": 4} for each in greedy]
    evaluation = EVALUATION | {"prompts": prompts, "served": served} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "model.safetensors").write_bytes(bytes(1_200_000))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    steps = write_head(tmp_path / "steps", "", [[10, 20], [10, 40]], [1.0, 2.0], steps=0)
    wide = write_head(tmp_path / "wide", "Cascade", [[8, 24], [10, 40]], [2.0, 2.0])
    return [steps, f"{wide}:steps"]


@pytest.fixture
def run(tmp_path):
    names = {"plain": "plain", "steps": "cast:auto+profile=out/p/steps.json"}
    names["wide"] = "cast:auto+--speculative-draft-model-path=wide/draft+profile=out/p/wide.json"
    speeds = {"plain": [10, 20], "steps": [20, 30], "wide": [30, 60]}
    rows = [
        {"arm": arm, "batch": 8, "temperature": 0.0, "tok_s": speeds[name], "accept_length": 2.5}
        for name, arm in names.items()
    ]
    rows.append(rows[0] | {"arm": "static:5-4-8"})
    provenance = {"command": "python -m x", "date": "2026", "device": "d", "git_commit": "abc"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": [{"provenance": provenance, "rows": rows}]}))
    return path


def test_reach_is_the_part_of_steps_that_accept_as_many():
    assert reach(EVALUATION["accept_len_histogram"], 5) == pytest.approx([0.6, 0.3, 0.1, 0.1, 0.1])


def test_tables_and_picture_come_from_folders_and_again_from_the_numbers(
    tmp_path, folders, run, capsys
):
    out = tmp_path / "out"
    assert main([*folders, "--speed", str(run), "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    lines = first.splitlines()
    assert lines[2] == (
        "| steps | by steps | 1 | 1.2 | - | - | 2.00 | 60% | 30% | 10% | 10% | 10% | 2.50 | 1.75 "
        "| 4.0 |"
    )
    assert lines[3].startswith("| wide | cascade | 1 | 1.2 | 4.0 | 90 | 2.00 |")
    assert main([str(out / "heads.json"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == first
    heads = json.loads((tmp_path / "again/heads.json").read_text())
    assert heads == json.loads((out / "heads.json").read_text())
    # Speed: within a repeat, to plain decoding and to the base.
    assert (
        "| wide | 0 | 8 | 45.0 (30.0 to 60.0) | 3.00 (3.00 to 3.00) | 1.75 (1.50 to 2.00)" in first
    )
    assert "| steps | 0 | 8 | 25.0 (20.0 to 30.0) | 1.75 (1.50 to 2.00) |  | 2.50 |" in first
    assert "static" not in first


def test_ratios_are_those_of_sums_over_the_same_prompts(tmp_path, folders, capsys):
    assert main([*folders, "--out", str(tmp_path / "out")]) == 0
    steps, wide = json.loads((tmp_path / "out/heads.json").read_text())["heads"]
    middle, low, high = ratio(wide, steps, "accept length 5-4-8")
    assert middle == pytest.approx(64 / 18 / 3) and low == 1.0 and high == pytest.approx(1.5)
    assert ratio(wide, steps, "served trees, greedy")[0] == pytest.approx(6 / 5)
    assert len(comparisons([steps, wide])) == 3
    with pytest.raises(ValueError, match="have not seen the same prompts"):
        ratio(wide, steps | {"prompts": [[1, 2]]}, "accept length 5-4-8")


def test_a_head_without_its_base_is_an_error(folders, tmp_path, capsys):
    assert main([folders[1], "--out", str(tmp_path / "out")]) == 1
    assert "no head steps to compare with" in capsys.readouterr().err


def test_rows_of_no_repeat_in_common_are_not_compared():
    rows = [{"head": "wide", "batch": 1, "temperature": 1.0, "tok_s": [5], "accept_length": None}]
    lines = speed_table([{"head": "wide", "base": ""}], {"rows": rows})
    assert lines[2] == "| wide | 1 | 1 | 5.0 (5.0 to 5.0) |  |  |  |"
