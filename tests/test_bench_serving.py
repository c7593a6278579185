"""The arithmetic behind the benchmark's numbers, on streams whose speed is known."""

import csv
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cells
from benchmarks.arms import STATIC_GRID, Arm, parse_arm, parse_arms
from benchmarks.bench_serving import choose_cells, parse_args
from benchmarks.cells import Cell, Result, choose_prompts, run
from benchmarks.counters import TOTALS, gained, step_means
from benchmarks.dialogues import Dialogue
from benchmarks.ledger import Ledger
from benchmarks.rows import as_rows, as_table, ratio, row_fields, summarise, summary_table
from benchmarks.streams import Answer, accept_length, latencies, steady_window
from benchmarks.tasks import Task


def steps(start: float, seconds: float, gains: list[int], lag: float = 0.0) -> Answer:
    """A request whose first token comes at `start` and that gains tokens each step after it."""
    answer = Answer(times=[start + lag], counts=[1])
    for gain in gains:
        answer.times.append(answer.times[-1] + seconds)
        answer.counts.append(answer.counts[-1] + gain)
    return answer


def test_window_of_one_request_is_all_its_steps():
    assert steady_window([steps(5.0, 0.1, [3] * 10)]) == pytest.approx((30, 1.0))


def test_window_ends_with_the_first_request_and_begins_with_the_last():
    fast = steps(0.0, 0.1, [4] * 10)  # ends at 1.0
    slow = steps(0.2, 0.1, [2] * 20)  # begins at 0.2
    tokens, seconds = steady_window([fast, slow])
    assert seconds == pytest.approx(0.8)
    assert tokens == pytest.approx(8 * 4 + 8 * 2)


def test_arrival_one_after_the_other_costs_no_tokens():
    # Eight requests of one step reach the client up to 7 ms apart.
    answers = [steps(0.0, 0.1, [3] * 20, lag=0.001 * i) for i in range(8)]
    tokens, seconds = steady_window(answers)
    assert tokens / seconds == pytest.approx(8 * 3 / 0.1)


def test_requests_that_never_ran_together_are_an_error():
    with pytest.raises(ValueError, match="no moment"):
        steady_window([steps(0.0, 0.1, [1] * 5), steps(9.0, 0.1, [1] * 5)])


@given(
    st.lists(
        st.lists(st.integers(1, 8), min_size=3, max_size=30).map(lambda gains: [*gains, 1]),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.001, 2.0),
)
def test_a_window_never_holds_more_than_was_streamed(gains, seconds):
    answers = [steps(0.0, seconds, each) for each in gains]
    tokens, elapsed = steady_window(answers)
    assert elapsed == pytest.approx(min(map(len, gains)) * seconds)
    assert 0 < tokens <= sum(map(sum, gains)) + 1e-6
    # Steps are equally long, so all answers together gain the shortest one's number of them.
    assert tokens == pytest.approx(sum(sum(each[: min(map(len, gains))]) for each in gains))


def test_latencies_share_a_gap_among_the_tokens_it_brought():
    answer = Answer(sent=1.0, times=[1.2, 1.5, 1.6], counts=[1, 4, 5])
    told = latencies([answer])
    assert (told["ttft_p50_ms"], told["ttft_p99_ms"]) == (200.0, 200.0)
    assert told["itl_p50_ms"] == pytest.approx(100.0)
    slow = Answer(sent=0.0, times=[1.0, 2.0], counts=[1, 2])
    told = latencies([answer] * 9 + [slow])
    assert told["ttft_p50_ms"] == pytest.approx(200.0)
    assert told["ttft_p99_ms"] > 900
    assert 100 < told["itl_p99_ms"] < 1000
    assert set(latencies([]).values()) == {None}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_gaps_add_up_to_the_time_in_which_tokens_came(gains, seconds):
    answer = steps(0.0, seconds, gains)
    told = latencies([answer])["itl_p50_ms"]
    if sum(gains) == 0:
        assert told is None
    else:
        least = seconds / max(gains) * 1e3
        assert least - 1e-2 <= told <= seconds * 1e3 + 1e-2


def test_ratio_is_formed_within_a_repeat():
    # The machine halves its speed in the second repeat; the ratio does not move.
    assert ratio(Result(tok_s=[20, 10, 20]), Result(tok_s=[10, 5, 10])) == 2.0
    assert ratio(Result(tok_s=[1.0]), None) is None


ARMS = [Arm("plain", "plain"), Arm("a", "static"), Arm("b", "static"), Arm("cast", "cast")]
SPEEDS = {"plain": 10.0, "a": 15.0, "b": 20.0, "cast": 30.0}


def result(name: str, speed: float | None = None) -> Result:
    ids = [1, 2] if name == "a" else [1, 3]
    answer = Answer(
        times=[0.1, 0.2],
        counts=[1, 12],
        output_ids=ids,
        verify_passes=0 if name == "plain" else 4,
    )
    return Result(tok_s=[SPEEDS[name] if speed is None else speed] * 3, answers=[answer])


