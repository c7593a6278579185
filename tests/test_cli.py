"""The command line: exit codes, one-line errors, what goes where."""

import json
import sys
import types

import pytest

from cast_sglang import __version__
from cast_sglang.cli import main
from cast_sglang.costs.profiles import save_profile
from cast_sglang.errors import HostError
from cast_sglang.serving.launch import doctor
from cast_sglang.serving.launch.diagnosis import Diagnosis
from tests.support import traces
from tests.support.builders import make_identity, make_profile, make_table
from tests.support.configs import LLAMA_8B


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

    module = types.ModuleType("cast_sglang.serving.profiling.command")
    module.profile_server = profile_server
    monkeypatch.setitem(sys.modules, "cast_sglang.serving.profiling.command", module)
    return calls


def test_show(paths, capsys):
    assert main(["show", str(paths[0]), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out and "org/Target-8B + org/Draft" in out
    assert "target: one verify pass" in out and "Step overhead" in out
    assert "ESTIMATED" not in out and "picture" not in out


def test_two_profiles_are_compared(paths, capsys):
    assert main(["show", str(paths[0]), str(paths[1]), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "B200" in out and "second / first" in out


def test_a_comparison_warns_of_nothing_about_servers(paths, tmp_path, capsys, caplog):
    """Even where the second profile ends far below the first."""
    save_profile(
        make_profile(target=make_table(batch_sizes=(1, 2)), step_overhead_us=None), paths[1]
    )
    assert main(["show", *map(str, paths), "--plot", str(tmp_path / "p.png")]) == 0
    out, err = capsys.readouterr()
    assert "of the second: extrapolated" in out and "server" not in out
    assert err == "" and not caplog.records


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


@pytest.mark.parametrize("error", [None, 0.01, 0.051])
def test_a_rough_profile_asks_for_more_time(error, monkeypatch, profiled, capsys):
    facts = {"output": "x.json", "heldout_median_error": error}
    measure = sys.modules["cast_sglang.serving.profiling.command"]
    monkeypatch.setattr(measure, "profile_server", lambda server_argv, **options: facts)
    assert main(["profile", "--output", "x.json", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == facts
    assert ("off by 5.1%" in err and "--budget-seconds 60" in err) == (error == 0.051)
    assert bool(err) == (error == 0.051)


def test_profile_does_not_take_abbreviations(profiled):
    main(["profile", "--output", "x.json", "--out", "y"])
    assert profiled[0][0] == ["--out", "y"]


def test_profile_failure(profiled, monkeypatch, capsys):
    def fail(server_argv, **options):
        raise HostError("no GPU here")

    monkeypatch.setattr(
        sys.modules["cast_sglang.serving.profiling.command"], "profile_server", fail
    )
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
        pytest.param(["profile"], marks=pytest.mark.slow),  # these three import SGLang
        pytest.param(["profile", "--output", "x", "--budget-seconds", "0"], marks=pytest.mark.slow),
        pytest.param(
            ["profile", "--output", "x", "--budget-seconds", "nan"], marks=pytest.mark.slow
        ),
        ["replay"],
        ["replay", "t", "--policy", "best"],
        ["replay", "t", "--unknown"],
        ["tune", "t", "--evaluations", "1"],
        ["trace"],
        ["trace", "show", "t"],
    ],
)
def test_bad_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("profile", "estimate", "show", "doctor", "replay", "tune", "trace")
        ),
        ["trace", "show", "--help"],
    ],
)
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0 and "cast-sglang" in capsys.readouterr().out


@pytest.fixture
def recorded(tmp_path):
    """A trace and its profile."""
    tables = traces.make_tables()
    trace = traces.Recorder(traces.default_policy(), tables).run(12)
    save_profile(tables, tmp_path / "p.json")
    return [str(traces.write(trace, tmp_path / "t.jsonl")), "--profile", str(tmp_path / "p.json")]


def test_replay_on_a_gpu_that_is_not_at_hand(recorded, tmp_path, capsys):
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA_8B))
    trace, elsewhere = recorded[0], str(tmp_path / "h200.json")
    given = ["--model-config", str(tmp_path / "llama.json"), "--output", elsewhere]
    assert main(["estimate", "--gpu", "H200", *given]) == 0
    assert main(["replay", trace, "--profile", elsewhere]) == 2
    assert "--allow-foreign" in capsys.readouterr().err
    for policy in ("auto", "fixed"):
        argv = ["replay", trace, "--profile", elsewhere, "--allow-foreign", "--policy", policy]
        assert main(argv) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "ESTIMATED: these tables were computed, not measured" in said
        assert "All predicted times are those of NVIDIA H200 (estimated)" in said
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tables"] == {"device_name": "NVIDIA H200 (estimated)", "estimated": True}
    assert not found["is_prediction"] and found["rows"][0]["replayed"]["tokens_per_second"] > 0


def test_replay(recorded, capsys):
    assert main(["replay", *recorded]) == 0
    out = capsys.readouterr().out
    assert "replayed: policy auto" in out and "off the measured one" in out
    assert max(map(len, out.splitlines())) <= 100
    assert main(["replay", *recorded, "--c1", "2", "--r", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"] == "fixed" and found["thresholds"] == {"c1": 2.0, "r": 4}
    assert found["rows"][0]["replayed"]["tokens_per_second"] > 0


def test_tune(recorded, capsys):
    assert main(["tune", *recorded, "--evaluations", "3", "--max-steps", "50"]) == 0
    assert "--cast-policy fixed --cast-c1" in capsys.readouterr().out
    assert main(["tune", *recorded, "--evaluations", "2", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["speeds"]) == {
        "tuned", "recorded", "auto", "fixed tree"
    }  # fmt: skip


def test_trace_show(recorded, tmp_path, capsys):
    assert main(["trace", "show", recorded[0], "--out", str(tmp_path / "out"), "--steps", "3"]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'out' / 'index.html'}\n"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["replay", "missing"], "cannot be read"),
        (["replay", "TRACE", "--policy", "auto", "--c1", "2"], "has no thresholds"),
        (["replay", "TRACE", "--c1", "nan"], "c1=nan"),
        (["replay", "TRACE", "--no-copies"], "--no-copies: trace"),
        (["replay", "TRACE", "--switch-at", "5"], "holds no copies; record with --cast-copying on"),
        (["tune", "missing"], "cannot be read"),
        (["trace", "show", "TRACE", "--out", "x", "--steps", "99"], "--steps 99"),
    ],
)
def test_errors_of_traces_are_one_line(recorded, argv, reason, capsys):
    argv = [recorded[0] if word == "TRACE" else word for word in argv]
    profile = recorded[1:] if argv[0] != "trace" else []
    assert main([*argv, *profile]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"cast-sglang {__version__}"


@pytest.mark.parametrize(
    ("flags", "url", "others"),
    [
        ([], None, []),
        (["--probe", "http://localhost:1"], "http://localhost:1", []),
        (["--probe", "--model-path", "T"], "", ["--model-path", "T"]),
    ],
)
def test_doctor_is_told_what_to_probe(monkeypatch, capsys, flags, url, others):
    seen = []

    def examine(argv, **options):
        seen.append((argv, options))
        return Diagnosis([])

    monkeypatch.setattr(doctor, "examine", examine)
    assert main(["doctor", "--json", *flags]) == 0
    assert seen == [(others, {"cast_profile": None, "probe_url": url})]
    assert json.loads(capsys.readouterr().out) == {"ok": True, "checks": []}
