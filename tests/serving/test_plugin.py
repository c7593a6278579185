"""The entry point: flags, hooks, internal state and one-line errors."""

import argparse
import os
import sys
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import (
    GetInternalStateReqOutput,
    RpcReqInput,
    SetInternalStateReq,
)
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.speculative import spec_registry

from cast_sglang.config import CastConfig, given_flags
from cast_sglang.errors import ConfigError, HostError
from cast_sglang.serving import plugin, step_room
from cast_sglang.serving.host_patches import hooks
from cast_sglang.serving.launch import arguments
from cast_sglang.serving.profiling import command
from tests.support.hooks import collect_hooks, hooked


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back what a launch exports."""
    for key in given_flags(argparse.Namespace()):
        name = f"CAST_{key.upper()}"
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def exported():
    return {name for name in os.environ if name.startswith("CAST_")}


def launch(*argv, algorithm="EAGLE"):
    """Parse flags as a server does, and hand them to its processes."""
    parser = argparse.ArgumentParser()
    plugin._add_flags(None, parser)
    parser.set_defaults(speculative_algorithm=algorithm)
    plugin._export_flags(object, parser.parse_args(argv))


def test_flags_reach_the_processes_of_the_server(tmp_path):
    file = tmp_path / "cast.toml"
    file.write_text("c1 = 7\nc2 = 8\n")
    argv = ["--cast-c1", "1.5", "--cast-verify-sizes", "2,4,8", "--cast-allow-foreign-profile"]
    launch(*argv, "--cast-config", str(file))
    wanted = CastConfig(c1=1.5, c2=8.0, verify_sizes=(2, 4, 8), allow_foreign_profile=True)
    assert CastConfig.load() == wanted
    names = {"CAST_C1", "CAST_VERIFY_SIZES", "CAST_ALLOW_FOREIGN_PROFILE", "CAST_CONFIG"}
    assert exported() == names


def test_a_flag_that_is_not_given_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("CAST_C3", "9")
    launch()
    assert exported() == {"CAST_C3"} and CastConfig.load().c3 == 9.0


def test_a_bad_flag_stops_the_launch_and_exports_nothing():
    with pytest.raises(ConfigError, match="--cast-c2='much'"):
        launch("--cast-c1", "1", "--cast-c2", "much")
    assert exported() == set()


def test_every_flag_is_in_the_help():
    parser = argparse.ArgumentParser()
    plugin._add_flags(None, parser)
    text = parser.format_help()
    for key in given_flags(argparse.Namespace()):
        assert f"--cast-{key.replace('_', '-')}" in text


@pytest.mark.parametrize(
    "flags", [["--cast-polcy", "fixed"], ["--cast-polcy=fixed"], ["--tp", "2", "--cast-polcy"]]
)
def test_a_mistyped_flag_ends_in_one_line(flags):
    with pytest.raises(ConfigError, match="--cast-polcy.*did you mean --cast-policy?"):
        launch(*flags)


def test_flags_of_others_are_argparses_to_refuse(capsys):
    with pytest.raises(SystemExit):
        launch("--polcy", "fixed")
    assert "unrecognized arguments: --polcy fixed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        launch("--cast-c1")
    assert "--cast-c1: expected one argument" in capsys.readouterr().err


def test_a_flag_without_cast_is_told_to_have_no_effect(monkeypatch, caplog):
    launch("--cast-c1", "2", "--cast-trace-full", "--cast-trace", "f", algorithm=None)
    assert "--cast-c1, --cast-trace, --cast-trace-full has no effect" in caplog.text
    caplog.clear()
    monkeypatch.setenv("CAST_C2", "3")  # for another server of this shell, maybe
    launch(algorithm=None)
    assert not caplog.text


def test_a_launch_of_cast_is_checked_before_it_is_exported(monkeypatch):
    seen = []
    monkeypatch.setattr(arguments, "check_device", lambda: seen.append("device"))

    def refuse(args):
        raise HostError("--page-size: use 1")

    monkeypatch.setattr(arguments, "check_flags", refuse)
    with pytest.raises(HostError, match="--page-size"):
        launch("--cast-c1", "2", algorithm="cast")
    assert seen == ["device"] and exported() == set()
    # Servers of other algorithms run on any device and with any flags.
    for algorithm in ("EAGLE3", None):
        launch("--cast-c1", "2", algorithm=algorithm)
    assert seen == ["device"] and exported() == {"CAST_C1"}


def test_what_is_hooked_is_there(monkeypatch):
    monkeypatch.setattr(spec_registry, "_REGISTRY", {})
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    registered = collect_hooks(monkeypatch, plugin, hooks)
    plugin.register()
    assert "CAST" in spec_registry._REGISTRY
    for target in registered:
        assert callable(hooked(target)), target
    kinds = {hook: kind for hook, kind in registered.values()}
    # Those that take the original's place when they want to.
    for hook in (plugin._reset_residuals, plugin._handle_profile_request):
        assert kinds[hook] == HookType.AROUND
    assert kinds[plugin._export_flags] == HookType.BEFORE


def scheduler_of(draft_worker):
    return SimpleNamespace(draft_worker=draft_worker)


@pytest.mark.parametrize("draft_worker", [None, SimpleNamespace()], ids=["plain", "EAGLE"])
def test_other_algorithms_are_left_alone(draft_worker):
    scheduler = scheduler_of(draft_worker)
    state = GetInternalStateReqOutput(internal_state={"a": 1})
    assert plugin._add_internal_state(state, scheduler).internal_state == {"a": 1}
    plugin._make_ready(None, scheduler)
    ours = SetInternalStateReq(server_args={"cast_reset_residuals": 1})
    assert plugin._reset_residuals(None, scheduler, ours).updated is False


@pytest.mark.parametrize("exports", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_metrics_have_sglangs_labels_on_the_ranks_that_export(exports, rank, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "get_parallel", lambda: SimpleNamespace(tp_rank=rank))
    monkeypatch.setattr(step_room, "slots_reserved", lambda: 56)
    seen, labels = [], {"model_name": "m", "engine_type": "unified", "tp_rank": 0}
    stats = SimpleNamespace(export=seen.append)
    worker = SimpleNamespace(cast_stats=stats, device="cpu", lacks_profile=False)
    scheduler = scheduler_of(worker)
    scheduler.metrics_collector_context = SimpleNamespace(
        current_scheduler_metrics_enabled=exports, collector=SimpleNamespace(labels=labels)
    )
    scheduler.max_total_num_tokens, scheduler.max_running_requests = 16384, 48
    with caplog.at_level("INFO"):
        plugin._make_ready(None, scheduler)
    assert seen == [labels] * exports
    # What speculation costs of the cache is said once, by rank 0.
    wanted = "at most 48 requests at once in a cache of 16384 tokens; each reserves 56 slots"
    assert [wanted in line and "16 % of" in line for line in caplog.messages] == [True] * (not rank)


def test_internal_state_has_casts_own():
    draft_worker = SimpleNamespace(cast_state=lambda: {"steps": 3})
    state = GetInternalStateReqOutput(internal_state={"a": 1})
    result = plugin._add_internal_state(state, scheduler_of(draft_worker), "request")
    assert result is state and state.internal_state == {"a": 1, "cast": {"steps": 3}}


@pytest.mark.parametrize("does", [True, False])
def test_residuals_are_reset_by_their_own_setting_alone(does):
    costs = SimpleNamespace(reset=lambda: does)
    scheduler = scheduler_of(SimpleNamespace(costs=costs))

    def original(scheduler, request):
        return "original", request

    ours = SetInternalStateReq(server_args={"cast_reset_residuals": 1})
    assert plugin._reset_residuals(original, scheduler, ours).updated is does
    for settings in ({"cast_reset_residuals": 0}, {"cast_reset_residuals": 1, "x": 2}, {"x": 2}):
        theirs = SetInternalStateReq(server_args=settings)
        assert plugin._reset_residuals(original, scheduler, theirs) == ("original", theirs)


def test_the_profilers_call_is_served_and_others_are_sglangs(monkeypatch):
    monkeypatch.setattr(command, "handle_rpc", lambda scheduler, facts: ("ours", facts))

    def original(scheduler, request):
        return "original", request.method

    ours = RpcReqInput(method=command.RPC_METHOD, parameters={"quick": True})
    assert plugin._handle_profile_request(original, None, ours) == ("ours", {"quick": True})
    theirs = RpcReqInput(method="save_model")
    assert plugin._handle_profile_request(original, None, theirs) == ("original", "save_model")


def test_errors_of_ours_are_one_line(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: seen.append(error))
    plugin._print_errors_as_one_line()
    sys.excepthook(ConfigError, ConfigError("--cast-c1: a number"), None)
    assert capsys.readouterr().err == "cast-sglang: error: --cast-c1: a number\n" and not seen
    other = ValueError("not ours")
    sys.excepthook(ValueError, other, None)
    assert seen == [(ValueError, other, None)] and not capsys.readouterr().err
