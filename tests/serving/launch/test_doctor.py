"""`cast-sglang doctor`: what it reports of good and bad launches, without starting one."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from benchmarks.harness.pairs import ROOT, tiny_pair
from benchmarks.harness.servers import CPU_PLATFORM
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.costs.schema import Heldout
from cast_sglang.serving.launch.diagnosis import Check
from cast_sglang.serving.launch.doctor import check_profile_fit, examine
from tests.support.builders import make_profile
from tests.support.launches import examine as examine_in_process
from tests.support.preloaded import run
from tests.support.profiles import write_profile

TIMEOUT_SECONDS = 600


class Report(NamedTuple):
    code: int
    checks: dict[str, Check]

    def statuses(self, *names: str) -> list[str]:
        return [self.checks[name].status for name in names]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Report]:
    """Examine all launches; by name."""
    directory = tmp_path_factory.mktemp("doctor")
    pair = tiny_pair()
    made_up = str(write_profile(directory / "made-up.json"))
    resized = directory / "resized"
    resized.mkdir()
    config = json.loads((Path(pair.draft) / "config.json").read_text())
    (resized / "config.json").write_text(json.dumps({**config, "intermediate_size": 1999}))

    draft = "--speculative-draft-model-path"
    both = ["--model-path", pair.target, draft, pair.draft]
    foreign = {"CAST_ALLOW_FOREIGN_PROFILE": "1"}
    fitting = ["--max-running-requests", "16", "--context-length", "1088"]
    launches = {
        "no model": ([], {}),
        "covered": ([*both, *fitting, "--cast-profile", made_up], foreign),
        "beyond": ([*both, f"--cast-profile={made_up}"], foreign),
        "foreign": ([*both, "--cast-profile", made_up], {}),
        "none found": (["--model-path", pair.target, draft, str(resized)], {}),
        "no profile wanted": ([*both, "--cast-policy", "eagle", "--cast-profile", "none"], {}),
        "profile wanted": ([*both, "--cast-profile", "none"], {}),
        "unknown flag": ([*both, "--no-such-flag"], {}),
        "refused flag": ([*both, "--page-size", "16", "--speculative-eagle-topk", "4"], {}),
        "no draft": (
            ["--model-path", pair.target, *fitting, "--cast-profile", made_up],
            foreign,
        ),
        "no draft, no copies": (["--model-path", pair.target, "--cast-copying", "off"], {}),
        "another draft": ([*both[:2], draft, pair.target], {}),
        "missing target": (["--model-path", str(directory / "none"), *both[2:]], {}),
        "bad setting": (both, {"CAST_C3": "inf"}),
        "bad flag": ([*both, "--cast-c2", "much"], {}),
    }
    common = {**CPU_PLATFORM, "XDG_CACHE_HOME": str(directory), "HF_HUB_OFFLINE": "1"}
    found = {}
    for name, (argv, env) in launches.items():
        code, out = run(examine_in_process, argv, common | env, directory / f"{name}.log")
        assert "Traceback" not in out
        content = json.loads(out.splitlines()[-1])
        assert content["ok"] == (code == 0)
        found[name] = Report(code, {c["name"]: Check(**c) for c in content["checks"]})
    return found


@pytest.mark.slow
def test_machine_and_settings_without_a_model(reports):
    code, checks = reports["no model"]
    assert code == 0
    for name in ("python", "sglang", "torch", "plugin", "device", "settings"):
        assert checks[name].status == "ok", checks[name]
    assert "cast_cpu is active" in checks["device"].found
    for name in ("server flags", "pair", "profile"):
        assert checks[name].status == "skip" and "not checked" in checks[name].found


@pytest.mark.slow
def test_a_launch_within_its_profile(reports):
    report = reports["covered"]
    assert report.code == 0
    assert report.statuses("server flags", "pair", "memory", "profile range") == ["ok"] * 4
    said = report.checks["memory"].found
    assert "each of at most 16 requests reserves 40 slots of the cache (40 with" in said
    found = report.checks["server flags"].found
    assert "steps 8, topk 8, tokens 32" in found and "reserve" not in found
    assert "LlamaForCausalLMEagle3" in report.checks["pair"].found
    # It is made up and used all the same.
    assert report.statuses("profile", "profile error") == ["warn"] * 2
    assert "although measured elsewhere" in report.checks["profile"].found
    assert "ESTIMATED" in report.checks["profile error"].found


@pytest.mark.slow
def test_a_launch_without_a_draft(reports):
    report = reports["no draft"]
    assert report.code == 0
    assert report.statuses("server flags", "pair", "memory", "profile range") == ["ok"] * 4
    assert "no draft: what is drafted is copied from the text" in report.checks["pair"].found
    assert "steps 31, topk 1, tokens 32" in report.checks["server flags"].found
    assert "states kept" not in report.checks["memory"].found
    assert "nodes a layer" not in report.checks["profile range"].found


@pytest.mark.slow
def test_a_launch_beyond_its_profile(reports):
    beyond = reports["beyond"].checks["profile range"]
    assert beyond.status == "warn" and "batch_sizes at 16" in beyond.found
    assert "cast-sglang profile --model-path" in beyond.fix


@pytest.mark.slow
def test_a_profile_of_another_machine(reports):
    report = reports["foreign"]
    assert report.code == 1 and report.statuses("pair", "profile") == ["ok", "fail"]
    assert "measured elsewhere" in report.checks["profile"].found


@pytest.mark.slow
def test_no_profile_found(reports):
    report = reports["none found"]
    assert report.code == 0 and report.statuses("pair", "profile") == ["ok", "warn"]
    fix = report.checks["profile"].fix
    assert "quick table" in fix and "cast-sglang profile --model-path" in fix


@pytest.mark.slow
def test_no_profile_needed(reports):
    assert reports["no profile wanted"].checks["profile"].status == "ok"


@pytest.mark.parametrize(
    ("name", "check", "says"),
    [
        ("unknown flag", "server flags", "--no-such-flag"),
        ("refused flag", "server flags", "--speculative-eagle-topk 4"),
        ("no draft, no copies", "server flags", "--speculative-draft-model-path"),
        ("another draft", "pair", "no EAGLE"),
        ("missing target", "server flags", "none"),
        ("profile wanted", "settings", "profile=none"),
        ("bad setting", "settings", "CAST_C3"),
        ("bad flag", "settings", "--cast-c2"),
    ],
)
@pytest.mark.slow
def test_what_fails(reports, name, check, says):
    report = reports[name]
    assert report.code == 1
    assert report.checks[check].status == "fail"
    assert says in report.checks[check].found and "\n" not in report.checks[check].found
    assert report.checks["profile"].status == "skip"


@pytest.mark.slow
@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_a_machine_without_a_gpu():
    env = {key: value for key, value in os.environ.items() if key != "SGLANG_PLATFORM"}
    done = subprocess.run(
        [sys.executable, "-m", "cast_sglang.cli", "doctor"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    [number] = [i for i, line in enumerate(lines) if line.startswith("fail")]
    assert "device" in lines[number] and "SGLANG_PLATFORM=cast_cpu" in lines[number + 1]
    assert lines[-1] == "1 failed, 3 not checked"


def test_without_sglang(monkeypatch):
    version = metadata.version

    def missing(name):
        if name == "sglang":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    diagnosis = examine([])
    checks = {check.name: check for check in diagnosis.checks}
    assert diagnosis.exit_code == 1
    assert checks["sglang"].fix.startswith("pip install 'sglang")
    assert checks["the rest"].status == "skip"


def test_an_unsupported_sglang(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "0.4.1" if n == "sglang" else version(n))
    check = next(check for check in examine([]).checks if check.name == "sglang")
    assert check.status == "fail" and "0.4.1" in check.found


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"heldout": Heldout(points=9, median_error=0.04, p95_error=0.09)}, "ok", "4.0%"),
        ({"heldout": Heldout(points=9, median_error=0.12, p95_error=0.3)}, "warn", "12.0%"),
        ({"heldout": None}, "warn", "unknown"),
        (
            {"heldout": Heldout(points=9, median_error=0.0, p95_error=0.0), "estimated": True},
            "warn",
            "ESTIMATED",
        ),
    ],
)
def test_trust_in_a_profile(changes, status, says):
    profile = make_profile()
    provenance = msgspec.structs.replace(profile.provenance, **changes)
    found = FoundProfile(make_profile(provenance=provenance), Path("p.json"), [])
    fit, error = check_profile_fit(found, "COMMAND")
    assert fit.status == "ok" and error.status == status and says in error.found
    assert ("COMMAND" in error.fix) == (status == "warn")
