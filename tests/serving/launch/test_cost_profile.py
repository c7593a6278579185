"""The cost profile of a launch: what is said of it, and the command that measures one."""

import argparse
import logging
import os
import shlex
from types import SimpleNamespace

import msgspec
import pytest
from sglang.srt import platforms
from sglang.srt.server_args import ServerArgs

from cast_sglang.config import CastConfig
from cast_sglang.costs import profiles
from cast_sglang.costs.profiles import FoundProfile, save_profile, user_profile_path
from cast_sglang.errors import ProfileError
from cast_sglang.serving.launch import cost_profile as module
from cast_sglang.serving.launch.cost_profile import (
    FLAGS,
    announce_profile,
    find_server_profile,
    in_force,
    profile_command,
)
from tests.support.builders import make_identity, make_profile

OTHER = make_identity(device_name="B200")


def parser():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


def parse(argv):
    """Return the server arguments of a command line, as SGLang makes them."""
    return ServerArgs.from_cli_args(parser().parse_args(argv))


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """A host of a made-up device, with a cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "profile_directories", lambda: [user_profile_path(OTHER).parent])
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(device_name="cuda"))
    return make_identity()


# The command


def words_of(server_args, identity=None):
    """Return the words of the advised command behind `cast-sglang profile`."""
    words = shlex.split(profile_command(server_args, identity or make_identity()))
    start = words.index("profile")
    assert words[start - 1].rpartition("/")[2] == "cast-sglang"
    return words[start + 1 :]


def test_the_command_measures_what_the_server_was_given(tmp_path, monkeypatch):
    (tmp_path / "my models" / "target").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    argv = ["--model-path", "my models/target", "--speculative-draft-model-path", "org/draft"]
    argv += ["--trust-remote-code", "--attention-backend", "flashinfer", "--tp-size", "2"]
    argv += ["--dtype", "float16", "--revision", "r1", "--mem-fraction-static", "0.5"]
    argv += ["--json-model-override-args", '{"a": 1}', "--max-running-requests", "7"]
    words = words_of(parse([*argv, "--port", "1", "--api-key", "secret"]))
    assert words[-2:] == ["--output", str(user_profile_path(make_identity()))]
    again = parse(words[:-2])
    expected = parse(["--model-path", str(tmp_path / "my models" / "target"), *argv[2:]])
    # Neither where it listens nor a key.
    assert msgspec.structs.asdict(again) == msgspec.structs.asdict(expected)


def test_what_sglang_resolved_is_resolved_again():
    args = parse(["--model-path", "org/target", "--speculative-draft-model-path", "org/draft"])
    resolved = SimpleNamespace(
        **{**msgspec.structs.asdict(args), "attention_backend": "cast_cpu", "tp_size": 8},
        _raw_input=msgspec.structs.asdict(args),
    )
    flags = ["--model-path", "org/target", "--speculative-draft-model-path", "org/draft"]
    assert words_of(resolved)[:-2] == flags


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_is_one_of_sglangs(name):
    flag = "--" + name.replace("_", "-")
    [action] = [action for action in parser()._actions if flag in action.option_strings]
    assert action.dest == name


def test_on_the_cpu_platform_the_command_selects_it(monkeypatch):
    args = parse(["--model-path", "t"])
    assert "SGLANG_PLATFORM" not in profile_command(args, make_identity())
    monkeypatch.setattr(platforms, "current_platform", SimpleNamespace(device_name="cast_cpu"))
    assert profile_command(args, make_identity()).startswith("SGLANG_PLATFORM=cast_cpu ")


@pytest.mark.parametrize(("is_on_path", "expected"), [(True, "cast-sglang"), (False, "/bin/")])
def test_the_command_is_that_of_this_installation(tmp_path, monkeypatch, is_on_path, expected):
    program = tmp_path / "bin" / "cast-sglang"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") if is_on_path else os.devnull)
    first = shlex.split(profile_command(parse(["--model-path", "t"]), make_identity()))[0]
    assert first == expected if is_on_path else first == str(program)


# What is said


def announced(caplog, **settings):
    """Return the lines of a launch and whether each is a warning."""
    args = parse(["--model-path", "/m/t", "--speculative-draft-model-path", "/m/d"])
    with caplog.at_level(logging.INFO):
        announce_profile(CastConfig(**settings), args, make_identity())
    assert all(record.getMessage().startswith("CAST: ") for record in caplog.records)
    return [(record.getMessage(), record.levelname) for record in caplog.records]


def test_without_a_profile_a_launch_says_that_one_will_be_measured(host, caplog):
    save_profile(make_profile(OTHER), user_profile_path(OTHER))
    why, line = announced(caplog)
    assert line[0] == (
        "CAST: no cost profile of this device and pair; a quick one is measured before the first "
        f"request (a minute or two) and kept in {user_profile_path(host)}"
    )
    assert "the nearest" in why[0] and "device_name B200, here NVIDIA H200" in why[0]
    assert {why[1], line[1]} == {"INFO"}


def test_a_worker_searches_without_a_word(host, caplog):
    save_profile(make_profile(OTHER), user_profile_path(OTHER))
    args = parse(["--model-path", "/m/t"])
    with caplog.at_level(logging.INFO):
        assert find_server_profile(CastConfig(), args, host) is None
        save_profile(make_profile(make_identity(page_size=2)), user_profile_path(host))
        assert find_server_profile(CastConfig(), args, host).path == user_profile_path(host)
    assert not caplog.records


def test_a_profile_that_is_found_is_named_with_where_and_when(host, caplog):
    save_profile(make_profile(), user_profile_path(host))
    [(line, level)] = announced(caplog)
    path = user_profile_path(host)
    where = "measured on NVIDIA H200 on 2026-01-01 in 12 s; error unknown: nothing was served or "
    where += "held out"
    assert line == f"CAST: decides by {path}, {where}; serving corrects it" and level == "INFO"
    caplog.clear()
    [(line, _)] = announced(caplog, residuals="off")
    assert line.endswith(where)


def test_an_estimate_that_is_found_says_how_to_measure(host, caplog):
    profile = make_profile()
    provenance = msgspec.structs.replace(profile.provenance, estimated=True)
    save_profile(make_profile(provenance=provenance), user_profile_path(host))
    [(line, level)] = announced(caplog)
    assert "ESTIMATED, not measured, on NVIDIA H200" in line and level == "WARNING"
    assert "for better tables run: " in line and "--model-path /m/t" in line


def test_what_does_not_fit_exactly_is_warned_of(host, caplog):
    save_profile(make_profile(make_identity(page_size=16)), user_profile_path(host))
    (warning, level), (line, _) = announced(caplog)
    assert "another page_size 16, here 1" in warning and level == "WARNING"
    assert "decides by" in line


@pytest.mark.parametrize(
    ("settings", "says", "level"),
    [
        ({"profile": "estimate"}, "ESTIMATED from the device's bandwidth", "WARNING"),
        ({"profile": "none", "policy": "eagle"}, "policy eagle decides by no", "INFO"),
    ],
)
def test_a_launch_that_searches_no_profile_says_so(caplog, settings, says, level):
    [(line, found)] = announced(caplog, **settings)
    assert says in line and found == level


def test_policy_eagle_promises_no_measurement(host, caplog):
    _, (line, _) = announced(caplog, policy="eagle")
    assert line.endswith("policy eagle needs none")
    caplog.clear()
    save_profile(make_profile(), user_profile_path(host))
    [(line, _)] = announced(caplog, policy="eagle")
    assert line == f"CAST: policy eagle does not decide by {user_profile_path(host)}"


def test_a_foreign_profile_that_was_named_stops_the_launch_with_a_command(tmp_path):
    save_profile(make_profile(OTHER), tmp_path / "p.json")
    args = parse(["--model-path", "/m/t", "--trust-remote-code"])
    config = CastConfig(profile=str(tmp_path / "p.json"))
    for search in (announce_profile, find_server_profile):
        with pytest.raises(ProfileError, match="profile --model-path /m/t --trust-remote-code"):
            search(config, args, make_identity())


def test_estimates_name_no_seconds(tmp_path):
    provenance = msgspec.structs.replace(make_profile().provenance, estimated=True)
    found = FoundProfile(make_profile(provenance=provenance), tmp_path / "p.json", [])
    text = "ESTIMATED, not measured, on NVIDIA H200 on 2026-01-01"
    assert in_force(found) == f"decides by {tmp_path / 'p.json'}, {text}"
