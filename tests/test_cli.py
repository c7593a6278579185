"""The command line: exit codes, one-line errors, what goes where."""

import json
import sys
import types

import pytest
from builders import make_identity, make_profile, make_table

from cast_sglang import __version__
from cast_sglang.cli import main
from cast_sglang.errors import HostError
from cast_sglang.profiles import save_profile


@pytest.fixture
def paths(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    save_profile(make_profile(), first)
    other = make_profile(make_identity(device_name="B200"), target=make_table(500.0), plain=None)
    save_profile(other, second)
    return first, second


@pytest.fixture
def profiled(monkeypatch):
    """Replace the serving edge; collect how it was called."""
    calls = []

    def profile_server(server_argv, **options):
        calls.append((server_argv, options))
        return {"output": options["output"], "seconds": 1.0}

    module = types.ModuleType("cast_sglang.serving.measure")
    module.profile_server = profile_server
    monkeypatch.setitem(sys.modules, "cast_sglang.serving.measure", module)
    return calls


def test_show(paths, capsys):
    assert main(["show", str(paths[0])]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out and "org/Target-8B + org/Draft" in out
    assert "target: one verify pass" in out and "Step overhead" in out


def test_compare(paths, capsys):
    assert main(["show", str(paths[0]), str(paths[1])]) == 0
    out = capsys.readouterr().out
    assert "B200" in out and "second / first" in out
    target = out.split("target: one verify pass")[1].split("draft: one layer")[0]
    assert target.count("0.50") >= 16  # the second target is twice as fast everywhere


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_plot(paths, tmp_path, name, magic):
    pytest.importorskip("matplotlib")
    figure = tmp_path / name
    assert main(["show", *map(str, paths), "--plot", str(figure)]) == 0
    assert figure.read_bytes().startswith(magic)


def test_plot_of_another_kind(paths, capsys):
    assert main(["show", str(paths[0]), "--plot", "p.gif"]) == 2
    assert ".png or .svg" in capsys.readouterr().err


def test_error_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main(["show", str(tmp_path / "missing.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: profile ") and captured.err.count("\n") == 1


def test_profile_passes_other_flags_through_in_order(profiled, capsys):
    flags = ["--model-path", "T", "--tp-size=2", "--trust-remote-code", "--mem-fraction", "0.5"]
    argv = ["profile", *flags[:2], "--output", "x.json", "--quick", *flags[2:]]
    assert main([*argv, "--budget-seconds", "60"]) == 0
    [(server_argv, options)] = profiled
    assert server_argv == flags
    assert options["output"] == "x.json" and options["quick"] is True
    assert options["budget_seconds"] == 60.0
    assert options["command"].startswith("cast-sglang profile --model-path T --output x.json")
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"output": "x.json", "seconds": 1.0}


def test_profile_does_not_take_abbreviations(profiled):
    main(["profile", "--output", "x.json", "--out", "y"])
    assert profiled[0][0] == ["--out", "y"]


def test_profile_failure(profiled, monkeypatch, capsys):
    def fail(server_argv, **options):
        raise HostError("no GPU here")

    monkeypatch.setattr(sys.modules["cast_sglang.serving.measure"], "profile_server", fail)
    assert main(["profile", "--output", "x.json"]) == 2
    assert capsys.readouterr() == ("", "error: no GPU here\n")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["dance"],
        ["show"],
        ["show", "a", "--unknown"],
        ["profile"],
        ["profile", "--output", "x", "--budget-seconds", "0"],
        ["profile", "--output", "x", "--budget-seconds", "nan"],
    ],
)
def test_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["profile", "--help"], ["show", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0 and "cast-sglang" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"cast-sglang {__version__}"
