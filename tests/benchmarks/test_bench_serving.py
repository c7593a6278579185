"""The arithmetic behind the benchmark's numbers, on streams whose speed is known."""

import asyncio
import contextlib
import csv
import itertools
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bench_serving
from benchmarks.bench_serving import choose_cells
from benchmarks.harness import cells, phases
from benchmarks.harness.arms import STATIC_GRID, Arm, parse_arm, parse_arms, split
from benchmarks.harness.cells import Cell, choose_prompts, run
from benchmarks.harness.counters import TOTALS
from benchmarks.harness.dialogues import Dialogue
from benchmarks.harness.options import parse_args
from benchmarks.harness.pairs import Pair
from benchmarks.harness.streams import Answer, accept_length, latencies, steady_window
from benchmarks.harness.tasks import Task


def steps(start: float, seconds: float, gains: list[int], lag: float = 0.0) -> Answer:
    """A request whose first token comes at `start` and that gains tokens each step after it."""
    answer = Answer(times=[start + lag], counts=[1])
    for gain in gains:
        answer.times.append(answer.times[-1] + seconds)
        answer.counts.append(answer.counts[-1] + gain)
    return answer


def test_window_of_one_request_is_all_its_steps():
    assert steady_window([steps(5.0, 0.1, [3] * 10)], 1) == pytest.approx((30, 1.0))


def test_window_ends_with_the_first_request_and_begins_with_the_last():
    fast = steps(0.0, 0.1, [4] * 10)  # ends at 1.0
    slow = steps(0.2, 0.1, [2] * 20)  # begins at 0.2
    tokens, seconds = steady_window([fast, slow], 2)
    assert seconds == pytest.approx(0.8)
    assert tokens == pytest.approx(8 * 4 + 8 * 2)


def test_window_holds_the_requests_that_took_a_place_and_their_first_tokens():
    first, second = steps(0.0, 0.1, [4] * 10), steps(1.5, 0.1, [4] * 10)
    second.sent = 1.0
    beside = steps(0.0, 0.1, [2] * 40)
    # Of the one sent later all 41 tokens; of the one beside it those until the place stays empty.
    tokens, seconds = steady_window([first, beside, second], 2, end=2.5)
    assert (tokens, seconds) == pytest.approx((40 + 41 + 50, 2.5))


def test_arrival_one_after_the_other_costs_no_tokens():
    # Eight requests of one step reach the client up to 7 ms apart.
    answers = [steps(0.0, 0.1, [3] * 20, lag=0.001 * i) for i in range(8)]
    tokens, seconds = steady_window(answers, 8)
    assert tokens / seconds == pytest.approx(8 * 3 / 0.1)


def test_requests_that_never_ran_together_are_an_error():
    with pytest.raises(ValueError, match="no moment"):
        steady_window([steps(0.0, 0.1, [1] * 5), steps(9.0, 0.1, [1] * 5)], 2)


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
    tokens, elapsed = steady_window(answers, len(answers))
    assert elapsed == pytest.approx(min(map(len, gains)) * seconds)
    assert 0 < tokens <= sum(map(sum, gains)) + 1e-6
    # Steps are equally long, so all answers together gain the shortest one's number of them.
    assert tokens == pytest.approx(sum(sum(each[: min(map(len, gains))]) for each in gains))


def test_latencies_share_a_gap_among_the_tokens_it_brought():
    answer = Answer(sent=1.0, times=[1.2, 1.5, 1.6], counts=[1, 4, 5])
    latency = latencies([answer])
    assert (latency["ttft_p50_ms"], latency["ttft_p99_ms"]) == (200.0, 200.0)
    assert latency["itl_p50_ms"] == pytest.approx(100.0)
    slow = Answer(sent=0.0, times=[1.0, 2.0], counts=[1, 2])
    latency = latencies([answer] * 9 + [slow])
    assert latency["ttft_p50_ms"] == pytest.approx(200.0)
    assert latency["ttft_p99_ms"] > 900
    assert 100 < latency["itl_p99_ms"] < 1000
    assert set(latencies([]).values()) == {None}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_gaps_add_up_to_the_time_in_which_tokens_came(gains, seconds):
    answer = steps(0.0, seconds, gains)
    latency = latencies([answer])["itl_p50_ms"]
    if sum(gains) == 0:
        assert latency is None
    else:
        least = seconds / max(gains) * 1e3
        assert least - 1e-2 <= latency <= seconds * 1e3 + 1e-2


SPEEDS = {"plain": 10.0, "a": 15.0, "b": 20.0, "cast": 30.0}


