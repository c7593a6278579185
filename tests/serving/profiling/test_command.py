"""`cast-sglang profile`: the engine it starts, the file it leaves, and how it fails."""

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from cast_sglang.config import PENDING
from cast_sglang.costs.profiles import load_profile, user_profile_path
from cast_sglang.costs.schema import ModelIdentity, ServingRecord
from cast_sglang.errors import HostError, ProfileError
from cast_sglang.profiling.journal import journal_path
from cast_sglang.serving.profiling import command
from tests.support.builders import make_identity
from tests.support.meters import BrokenMeter, FlatMeter

SETTINGS = ("CAST_PROFILE", "CAST_CALIBRATION_FILE")
RECORD = ServingRecord(steps=9, median_ratio=1.5, median_error=0.3, p95_error=0.4)


class Engine:
    """SGLang's engine; each test says what its call does."""

    def __init__(self, server_args):
        self.server_args, self.is_shut_down = server_args, False
        self.settings = {name: os.environ[name] for name in SETTINGS}
        Engine.last = self

    def collective_rpc(self, method, **parameters):
        self.method, self.parameters = method, parameters
        self.does(parameters)

    def shutdown(self):
        self.is_shut_down = True


@pytest.fixture
def engine(monkeypatch):
    from sglang.srt import plugins, server_args
    from sglang.srt.entrypoints import engine

    monkeypatch.setattr(engine, "Engine", Engine)
    monkeypatch.setattr(plugins, "load_plugins", lambda: None)
    monkeypatch.setattr(server_args, "prepare_server_args", list)
    return Engine


@pytest.fixture
def identity(monkeypatch, tmp_path):
    """The host that is measured, with a target in a local directory and a cache of its own."""
    from sglang.srt.arg_groups import overrides

    target = ModelIdentity(name="/home/me/models/target", config_hash="a" * 64, architectures=["L"])
    identity = make_identity(target=target)
    monkeypatch.setattr(overrides, "resolving_view", lambda args: args)
    monkeypatch.setattr(command, "host_identity", lambda args: identity)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return identity


@pytest.fixture
def scheduler_of(monkeypatch):
    """Return a function that makes the scheduler of an engine that this meter measures."""

    def complete(scheduler, found):
        # So that a failure loses no measurement, and a second run need not repeat it.
        assert load_profile(found.path) == found.profile and journal_path(found.path).exists()
        return found._replace(profile=msgspec.structs.replace(found.profile, serving=RECORD))

    monkeypatch.setattr(command, "complete_profile", complete)

    def make(meter):
        monkeypatch.setattr(command, "measure_on_all_ranks", lambda scheduler, run: run(meter))
        worker = SimpleNamespace(server_args=SimpleNamespace())
        return SimpleNamespace(draft_worker=worker, tp_group=SimpleNamespace(world_size=1))

    return make


def facts_of(parameters):
    Path(parameters["facts"]).write_text(json.dumps({"seconds": 1.5}))


def test_an_engine_is_started_that_waits_for_its_profile(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine.does = staticmethod(facts_of)
    argv = ["--model-path", "T", "--speculative-draft-model-path", "D"]
    facts = command.profile_server(argv, "p.json", quick=True, budget_seconds=9.0, command="C")
    assert facts == {"seconds": 1.5}
    assert engine.last.server_args == [*argv, "--speculative-algorithm", "CAST"]
    assert engine.last.settings == {"CAST_PROFILE": PENDING, "CAST_CALIBRATION_FILE": "none"}
    assert engine.last.method == command.RPC_METHOD and engine.last.is_shut_down
    # The engine's processes may run in another directory.
    assert engine.last.parameters["output"] == str(tmp_path / "p.json")
    assert engine.last.parameters["quick"] is True
    assert engine.last.parameters["budget_seconds"] == 9.0


def test_a_failed_call_is_one_error_and_leaves_no_engine(engine):
    def fail(parameters):
        raise AssertionError("the time budget ended")

    engine.does = staticmethod(fail)
    with pytest.raises(HostError, match="profiling failed: the time budget ended"):
        command.profile_server([], None)
    assert engine.last.is_shut_down and engine.last.parameters["output"] is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_engines_settings_end_with_it(engine, fails):
    def call(parameters):
        assert not fails
        facts_of(parameters)

    engine.does = staticmethod(call)
    with pytest.raises(HostError) if fails else contextlib.nullcontext():
        command.profile_server([], "p.json")
    assert not any(name in os.environ for name in SETTINGS)


@pytest.mark.parametrize("is_named", [True, False])
def test_a_measured_profile_is_saved_with_what_it_was_measured_on(
    identity, scheduler_of, tmp_path, is_named
):
    named, facts = tmp_path / "named.json", tmp_path / "facts.json"
    parameters = {
        "output": str(named) if is_named else None,
        "facts": str(facts),
        "quick": True,
        "budget_seconds": None,
        "command": "cast-sglang profile --quick --model-path /home/me/models/target",
    }
    command._measure_and_serve(scheduler_of(FlatMeter()), parameters)
    short = identity.target.name.removeprefix("/home/me/")
    path = named if is_named else next((tmp_path / "cache").rglob("*.json"))
    profile = load_profile(path)
    told = json.loads(facts.read_text())
    assert (told["output"], told["serving_steps"]) == (str(path), 9)
    assert profile.serving == RECORD
    provenance = profile.provenance
    assert not provenance.estimated
    # A profile may be published, so it does not tell where a model lies.
    assert provenance.target.name == short == "models/target"
    assert provenance.command == "cast-sglang profile --quick --model-path models/target"
    assert "/home/me" not in path.read_text()
    assert profile.target.time_us[0][0][0] == pytest.approx(1000.0)
    assert not journal_path(path).exists()
    if not is_named:
        assert path.name.startswith("nvidia-h200__target__draft__tp1")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, ""),
        (ProfileError("the time budget\n  ended"), "the time budget ended"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_call_answers_with_one_line(monkeypatch, error, message):
    def measure(scheduler, parameters):
        if error is not None:
            raise error

    monkeypatch.setattr(command, "_measure_and_serve", measure)
    answer = command.handle_rpc(SimpleNamespace(draft_worker=None), {})
    assert (answer.success, answer.message) == (error is None, message)


def test_a_failed_measurement_leaves_no_profile(identity, scheduler_of, tmp_path):
    parameters = {"output": str(tmp_path / "p.json"), "quick": True, "budget_seconds": None}
    with pytest.raises(ProfileError):
        command._measure_and_serve(scheduler_of(BrokenMeter()), parameters)
    assert not (tmp_path / "p.json").exists() and not user_profile_path(identity).exists()
