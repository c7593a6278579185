"""The demo on made-up servers: turns, phases, the end of each, and what is said of them."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.harness.cells import Result
from benchmarks.harness.pairs import PAIRS, SMOLLM2, TINY, Pair
from benchmarks.harness.servers import ServerError
from benchmarks.harness.streams import Answer
from examples import chat, demo

ARMS = ["plain", "static:5-4-8", "cast"]


class Machine:
    """Servers of known speed on a machine whose clock only moves while they serve.

    Attributes:
        now: seconds on its clock.
        start_seconds: what starting a server of each arm takes.
        speed: of a CAST server that has made this many steps, relative to EAGLE-3's.
        drift: of a round, by which every speed is multiplied.
        starts: the arms of each start.
        turns: start, arm, batch size and first prompt of each turn.
        other_text: an arm whose answers at batch 8 are not those of the others.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.start_seconds = 0.0, 60.0
        self.speed = lambda steps: 0.9 if steps < 100 else 1.2
        self.drift = lambda turn: 1.0 + 0.5 * (turn % 7)
        self.starts: list[list[str]] = []
        self.turns: list[tuple[int, str, int, str]] = []
        self.steps = 0.0
        self.other_text = ""
        monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(demo, "serving", self.serving)
        monkeypatch.setattr(demo, "take_turn", self.take_turn)
        known = PAIRS[TINY]._replace(load=lambda: Pair("target", "draft"))
        monkeypatch.setitem(PAIRS, TINY, known)

    @contextlib.contextmanager
    def serving(self, arms, model, log_dir, flags, on_start, at_once, profiles):
        assert profiles == log_dir / "profiles"
        self.starts.append([arm.name for arm in arms])
        self.now += self.start_seconds
        self.steps = 0.0
        yield {arm.name: arm.name for arm in arms}

    def take_turn(self, arm, server, cell, requests, num_tokens):
        assert server == arm.name
        drift = self.drift(len(self.turns) // len(ARMS))
        self.turns.append((len(self.starts), arm.name, cell.batch, requests[0]))
        passes = num_tokens if arm.name == "plain" else num_tokens // 4
        speed = {"plain": 50.0, "static:5-4-8": 100.0}.get(arm.name, 100.0 * self.speed(self.steps))
        if arm.name == "cast":
            self.steps += demo.PER_PLACE * passes
        self.now += num_tokens * demo.PER_PLACE / (speed * drift)
        text = [sum(map(ord, requests[0]))]
        if arm.name == self.other_text and cell.batch == 8:
            text.append(0)
        answer = Answer(counts=[num_tokens], output_ids=text, verify_passes=passes)
        return Result([cell.batch * speed * drift], [answer] * len(requests), Counter())


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    """Run the demo; return its rows by batch size and phase, and what it printed."""
    assert demo.main(["--pair", TINY, "--out", str(tmp_path), "--tokens", "40"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    return {(row["batch"], row["phase"]): row for row in rows}, printed


def test_cold_and_warm_are_told_apart_on_a_machine_that_drifts(machine, tmp_path, capsys):
    rows, printed = run(tmp_path, capsys)
    assert list(rows) == [(1, "cold"), (1, "warm"), (8, "cold"), (8, "warm")]
    assert machine.starts == [ARMS, ARMS]
    for (_, phase), row in rows.items():
        # 20 steps a round: the fifth makes the hundred full. Then rounds agree as soon as six can.
        assert (row["rounds"], row["cast_steps"]) == ((5, 100) if phase == "cold" else (6, 120))
        expected = 0.9 if phase == "cold" else 1.2
        assert row["speedup_vs_eagle3"] == row["speedup_vs_eagle3_low"] == pytest.approx(expected)
        assert row["speedup_vs_plain"] == pytest.approx(2 * expected)
        assert (row["fresh"], row["identical"], row["accept_length"]) == (True, True, 4.0)
    assert rows[8, "warm"]["num_prompts"] == 8 * demo.PER_PLACE * 6
    assert (
        "Batch 1, cold: These are the first 100 steps of CAST's server. CAST is slower" in printed
    )
    assert "Batch 8, warm: CAST is faster than EAGLE-3, 1.20x (1.20 to 1.20)." in printed
    assert printed.count("5 rounds are too few to be sure") == 2

    # All arms of a round serve one text, in changing order; warm rounds begin with the cold text.
    served = [machine.turns[at : at + 3] for at in range(0, len(machine.turns), 3)]
    assert len(served) == 2 * (5 + 6)
    assert all(len({turn[2:] for turn in turns}) == 1 for turns in served)
    assert {tuple(turn[1] for turn in turns) for turns in served} == {
        (*ARMS[by:], *ARMS[:by]) for by in range(3)
    }
    texts = [turns[0][3] for turns in served[:11]]
    assert texts[:5] == texts[5:10] and len(set(texts)) == 6


def test_answers_like_plain_decodings_are_counted_for_both(machine, tmp_path, capsys):
    machine.other_text = "static:5-4-8"
    rows, printed = run(tmp_path, capsys)
    one, eight = rows[1, "warm"], rows[8, "warm"]
    assert one["num_identical"] == one["eagle3_num_identical"] == one["num_prompts"]
    assert (eight["num_identical"], eight["eagle3_num_identical"]) == (eight["num_prompts"], 0)
    assert f"{eight['num_prompts']}, 0 of {eight['num_prompts']}" in printed


def test_a_difference_within_the_noise_is_called_so(machine, tmp_path, capsys):
    source = iter(range(10_000))
    machine.speed = lambda steps: 0.8 if next(source) % 2 else 1.25
    rows, printed = run(tmp_path, capsys)
    warm = rows[8, "warm"]
    assert warm["speedup_vs_eagle3_low"] < 1 < warm["speedup_vs_eagle3_high"]
    assert "Batch 8, warm: CAST and EAGLE-3 differ by no more than the noise" in printed
    # Rounds never agreed, so both batch sizes took all their time and no more.
    assert warm["rounds"] > 20 and demo.TIME_LIMIT - 15 < machine.now <= demo.TIME_LIMIT


def test_where_starts_take_long_both_sizes_share_one_and_it_is_said(machine, tmp_path, capsys):
    machine.start_seconds = 200.0
    rows, printed = run(tmp_path, capsys)
    assert machine.starts == [ARMS]
    assert [row["fresh"] for row in rows.values()] == [True, True, False, False]
    assert "Batch 8, cold: The servers had served the smaller batch size before" in printed
    assert machine.now <= demo.TIME_LIMIT
    # Whatever the time, there is a round of each phase.
    machine.starts.clear()
    machine.now, machine.start_seconds = 0.0, 600.0
    rows, _ = run(tmp_path, capsys)
    assert [row["rounds"] for row in rows.values()] == [1] * 4


def test_a_chat_model_answers_on_the_cast_server_before_the_table(
    machine, tmp_path, capsys, monkeypatch
):
    known = PAIRS[SMOLLM2]._replace(load=lambda: Pair("target", "draft"))
    monkeypatch.setitem(PAIRS, SMOLLM2, known)
    monkeypatch.setattr(demo, "choose_prompts", lambda name, pair: [name, "other"])
    asked = []

    def ask(url, messages, max_tokens, temperature):
        asked.append((url, messages[0]["content"], len(machine.turns)))
        yield chat.Piece("Because of the air.", 5)

    monkeypatch.setattr(chat, "ask", ask)
    url_of = lambda name: SimpleNamespace(url=f"http://{name}")  # noqa: E731
    serving = machine.serving

    @contextlib.contextmanager
    def with_addresses(*arguments):
        with serving(*arguments) as servers:
            yield {name: url_of(name) for name in servers}

    take_turn = machine.take_turn
    monkeypatch.setattr(demo, "serving", with_addresses)
    monkeypatch.setattr(
        demo, "take_turn", lambda arm, server, *rest: take_turn(arm, arm.name, *rest)
    )
    assert demo.main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert asked == [("http://cast", demo.QUESTION, len(machine.turns))]
    assert printed.index("Because of the air.") < printed.index("bf16, greedy, tokens/s")
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert {row["model"] for row in rows} == {"SmolLM2-135M-Instruct"}


def test_what_fails_is_one_line(machine, tmp_path, capsys, monkeypatch):
    def fail(*words):
        raise ServerError("server cast ended")

    monkeypatch.setattr(demo, "take_turn", fail)
    assert demo.main(["--pair", TINY, "--out", str(tmp_path)]) == 1
    assert "demo: error: server cast ended" in capsys.readouterr().err