@given(st.integers(1, 12), st.integers(2, 8))
def test_every_group_fits_and_has_the_plain_arm(num_others, at_once):
    others = [Arm(f"cast+r={number}", "cast") for number in range(num_others)]
    arms = [*others, Arm("plain", "plain")]
    made = split(arms, at_once)
    assert max(map(len, made)) <= at_once
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert all([arm.kind for arm in each].count("plain") == 1 for each in made)
    names = [arm.name for each in made for arm in each if arm.kind != "plain"]
    assert sorted(names) == sorted(arm.name for arm in others)
    if len(made) == 1:
        assert made == [arms]
    if len(others) > at_once:
        with pytest.raises(ValueError, match="need the arm plain"):
            split(others, at_once)


def test_accept_length_weighs_by_passes():
    answers = [Answer(counts=[10], verify_passes=2), Answer(counts=[10], verify_passes=8)]
    assert accept_length(answers) == 2.0


def test_prompts_fill_whole_batches():
    assert choose_prompts(["a", "b", "c"], batch=2, num_requests=7) == list("abcabcab")
    assert choose_prompts(["a", "b", "c"], batch=3, num_requests=5) == list("abcabcabc")


ARM = Arm("plain", "plain")


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


def test_as_many_run_as_there_are_places_and_dialogues_go_on_at_once(monkeypatch):
    running, most, sent, pools = 0, 0, [], []

    async def stream(client, prompt, temperature, num_tokens, pool):
        nonlocal running, most
        pools.append(pool)
        running, most = running + 1, max(most, running + 1)
        sent.append(prompt)
        started = asyncio.get_running_loop().time()
        # The first dialogue is slow, so the other place takes what remains.
        await asyncio.sleep(0.3 if prompt[0] == 1 else 0.02)
        running -= 1
        answer = steps(started + 0.01, 0.001, [2] * 10)
        answer.sent, answer.text = started, f"answer {prompt[0]}"
        return answer

    def dialogue(number: int, turns: int) -> Dialogue:
        return Dialogue(turns, lambda answers: [number, *(len(text) for text in answers)])

    monkeypatch.setattr(cells, "stream", stream)
    requests = [dialogue(1, 1), dialogue(2, 2)._replace(pool="a"), dialogue(3, 1), dialogue(4, 3)]
    tok_s, answers = run(FakeServer(), requests, Cell(2, 0.0, "t"), 21)
    assert (most, tok_s > 0) == (2, True)
    assert sent == [[1], [2], [2, 8], [3], [4], [4, 8], [4, 8, 8]]
    # Both turns of a dialogue name one pool, and another one when it is played again.
    first = pools[1]
    assert pools == [None, first, first, None, None, None, None] and first.endswith(" a")
    pools.clear()
    run(FakeServer(), requests[:2], Cell(2, 0.0, "t"), 21)
    assert pools[1].endswith(" a") and pools[1] != first
    # In the order of the requests, whenever they ended.
    assert [answer.text[-1] for answer in answers] == list("1223444")

    # To warm up, an arm that learns takes all tokens, another a few; measured answers differ.
    taken = []

    async def short(client, prompt, temperature, num_tokens, pool):
        taken.append(num_tokens)
        return steps(0.0, 0.1, [1])

    monkeypatch.setattr(cells, "stream", short)
    servers = {"plain": FakeServer(), "cast": FakeServer()}
    arms = [ARM, Arm("cast", "cast")]
    cells.warm_up(arms, servers, Cell(2, 0.0, "t"), ["a", "b", "c"], 99)
    assert taken == [cells.WARMUP_TOKENS] * 2 + [99] * 2


def test_answers_differ_in_length_around_the_mean():
    lengths = cells.answer_lengths(128, 96)
    assert lengths[:3] == [64, 143, 94]
    assert (min(lengths), max(lengths)) == (64, 191)
    assert abs(statistics.mean(lengths) - 128) < 2
    assert cells.answer_lengths(1, 4) == [1, 1, 1, 1]


def test_arms():
    assert parse_arm("plain", "d").flags == ()
    static = parse_arm("static:3-1-4", "d")
    assert static.name == "static:3-1-4"
    assert static.flags[-1] == "4"
    assert parse_arm("static", "d").name == "static:5-4-8"
    assert "eagle" in parse_arm("cast:eagle", "d", "p.json").flags
    draftless = parse_arm("cast+draft=none+residuals=off", "d", "p.json")
    assert draftless.flags == ("--speculative-algorithm", "CAST", "--cast-residuals", "off")
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
    args.cold = 2
    assert choose_cells(args, tasks()) == [
        *chosen,
        *(cell._replace(phase="cold") for cell in chosen),
    ]
    greedy = parse_args(["--temperatures", "0"])
    with pytest.raises(ValueError, match="above 0"):
        choose_cells(greedy, {"best-of-2": tasks()["best-of-2"]})


