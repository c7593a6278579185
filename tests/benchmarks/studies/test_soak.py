"""The soak: a short one of real servers, and that it would see what it looks for."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest

from benchmarks.harness.faults import FAULTS
from benchmarks.studies import soak
from benchmarks.studies.soak import Soak, main, parse_args, wave_sizes
from tests.support.preloaded import PreloadedServer

REQUESTS = 132


@pytest.mark.server
@pytest.mark.extended
@pytest.mark.timeout(900)
def test_everything_goes_wrong_and_nothing_is_lost(tmp_path):
    options = ["--requests", str(REQUESTS), "--wave", "12", "--prompts", "22", "--rate", "20"]
    code = main([*options, "--out", str(tmp_path)], kind=PreloadedServer)
    content = json.loads((tmp_path / "soak.json").read_text())
    assert code == 0, content["wrong"] or content["checks"]
    assert content["ok"] and content["requests"] == REQUESTS and not content["wrong"]
    # Every fault has happened, and hit what it was to hit.
    assert content["faults"].keys() == FAULTS.keys() and all(content["faults"].values())
    assert {"answered", "aborted", "refused", "vanished", "broken"} <= content["by_end"].keys()
    assert content["retracted"] > 0
    assert len(content["accept_lengths"]) == len(FAULTS)
    assert {holding["life"] for holding in content["holdings"]} == {1, 2, 3}
    log = (tmp_path / "soak.log").read_text()
    assert f"{REQUESTS} of {REQUESTS} requests, 0 wrong, accept length" in log
    assert content["lost"] == content["altered"] == content["leaked"] == 0
    # What a kill has left half written is said, and does not stop the next start.
    log = (tmp_path / "cast-3.log").read_text()
    assert "half-written.json" in log
    lines = [line for line in log.splitlines() if "starting without it" in line]
    assert lines and all("/calibration/" in line for line in lines)


@pytest.mark.parametrize(
    ("problem", "check"),
    [
        ("lost: no answer", "lost"),
        ("altered: [1]", "altered"),
        ("leaked: 3 tokens", "leaked"),
        ("unending: after SIGTERM", "unending"),
    ],
)
def test_a_problem_fails_its_check(tmp_path, problem, check):
    run = Soak(parse_args(["--out", str(tmp_path)]))
    run.accept = [3.0, 3.3, 2.9]
    assert all(run.checks().values())
    run.note(problem)
    assert [name for name, holds in run.checks().items() if not holds] == [check]
    assert {name: count for name, count in run.counts().items() if count} == {check: 1}


class Pool:
    """A server that is idle and holds some tokens, until a flush."""

    def __init__(self, held):
        self.held = held

    def check(self):
        pass

    def flush_cache(self):
        self.held = 0

    def get(self, path):
        load = {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": self.held}
        return {"loads": [load]}


@pytest.mark.parametrize("held", [0, 3])
def test_a_lost_token_of_the_cache_is_seen(tmp_path, monkeypatch, held):
    monkeypatch.setattr(soak, "SETTLE_SECONDS", 0.0)
    run = Soak(parse_args(["--out", str(tmp_path)]))
    run._subject = SimpleNamespace(server=Pool(held))
    asyncio.run(run._settle(7))
    assert run.checks()["leaked"] == (held == 0)
    assert not run.wrong or run.wrong[0].startswith("leaked: wave 7 leaves")


def test_drafts_that_get_worse_fail(tmp_path):
    run = Soak(parse_args(["--out", str(tmp_path)]))
    for accept, holds in (
        ([3.0, 3.0, 2.0], False),
        ([3.0], False),  # too short to tell
        ([3.0, 1.0, 3.0, 3.0, 3.0, 3.0, 2.9, 1.0, 2.9], True),  # a slow moment on either side
        ([3.0, 3.0, 3.0, 2.8, 2.7, 2.6, 2.3, 2.2, 2.9], False),
    ):
        run.accept = accept
        assert run.checks()["accept"] == holds


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (soak.ServerError("it ended"), "lost: the server is gone: ServerError: it ended"),
        (httpx.ConnectError("refused"), "lost: the server is gone: ConnectError: refused"),
        (SystemExit(143), "unfinished: this program was told to end"),
    ],
)
def test_a_run_that_ends_early_has_failed_and_says_so(tmp_path, monkeypatch, capsys, error, wrong):
    def run(self):
        raise error

    monkeypatch.setattr(Soak, "run", run)
    assert main(["--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "soak.json").read_text())["wrong"] == [wrong]
    assert "NOT all holds" in capsys.readouterr().out


def test_waves_are_even():
    assert wave_sizes(10, 4) == [4, 3, 3] and wave_sizes(4, 9) == [4]


def test_a_bad_command_line_ends_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(["--rate", "0"])
    assert error.value.code == 2 and "--rate must be above 0" in capsys.readouterr().err
