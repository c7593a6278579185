"""The benchmark's rows, its summary and its files."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.arms import Arm
from benchmarks.harness.cells import Cell, Group, Result
from benchmarks.harness.counters import TOTALS, gained, step_means
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.rows import as_rows, as_table, row_fields, summarise, summary_table
from benchmarks.harness.streams import Answer

ARMS = [
    Arm("plain", "plain"),
    Arm("static:2-2-4", "static"),
    Arm("static:3-1-4", "static"),
    Arm("cast", "cast"),
]


SPEEDS = {"plain": 10.0, "static:2-2-4": 15.0, "static:3-1-4": 20.0, "cast": 30.0}


def result(name: str, speed: float | None = None) -> Result:
    ids = [1, 2] if name == "static:2-2-4" else [1, 3]
    answer = Answer(
        times=[0.1, 0.2],
        counts=[1, 12],
        output_ids=ids,
        verify_passes=0 if name == "plain" else 4,
    )
    return Result(tok_s=[SPEEDS[name] if speed is None else speed] * 3, answers=[answer])


def group(arms: list[Arm], **changes: float) -> Group:
    return Group(arms, {arm.name: result(arm.name, changes.get(arm.name)) for arm in arms})


def rows_of(cell: Cell, **changes: float) -> list[dict]:
    return as_rows(cell, [group(ARMS, **changes)])


def test_rows_compare_with_plain_and_with_the_best_static_arm():
    by_arm = {row["arm"]: row for row in rows_of(Cell(8, 0.0, "t"))}
    cast = by_arm["cast"]
    assert (cast["vs_plain"], cast["vs_best_static"]) == (3.0, 1.5)
    assert cast["best_static"] == "static:3-1-4"
    assert (cast["vs_plain_min"], cast["vs_plain_max"]) == (3.0, 3.0)
    assert (by_arm["static:2-2-4"]["vs_best_static"], by_arm["static:3-1-4"]["vs_best_static"]) == (
        0.75,
        1.0,
    )
    assert (by_arm["plain"]["accept_length"], cast["accept_length"]) == (None, 3.0)
    assert (by_arm["static:2-2-4"]["identical_to_plain"], cast["identical_to_plain"]) == (
        False,
        True,
    )
    assert cast["ttft_p50_ms"] == 100.0
    rows = [by_arm[name]["mean_verify_rows"] for name in ("plain", "static:2-2-4", "cast")]
    assert rows == [1.0, 4.0, None]
    assert {row["identical_to_plain"] for row in rows_of(Cell(8, 0.8, "t"))} == {None}
    assert all(list(row) == row_fields() for row in by_arm.values())


def test_ratios_are_formed_within_a_repeat():
    # The machine halves its speed in the second repeat; the ratio does not move.
    drifting = {"plain": Result(tok_s=[10, 5, 10]), "cast": Result(tok_s=[20, 10, 22])}
    rows = as_rows(Cell(1, 1.0, "t"), [Group([ARMS[0], ARMS[3]], drifting)])
    assert [rows[1][f"vs_plain{end}"] for end in ("", "_min", "_max")] == [2.0, 2.0, 2.2]


def test_groups_are_compared_by_their_own_plain_arm():
    slow, fast = [ARMS[0], ARMS[1], ARMS[3]], [ARMS[0], ARMS[2]]
    # In the second group the machine has three times its speed, so "b" only looks the faster.
    groups = [
        group(slow, **{"static:2-2-4": 25.0}),
        group(fast, **{"plain": 30.0, "static:3-1-4": 60.0}),
    ]
    by_arm = {(row["arm"], row["group"]): row for row in as_rows(Cell(8, 0.0, "t"), groups)}
    assert {row["best_static"] for row in by_arm.values()} == {"static:2-2-4"}
    assert (by_arm["static:3-1-4", 2]["vs_plain"], by_arm["static:3-1-4", 2]["vs_best_static"]) == (
        2.0,
        0.8,
    )
    assert (by_arm["cast", 1]["vs_plain"], by_arm["cast", 1]["vs_best_static"]) == (3.0, 1.2)
    assert by_arm["plain", 2]["vs_best_static"] == by_arm["plain", 1]["vs_best_static"] == 0.4


def test_rows_without_plain_and_static_have_no_ratios():
    [row] = as_rows(Cell(1, 0.0, "t"), [group(ARMS[3:])])
    assert (row["vs_plain"], row["vs_best_static"], row["best_static"]) == (None, None, None)
    assert (row["identical_to_plain"], row["num_identical"]) == (None, None)


def test_the_summary_is_a_geometric_mean_over_batches():
    rows = rows_of(Cell(1, 0.0, "t"), cast=20.0) + rows_of(Cell(8, 0.0, "t"), cast=80.0)
    [summary] = [row for row in summarise(rows) if row["arm"] == "cast"]
    assert (summary["task"], summary["vs_plain"], summary["vs_best_static"]) == ("t", 4.0, 2.0)
    # Several tasks or temperatures also get a mean over all cells.
    rows += rows_of(Cell(1, 1.0, "u"), cast=10.0)
    summary = {
        (row["task"], row["temperature"]): row for row in summarise(rows) if row["arm"] == "cast"
    }
    assert list(summary) == [("t", 0.0), ("u", 1.0), ("all", None)]
    assert summary["all", None]["vs_plain"] == pytest.approx(16 ** (1 / 3), abs=1e-4)
    assert as_table(rows).row_count == len(rows)
    assert summary_table(summarise(rows)).row_count == 3 * len(ARMS)
    # Cold cells have a mean of their own.
    cold = rows_of(Cell(1, 0.0, "t", "cold"), cast=5.0)
    assert summarise([*rows, *cold])[: 3 * len(ARMS)] == summarise(rows)
    assert [row["vs_plain"] for row in summarise([*rows, *cold]) if row["phase"] == "cold"] == [
        *(1.0, 1.5, 2.0, 0.5)
    ]


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6))
def test_the_summary_lies_between_the_cells(ratios):
    rows = [
        {"arm": "x", "batch": batch, "temperature": 0, "task": "t", "phase": "warm"}
        | {"vs_plain": value, "vs_best_static": None}
        for batch, value in enumerate(ratios)
    ]
    [summary] = summarise(rows)
    assert min(ratios) - 1e-3 <= summary["vs_plain"] <= max(ratios) + 1e-3
    assert summary["vs_best_static"] is None


def test_counters_are_those_between_two_states():
    before = dict.fromkeys(TOTALS, 1000)
    moved = {
        "steps": 10,
        "plain_steps": 1,
        "requests": 80,
        "layers_grown": 45,
        "nodes_drafted": 800,
    }
    moved |= {"nodes_verified": 480, "accepted_requests": 80, "drafts_accepted": 160}
    moved |= {"timed_steps": 8, "predicted_us": 8000.0, "measured_us": 16000.0, "policy_us": 500.0}
    after = {name: before[name] + moved[name] for name in TOTALS} | {"mean_layers": 7.0}
    assert gained(before, after) == moved
    summary = step_means(moved)
    assert summary["plain_share"] == 0.1
    assert (summary["mean_layers"], summary["mean_verify_rows"]) == (4.5, 6.0)
    assert (summary["mean_predicted_us"], summary["predicted_to_measured"]) == (1000.0, 0.5)
    assert (summary["mean_policy_us"], summary["policy_share"]) == (50.0, 0.025)
    del moved["plain_steps"]
    assert step_means(moved)["plain_share"] is None, "not every version counts them"
    # 24 tokens a step of a predicted millisecond.
    assert summary["table_rate"] == pytest.approx(24_000)
    assert set(step_means(gained(before, before)).values()) == {None}


PROVENANCE = {
    "date": "2026-01-01",
    "device": "d",
    "target": "t",
    "draft": "e",
    "git_commit": "c",
    "versions": {"sglang": "0"},
    "command": "python x",
}


def test_results_are_appended_and_an_interrupted_run_keeps_its_cells(tmp_path):
    rows = rows_of(Cell(1, 0.0, "t"))
    first = Ledger(tmp_path, PROVENANCE, summarise)
    first.put("cell", rows)
    del first  # interrupted after one cell of several
    second = Ledger(tmp_path, {**PROVENANCE, "date": "2026-01-02"}, summarise)
    second.check_columns(row_fields())
    second.describe(profiles={"cast": "p.json"})
    second.put("cell", rows[:2], is_final=False)
    assert second.rows == rows[:2]
    second.put("cell", rows)
    second.close(is_complete=True)

    content = json.loads((tmp_path / "results.json").read_text())
    assert [run["complete"] for run in content["runs"]] == [False, True]
    assert content["rows"] == content["runs"][1]["rows"] == content["runs"][0]["rows"]
    assert content["provenance"]["profiles"] == {"cast": "p.json"}
    assert content["summary"] == summarise(rows)
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["date"] for line in lines] == ["2026-01-01"] * 4 + ["2026-01-02"] * 4
    assert lines[0]["tok_s"] == "10.0 10.0 10.0"
    assert lines[0]["sglang_version"] == "0"


def test_a_cell_that_lacks_a_group_is_kept(tmp_path):
    rows = rows_of(Cell(1, 0.0, "t"))
    ledger = Ledger(tmp_path, PROVENANCE, summarise)
    ledger.put(1, rows)
    ledger.put(2, rows, is_final=False)
    ledger.close(is_complete=False)
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["complete"], len(content["rows"])) == (False, 8)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 8
    Ledger(tmp_path / "nothing", PROVENANCE, summarise).close(is_complete=False)
    assert list((tmp_path / "nothing").iterdir()) == []


def test_results_of_another_kind_are_left_alone(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    ledger = Ledger(tmp_path, PROVENANCE, summarise)
    with pytest.raises(ValueError, match="other columns"):
        ledger.check_columns(row_fields())
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="another directory"):
        Ledger(tmp_path, PROVENANCE, summarise)
    # A file of one run, as earlier versions wrote it, becomes the first of several.
    (tmp_path / "results.json").write_text('{"provenance": {}, "rows": [{"arm": "old"}]}')
    (tmp_path / "results.csv").unlink()
    Ledger(tmp_path, PROVENANCE, summarise).put(1, rows_of(Cell(1, 0.0, "t")))
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["rows"][0]["arm"] for run in runs] == ["old", "plain"]