def test_smoke_only_changes_defaults():
    args = parse_args(["--smoke", "--batches", "2"])
    assert (args.arms, args.batches, args.repeats) == (["plain", "cast:auto"], [2], 1)
    assert parse_args([]).tasks == ["code"]
    assert parse_args(["--pair", "smollm2"]).tasks == ["mt-bench"]
    kinds = {arm.kind for arm in parse_arms(parse_args([]).arms, "d")}
    assert kinds == {"plain", "static", "adaptive", "cast"}
    full = parse_args(["--full", "--temperatures", "0"])
    assert (full.temperatures, full.batches[:6]) == ([0.0], [1, 2, 4, 8, 16, 32])
    assert parse_args(["--prompts", "x.jsonl"]).tasks == []


@pytest.mark.parametrize(
    "words",
    [
        ["--model-path", "m"],
        ["--smoke", "--model-path", "m", "--draft-model-path", "d"],
        ["--smoke", "--pair", "smollm2"],
        ["--pair", "smollm2", "--model-path", "m", "--draft-model-path", "d"],
        ["--pair", "large"],
        ["--tokens", "3"],
        ["--batches", "0"],
        ["--repeats", "0"],
        ["--warmup-tokens", "1"],
        ["--smoke", "--full"],
        ["--cooldown", "-1"],
        ["--cold", "-1"],
    ],
)
def test_wrong_command_lines_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert "error:" in capsys.readouterr().err