def rows_of(cell: Cell, **changes: float) -> list[dict]:
    return as_rows(cell, ARMS, {arm.name: result(arm.name, changes.get(arm.name)) for arm in ARMS})


def test_rows_compare_with_plain_and_with_the_best_static_arm():
    by_arm = {row["arm"]: row for row in rows_of(Cell(8, 0.0, "t"))}
    cast = by_arm["cast"]
    assert (cast["vs_plain"], cast["vs_best_static"], cast["best_static"]) == (3.0, 1.5, "b")
    assert (cast["vs_plain_min"], cast["vs_plain_max"]) == (3.0, 3.0)
    assert (by_arm["a"]["vs_best_static"], by_arm["b"]["vs_best_static"]) == (0.75, 1.0)
    assert (by_arm["plain"]["accept_length"], cast["accept_length"]) == (None, 3.0)
    assert (by_arm["a"]["identical_to_plain"], cast["identical_to_plain"]) == (False, True)
    assert cast["ttft_p50_ms"] == 100.0
    assert {row["identical_to_plain"] for row in rows_of(Cell(8, 0.8, "t"))} == {None}
    assert all(list(row) == row_fields() for row in by_arm.values())


def test_rows_without_plain_and_static_have_no_ratios():
    [row] = as_rows(Cell(1, 0.0, "t"), ARMS[3:], {"cast": result("cast")})
    assert (row["vs_plain"], row["vs_best_static"], row["best_static"]) == (None, None, None)
    assert (row["identical_to_plain"], row["num_identical"]) == (None, None)


def test_the_summary_is_a_geometric_mean_over_batches():
    rows = rows_of(Cell(1, 0.0, "t"), cast=20.0) + rows_of(Cell(8, 0.0, "t"), cast=80.0)
    [told] = [row for row in summarise(rows) if row["arm"] == "cast"]
    assert (told["task"], told["vs_plain"], told["vs_best_static"]) == ("t", 4.0, 2.0)
    # Several tasks or temperatures also get a mean over all cells.
    rows += rows_of(Cell(1, 1.0, "u"), cast=10.0)
    summary = {
        (row["task"], row["temperature"]): row for row in summarise(rows) if row["arm"] == "cast"
    }
    assert list(summary) == [("t", 0.0), ("u", 1.0), ("all", None)]
    assert summary["all", None]["vs_plain"] == pytest.approx(16 ** (1 / 3), abs=1e-4)
    assert as_table(rows).row_count == len(rows)
    assert summary_table(summarise(rows)).row_count == 3 * len(ARMS)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6))
def test_the_summary_lies_between_the_cells(ratios):
    rows = [
        {"arm": "x", "batch": batch, "temperature": 0, "task": "t", "vs_plain": value}
        | {"vs_best_static": None}
        for batch, value in enumerate(ratios)
    ]
    [told] = summarise(rows)
    assert min(ratios) - 1e-3 <= told["vs_plain"] <= max(ratios) + 1e-3
    assert told["vs_best_static"] is None


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
    told = step_means(moved)
    assert told["plain_share"] == 0.1
    assert (told["mean_layers"], told["mean_verify_rows"]) == (4.5, 6.0)
    assert (told["mean_predicted_us"], told["predicted_to_measured"]) == (1000.0, 0.5)
    assert (told["mean_policy_us"], told["policy_share"]) == (50.0, 0.025)
    del moved["plain_steps"]
    assert step_means(moved)["plain_share"] is None, "not every version counts them"
    # 24 tokens a step of a predicted millisecond.
    assert told["table_rate"] == pytest.approx(24_000)
    assert set(step_means(gained(before, before)).values()) == {None}


def test_accept_length_weighs_by_passes():
    answers = [Answer(counts=[10], verify_passes=2), Answer(counts=[10], verify_passes=8)]
    assert accept_length(answers) == 2.0


def test_prompts_fill_whole_batches():
    assert choose_prompts(["a", "b", "c"], batch=4, num_requests=5) == list("abcabcab")


class FakeServer:
    """What `run` asks of a server."""

    url = "http://fake"

    def __init__(self, name: str = "", kind: str = "") -> None:
        self.name, self.kind, self.steps = name, kind, 0

    def check(self) -> None: ...

    def flush_cache(self) -> None: ...

    def get(self, path: str) -> dict:
        assert (path, self.kind) == ("/server_info", "cast")
        self.steps += 1
        counters = dict.fromkeys(TOTALS, self.steps)
        return {"internal_states": [{"cast": {**counters, "profile": {"path": "/x/p.json"}}}]}


