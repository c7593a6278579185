"""Arms that differ by one setting: which ones the study makes, and what the report says of them."""

import pytest
from matplotlib.figure import Figure

from benchmarks import bench_ablation
from benchmarks.bench_ablation import choose_arms, one_context, parse_args
from benchmarks.harness.arms import Arm, parse_arms
from benchmarks.harness.cells import Cell, Group, Result
from benchmarks.harness.rows import as_rows
from benchmarks.report.ablation import (
    draw_sweeps,
    draw_switched,
    own_value,
    sweeps,
    switched,
    table,
)
from benchmarks.report.data import base_of, normalised
from cast_sglang.costs.profiles import load_profile, save_profile
from tests.support.builders import make_profile

BASE = "cast:fixed:2-2-1.5"


def rows_of(arms: list[Arm]) -> list[dict]:
    """Rows at two batch sizes; the base has speed 20, every other arm one more than the last."""
    names = [arm.name for arm in arms if arm.name != BASE]
    rows = []
    for batch in (1, 8):
        speeds = {BASE: 20.0} | {name: 21.0 + place for place, name in enumerate(names)}
        results = {name: Result([speed, 2 * speed, 3 * speed]) for name, speed in speeds.items()}
        rows += as_rows(Cell(batch, 0.0, "code"), [Group(arms, results)])
    return normalised(rows)


def arms_of(words: str = "") -> list[str]:
    args, rest = parse_args(words.split())
    assert rest == []
    return choose_arms(args)


def test_every_part_compares_with_an_arm_of_its_own():
    arms = arms_of()
    bases = {arm: base_of(arm, arms) for arm in arms}
    assert [arm for arm, base in bases.items() if base is None] == [
        *("plain", "static", BASE, "cast:auto")
    ]
    assert bases[f"{BASE}+c1=0+c2=0+c3=0"] == BASE, "not an arm that lacks one rule of three"
    assert bases["cast:auto+calibration=off"] == "cast:auto"
    assert f"{BASE}+c3=0.75" in arms and f"{BASE}+c3=3" in arms and f"{BASE}+r=64" in arms
    parse_arms(arms, "draft")
    assert arms_of("--parts r,rules --prices 4-3-2.5")[2:4] == [
        *("cast:fixed:4-3-2.5", "cast:fixed:4-3-2.5+r=1")
    ]


def test_the_part_context_writes_the_other_table_and_the_rest_goes_on(tmp_path, monkeypatch):
    given: list[list[str]] = []
    monkeypatch.setattr(
        bench_ablation.bench_serving, "main", lambda words: given.append(words) or 0
    )
    save_profile(make_profile(), tmp_path / "p.json")
    words = ["--profile", str(tmp_path / "p.json"), "--out", str(tmp_path), "--batches", "1,8"]
    assert bench_ablation.main([*words, "--parts", "context"]) == 0
    [[_, arms, *rest]] = given
    derived = tmp_path / "one-context.json"
    assert arms.split(",")[2:] == [BASE, f"{BASE}+profile={derived}", f"{BASE}+lookup=nearest"]
    assert load_profile(derived) == one_context(make_profile())
    assert rest == [*("--out", str(tmp_path), "--batches", "1,8", "--profile", words[1])]
    (tmp_path / "p.json").write_text("{}")
    assert bench_ablation.main([*words, "--parts", "context"]) == 1


def test_one_context_keeps_the_shortest():
    right = make_profile()
    thin = one_context(right)
    for name in ("target", "draft", "draft_extend"):
        ours, theirs = getattr(thin, name), getattr(right, name)
        assert len(theirs.contexts) > 1
        assert (ours.batch_sizes, ours.contexts) == (theirs.batch_sizes, theirs.contexts[:1])
        for cell in ("time_us", "spread_us", "samples"):
            assert getattr(ours, cell) == [rows[:1] for rows in getattr(theirs, cell)]
    assert thin.step_overhead_us == right.step_overhead_us


@pytest.mark.parametrize(
    "words", ["--parts x", "--parts context", "--prices 1-2", "--prices 0-1-1", "--arms plain"]
)
def test_wrong_command_lines_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(words.split())
    assert words.split()[0] in capsys.readouterr().err


def test_settings_are_named_compared_and_drawn():
    arms = parse_arms(arms_of("--parts rules,prices,r"), "draft")
    found = switched(rows_of(arms))
    changes = list(dict.fromkeys(one.change for one in found))
    assert changes[:4] == [
        *("no DR (c3=0)", "no DP (c2=0)", "no BP (c1=0)", "no BP, DP, DR (c1=0, c2=0, c3=0)")
    ]
    assert changes[4:6] == ["c1=1", "c1=4"] and changes[-1] == "r=64"
    # Plain and static come first, so the first setting has 23 tokens per second.
    assert [one.batch for one in found[:2]] == [1, 8]
    assert found[0].speed.median == pytest.approx(23 / 20)
    grid = table(found)
    assert [line[0] for line in grid.rows[:3]] == ["1", "8", "all"]
    assert grid.rows[2][3] == "1.15x" and min(grid.breaks) == 3

    swept = sweeps(found)
    assert list(swept) == [(BASE, "c1"), (BASE, "c2"), (BASE, "c3"), (BASE, "r")]
    assert sorted(swept[BASE, "c3"]) == [0.0, 0.75, 3.0]
    assert (own_value(BASE, "c3"), own_value(BASE, "r")) == (1.5, 16)
    assert own_value("cast:fixed", "c1") == 4.0

    lines, panels = Figure(), Figure()
    draw_switched(lines, found)
    labels = [text.get_text() for text in lines.axes[0].get_yticklabels()]
    assert labels == ["CAST fixed:2-2-1.5 with", *changes]
    draw_sweeps(panels, swept)
    ticks = [[text.get_text() for text in axes.get_xticklabels()] for axes in panels.axes]
    assert ticks[2:] == [["0", "0.75", "1.5", "3"], ["1", "4", "16", "64"]]
    # At the base's own value every line is at 1.
    for axes, place in zip(panels.axes, (2, 2, 2, 2), strict=True):
        for line in axes.containers:
            assert line[0].get_ydata()[place] == 1.0