class Bench:
    """The benchmark with servers and runs that are made up.

    Attributes:
        started: the arms of each start.
        profiles: what each start was given for the user's profiles.
        served: the cell, the requests and the tokens of each run.
        broken: arms that fail at batch 4.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[list[str]] = []
        self.profiles: list[Path | None] = []
        self.served: list[tuple[Cell, int, int]] = []
        self.broken: set[str] = set()
        # A run of tests has a handler of its own.
        monkeypatch.setattr(bench_serving, "exit_on_sigterm", lambda: None)
        monkeypatch.setattr(phases, "serving", self.serving)
        monkeypatch.setattr(bench_serving, "choose_pair", lambda args: (Pair("a/t", "a/d"), "note"))
        monkeypatch.setattr(bench_serving, "load_tasks", lambda args, pair: tasks())
        monkeypatch.setattr(cells, "run", self.run_one)
        monkeypatch.setattr(cells, "play", lambda *words: [])

    @contextlib.contextmanager
    def serving(self, arms, model, log_dir, flags, on_start, at_once, profiles):
        self.started.append([arm.name for arm in arms])
        self.profiles.append(profiles)
        assert profiles is None or list(profiles.iterdir()) == []
        with on_start(arms):
            pass
        yield {arm.name: FakeServer(arm.name, arm.kind) for arm in arms}

    def run_one(self, server, requests, cell, num_tokens):
        self.served.append((cell, len(requests), num_tokens))
        if server.name in self.broken and cell.batch == 4:
            raise ValueError("no moment at which all requests decoded")
        answer = Answer(times=[0.1, 1.1], counts=[1, num_tokens], verify_passes=8)
        return SPEEDS.get(server.kind, 20.0), [answer] * len(requests)


def test_a_whole_run_without_servers(tmp_path, monkeypatch, capsys):
    bench = Bench(monkeypatch)
    bench.broken |= {"static:3-1-4"}
    words = "--arms plain,static,cast:auto,static:3-1-4 --profile p.json --at-once 3 --repeats 2"
    words += f" --out {tmp_path} --temperatures 0,1 --tokens 40 --batches"
    assert bench_serving.main([*words.split(), "1,2"]) == 0
    assert bench.started == [["plain", "static:5-4-8", "static:3-1-4"], ["plain", "cast:auto"]]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["complete"] and content["provenance"]["profiles"] == {"cast:auto": "p.json"}
    assert len(content["rows"]) == 6 * 5
    assert {row["vs_best_static"] for row in content["rows"] if row["arm"] == "cast:auto"} == {1.5}

    # An arm fails in the second cell of the first group; only its own later rows are missing.
    assert bench_serving.main([*words.split(), "1,4"]) == 1
    assert "static:3-1-4 failed and is left out from here on: no moment" in capsys.readouterr().err
    content = json.loads((tmp_path / "results.json").read_text())
    assert [run["complete"] for run in content["runs"]] == [True, False]
    assert len(content["rows"]) == 6 * 5 - 5
    cells_of = [(row["batch"], row["task"]) for row in content["rows"] if "3-1-4" in row["arm"]]
    assert cells_of == [(1, "code")]
    [failure] = content["provenance"]["failures"]
    assert (failure["arm"], failure["batch"]) == ("static:3-1-4", 4)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2 * 6 * 5 - 5

    # The arm is well again: only its group is served, without the cell that was finished.
    bench.started.clear()
    bench.served.clear()
    bench.broken.clear()
    assert bench_serving.main([*words.split(), "1,4", "--resume"]) == 0
    assert bench.started == [["plain", "static:5-4-8", "static:3-1-4"]]
    measured_cells = {cell for cell, *_ in bench.served}
    assert len(measured_cells) == 5 and Cell(1, 0.0, "code") not in measured_cells
    resumed = json.loads((tmp_path / "results.json").read_text())
    assert [run["complete"] for run in resumed["runs"]] == [True, True]
    assert len(resumed["rows"]) == 6 * 5 and not resumed["provenance"]["failures"]
    assert resumed["provenance"]["date"] == content["provenance"]["date"]
    assert [part["command"][-8:] for part in resumed["provenance"]["resumed"]] == ["--resume"]
    with open(tmp_path / "results.csv", newline="") as file:
        lines = [(line["batch"], line["arm"], line["vs_plain"]) for line in csv.DictReader(file)]
    assert len(lines) == 2 * 6 * 5
    assert sorted(lines[30:]) == sorted(
        (str(row["batch"]), row["arm"], str(row["vs_plain"])) for row in resumed["rows"]
    )
    # Of a run that is complete nothing is left to do; of another one nothing can be taken.
    bench.started.clear()
    assert bench_serving.main([*words.split(), "1,4", "--resume"]) == 0 and not bench.started
    assert bench_serving.main([*words.split(), "1,2", "--resume"]) == 1
    assert "differs in batches" in capsys.readouterr().err
    # Where every arm fails, the run says so and ends.
    bench.broken |= {"plain", "static:5-4-8", "static:3-1-4", "cast:auto"}
    assert bench_serving.main([*words.split(), "1,4", "--repeats", "1"]) == 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert {row["batch"] for row in content["rows"]} == {1}
    assert len(content["provenance"]["failures"]) == 5


def test_cold_cells_are_those_of_servers_started_for_them(tmp_path, monkeypatch, capsys):
    bench = Bench(monkeypatch)
    words = "--arms plain,static,cast:auto --profile p.json --repeats 1 --cold 2 --at-once 3"
    words += f" --out {tmp_path} --tokens 40 --batches 1,4"
    assert bench_serving.main(words.split()) == 0
    # One start for all warm cells, then one for each cold cell and repeat.
    assert bench.started == [["plain", "static:5-4-8", "cast:auto"]] * (1 + 2 * 2)
    assert bench.profiles[0] is None and None not in bench.profiles[1:]
    assert len(set(bench.profiles)) == 5 and not any(map(Path.exists, bench.profiles[1:]))
    # Accept length is 40 / 8, so 100 steps are 500 tokens a place: 12 answers of 42.
    cold = [taken for taken in bench.served if taken[0].phase == "cold"]
    assert [taken[1:] for taken in cold] == [(12, 42)] * 6 + [(48, 42)] * 6
    content = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["arm"], row["batch"], row["phase"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == 3 * 2 * 2
    auto = rows["cast:auto", 4, "cold"]
    assert (auto["vs_plain"], auto["vs_best_static"], len(auto["tok_s"])) == (3.0, 1.5, 2)
    assert auto["steps_a_run"] == 12 * 8 and rows["plain", 1, "warm"]["tok_s"] == [10.0]
    assert [(row["phase"], row["arm"]) for row in content["summary"]] == [
        (phase, arm) for phase in ("warm", "cold") for arm in ("plain", "static:5-4-8", "cast:auto")
    ]
    assert content["provenance"]["cold"] == 2
    assert content["provenance"]["cold_profiles"] == {"cast:auto": "p.json"}
    assert "cold, tokens/s: plain 10.0" in capsys.readouterr().err

    # An arm that fails cold is not started again, and its cold cells are missing.
    bench.started.clear()
    bench.broken |= {"cast:auto"}
    assert bench_serving.main([*words.split(), "--repeats", "3"]) == 1
    content = json.loads((tmp_path / "results.json").read_text())
    failures = content["provenance"]["failures"]
    assert [(lost["batch"], lost["phase"]) for lost in failures] == [(4, "warm"), (4, "cold")]
    assert bench.started[-2:] == [["plain", "static:5-4-8", "cast:auto"], ["plain", "static:5-4-8"]]