def test_a_batch_of_dialogues_answers_each_turn_together(monkeypatch):
    waves: list[list[list[int]]] = []

    async def stream_batch(url, prompts, temperature, num_tokens):
        waves.append(list(prompts))
        # The second turn takes twice as long.
        made = [steps(0.0, 0.1 * len(waves), [2] * 10) for _ in prompts]
        for number, answer in enumerate(made):
            answer.text = f"answer {number}"
        return made

    def dialogue(number: int, turns: int) -> Dialogue:
        return Dialogue(turns, lambda answers: [number, *(len(text) for text in answers)])

    monkeypatch.setattr(cells, "stream_batch", stream_batch)
    tok_s, answers = run(FakeServer(), [dialogue(1, 2), dialogue(2, 3)], Cell(2, 0.0, "t"), 21)
    assert waves == [[[1], [2]], [[1, 8], [2, 8]]]
    assert tok_s == pytest.approx(2 * (2 * 20) / (1.0 + 2.0))
    assert len(answers) == 4


def test_arms():
    assert parse_arm("plain", "d").flags == ()
    static = parse_arm("static:3-1-4", "d")
    assert static.name == "static:3-1-4"
    assert static.flags[-1] == "4"
    assert parse_arm("static", "d").name == "static:5-4-8"
    assert "eagle" in parse_arm("cast:eagle", "d", "p.json").flags
    adaptive = parse_arm("adaptive", "d")
    assert "--speculative-adaptive" in adaptive.flags
    assert (adaptive.label, parse_arm("cast:fixed:2-2-1", "d").label) == (
        "SGLang adaptive",
        "CAST fixed:2-2-1",
    )
    wrong = ("", "plain:1", "static:3-1", "static:x-1-4", "fast", "adaptive:3", "static-grid")
    for text in (*wrong, "plain+r=1", "cast+", "static:5-4-8+calibration=off"):
        with pytest.raises(ValueError):
            parse_arm(text, "d")


def test_settings_of_an_arm_become_flags_after_its_own():
    arm = parse_arm("cast:auto+calibration=off+verify_sizes=1,8+allow-foreign-profile", "d", "p")
    assert arm.flags[-5:] == (
        *("--cast-calibration", "off", "--cast-verify-sizes", "1,8"),
        "--cast-allow-foreign-profile",
    )
    assert arm.name == "cast:auto+calibration=off+verify_sizes=1,8+allow-foreign-profile"
    assert parse_arm("plain+--random-seed=7", "d").flags == ("--random-seed", "7")
    assert parse_arm("static+--random-seed=7", "d").name == "static:5-4-8+--random-seed=7"


def test_the_grid_is_static_arms_beside_those_named():
    arms = parse_arms(["plain", "static-grid", "static", "adaptive"], "d")
    names = [arm.name for arm in arms]
    assert names == ["plain", *(f"static:{shape}" for shape in STATIC_GRID), "adaptive"]
    for arm in arms[1:-1]:
        _, topk, tokens = map(int, arm.flags[-5::2])
        assert topk > 1 or tokens == int(arm.flags[-5]) + 1, "a chain verifies all it drafts"
    assert [arm.name for arm in parse_arms(["static-grid"], "d", None, ["2-2-4"])] == [
        "static:2-2-4"
    ]
    with pytest.raises(ValueError, match="at most once"):
        parse_arms(["cast", "cast"], "d")


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
    first.add(rows)
    del first  # interrupted after one cell of several
    second = Ledger(tmp_path, {**PROVENANCE, "date": "2026-01-02"}, summarise)
    second.check_columns(row_fields())
    second.describe(profiles={"cast": "p.json"})
    second.add(rows[:2])
    second.add(rows[2:])
    second.finish()

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
    Ledger(tmp_path, PROVENANCE, summarise).add(rows_of(Cell(1, 0.0, "t")))
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["rows"][0]["arm"] for run in runs] == ["old", "plain"]


def tasks() -> dict[str, Task]:
    once = Dialogue(1, lambda answers: [1])
    return {"code": Task("code", [once]), "best-of-2": Task("best-of-2", [once], samples=2)}


def test_samples_are_drawn_only_above_temperature_zero():
    args = parse_args(["--temperatures", "0,1", "--batches", "1,8"])
    chosen = choose_cells(args, tasks())
    assert chosen == [
        *itertools.starmap(Cell, [(1, 0, "code"), (8, 0, "code"), (1, 1, "code"), (8, 1, "code")]),
        *itertools.starmap(Cell, [(1, 1, "best-of-2"), (8, 1, "best-of-2")]),
    ]
    greedy = parse_args(["--temperatures", "0"])
    with pytest.raises(ValueError, match="above 0"):
        choose_cells(greedy, {"best-of-2": tasks()["best-of-2"]})


def test_smoke_only_changes_defaults():
    args = parse_args(["--smoke", "--batches", "2"])
    assert (args.arms, args.batches, args.repeats) == (["plain", "cast:auto"], [2], 1)
    assert parse_args([]).tasks == ["code"]
    assert parse_args(["--prompts", "x.jsonl"]).tasks == []


@pytest.mark.parametrize(
    "words",
    [
        ["--model-path", "m"],
        ["--smoke", "--model-path", "m", "--draft-model-path", "d"],
        ["--tokens", "3"],
        ["--batches", "0"],
        ["--repeats", "0"],
        ["--warmup-tokens", "1"],
    ],
)
def test_wrong_command_lines_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert "error:" in capsys.readouterr().err
