"""The study of GPUs that are not at hand: what it fits, what it writes, what its tables say."""

import json

import numpy as np
import pytest

from benchmarks.studies import bench_gpus
from benchmarks.studies.bench_gpus import (
    CHAIN,
    EAGLE_TREE,
    PAIRS,
    PUBLISHED,
    STOCK_TREE,
    TASKS,
    Gpus,
    Trees,
    gpu_table,
    main,
    published_table,
)
from cast_sglang.costs.model import step_units


@pytest.mark.slow
def test_it_fits_what_is_published_and_predicts_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_gpus, "STEPS", dict.fromkeys((1, 8, 32), 30))
    monkeypatch.setattr(bench_gpus, "WARM_UP", 10)
    monkeypatch.setattr(bench_gpus, "EASES", np.linspace(-3.0, 6.0, 5))
    monkeypatch.setattr(bench_gpus, "TASKS", TASKS[:1])
    lines = [line for line in PUBLISHED if line.model == "Llama 3.1 8B"]
    lines = [line._replace(eagle=line.eagle[:1], cast=line.cast[:1]) for line in lines]
    monkeypatch.setattr(bench_gpus, "PUBLISHED", lines)
    assert main(["--gpus", "H20", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpus.json").read_text())
    one, eight = content["published"]
    # Fitted at batch 1, so there they agree; at batch 8 nothing is fitted.
    assert one["eagle"]["simulated"] == pytest.approx(one["eagle"]["published"], rel=1e-3)
    assert eight["eagle"]["simulated"] != pytest.approx(eight["eagle"]["published"], rel=1e-3)
    assert one["accept_length"] == eight["accept_length"] > 3.0
    assert all(0.5 < row["cast"][name] < 6.0 for row in (one, eight) for name in ("auto", "fixed"))
    assert [row["batch_size"] for row in content["gpus"]] == [1, 8, 32]
    assert content["simulated"] is True
    printed = capsys.readouterr().out
    assert "| 1 | Llama 3.1 8B | EAGLE, published | 3.60 | 3.60 |" in printed
    assert "| H20 | 32 |" in printed


def test_static_trees_do_not_pay_for_decisions():
    costs = Gpus().costs("A800", "Llama 3.1 8B", 1)
    cast = step_units(costs.cast, [4, 4], 8, 4)
    decisions = 4  # two layers, whether to draft, and how many rows
    assert cast - step_units(costs.static, [4, 4], 8, 4) == pytest.approx(
        decisions * 55 / costs.cast.unit_us, rel=1e-3
    )


@pytest.mark.parametrize("shape", [EAGLE_TREE, STOCK_TREE, CHAIN])
def test_ease_is_found_again_by_what_it_brings(shape, monkeypatch):
    monkeypatch.setattr(bench_gpus, "EASES", np.linspace(-3.0, 6.0, 4))
    trees = Trees(0)
    lengths = [1.0 + trees.gains(shape, ease)[shape[2] - 2] for ease in (-2.0, 0.0, 2.0)]
    assert lengths == sorted(lengths) and 1.0 < lengths[0] and lengths[-1] <= shape[0] + 1
    assert trees.ease(shape, lengths[1]) == pytest.approx(0.0, abs=0.05)
    with pytest.raises(ValueError, match=r"accept length of 20\.00"):
        trees.ease(shape, 20.0)


def test_the_table_of_the_paper_is_whole():
    for line in PUBLISHED:
        assert line.model in PAIRS and len(line.eagle) == len(line.cast) == len(TASKS)


def test_tables():
    row = {
        "batch_size": 1,
        "model": "M",
        "accept_length": 4.0,
        "eagle": {"published": 2.0, "simulated": 2.0},
        "cast": {"published": 3.0, "auto": 2.5, "fixed": 2.25},
    }
    rows = [{**row, "task": task} for task in TASKS]
    assert published_table(rows)[-2].startswith("| 1 | M | CAST `auto`, simulated | 2.50 | ")
    row = {"gpu": "H20", "batch_size": 8, "plain_ms": 5.04, "static": {"5-4-8": 1.5}, "cast": 2.0}
    row |= {"layers": 3.25, "rows": 9.0, "plain_share": 0.125}
    assert gpu_table([row])[-1] == "| H20 | 8 | 5.0 | 1.50 | 2.00 | 3.2 | 9.0 | 12% |"


def test_an_unknown_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--gpus", "P4"])
    assert "no P4; there are RTX4090" in capsys.readouterr().err
