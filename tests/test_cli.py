"""The command line: exit codes, one-line errors, what goes where."""

import json
import sys
import types

import msgspec
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
    assert main(["show", str(paths[0]), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out and "org/Target-8B + org/Draft" in out
    assert "target: one verify pass" in out and "Step overhead" in out
    assert "ESTIMATED" not in out and "picture" not in out


def test_show_summarises(paths, capsys):
    assert main(["show", str(paths[0]), "--no-plot"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("      4"))
    # Batch 4 at context 1024: (1 + 0.02 * 4 + 0.4096) ms, 8 rows (1 + 0.02 * 32 + 0.4096) ms.
    assert line.split() == ["4", "1.49", "1.38x", "0.10x", "0.14x"]


def test_show_an_estimate(tmp_path, capsys):
    profile = make_profile(make_identity(device_name="[H200]"))
    provenance = msgspec.structs.replace(profile.provenance, estimated=True)
    path = tmp_path / "estimate.json"
    save_profile(make_profile(provenance=provenance), path)
    assert main(["show", str(path), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ESTIMATED") and "[H200]" in out


def test_compare(paths, capsys):
    assert main(["show", str(paths[0]), str(paths[1]), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "B200" in out and "second / first" in out
    target = out.split("target: one verify pass")[1].split("draft: one layer")[0]
    assert target.count("0.50") >= 16  # the second target is twice as fast everywhere


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_plot(paths, tmp_path, capsys, name, magic):
    figure = tmp_path / name
    assert main(["show", *map(str, paths), "--plot", str(figure)]) == 0
    assert figure.read_bytes().startswith(magic)
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {figure}"


def test_plots_into_the_current_directory(paths, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["show", str(paths[0])]) == 0
    assert main(["show", *map(str, paths)]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["first.png", "first__vs__second.png"]
    assert capsys.readouterr().out.splitlines()[-1] == "picture: first__vs__second.png"


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
        ["show", "a", "--plot", "p.png", "--no-plot"],
        ["profile"],
        ["profile", "--output", "x", "--budget-seconds", "0"],
        ["profile", "--output", "x", "--budget-seconds", "nan"],
    ],
)
def test_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--help"], ["profile", "--help"], ["show", "--help"], ["doctor", "--help"]]
)
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0 and "cast-sglang" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"cast-sglang {__version__}"
