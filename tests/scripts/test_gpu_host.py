"""What is packed for a GPU host, and the runner of the check's stages; neither needs a GPU."""

import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from benchmarks.report.data import normalised
from benchmarks.report.readme import BEGIN, END, results_shown
from cast_sglang.costs.profiles import load_profile, save_profile
from scripts.gpu_host import pack, publish, runner
from scripts.gpu_host.__main__ import TOTAL_SECONDS, main
from scripts.gpu_host.checks import CHECKS
from scripts.gpu_host.goals import goals_of
from scripts.gpu_host.install import InstallError, install
from scripts.gpu_host.runner import SKIP_CODE, Outcome, Runner, Stage
from scripts.gpu_host.serving import partings
from scripts.gpu_host.settings import ROOT, Settings, dry_settings
from scripts.gpu_host.stages import STAGES
from scripts.gpu_host.trace import device_times, read_events
from tests.support.builders import make_profile
from tests.support.reported import ORIGIN, SPEEDS, rows_of

PASSES = 'import json, sys; json.dump({"numbers": {"answer": 42}}, open(sys.argv[1], "w"))'
FAILS = 'print("first line"); raise SystemExit("the last word")'
SKIPS = f"""
import json, sys
json.dump({{"message": "nothing to do"}}, open(sys.argv[1], "w"))
sys.exit({SKIP_CODE})
"""
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "import time; time.sleep(600)"


def run(tmp_path, stages, programs, seconds=60.0):
    def command(name, result):
        return [sys.executable, "-c", programs[name], str(result)]

    deadline = time.monotonic() + seconds + runner.GRACE_SECONDS
    made = Runner(tmp_path / "out", tmp_path / "logs", command, deadline, {"mode": "test"})
    return made, made.run(stages)


def summary(tmp_path):
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert content["mode"] == "test"
    return {entry["name"]: entry for entry in content["stages"]}


def test_a_failure_stops_only_what_needs_it(tmp_path):
    programs = {"good": PASSES, "bad": FAILS, "dead": KILLED, "idle": SKIPS, "late": PASSES}
    stages = [Stage(name, 30, f"the {name} one") for name in programs]
    stages.append(Stage("needy", 30, "needs the bad one", ("bad",)))
    stages.append(Stage("content", 30, "needs one with nothing to do", ("idle",)))
    made, is_good = run(tmp_path, stages, {**programs, "needy": PASSES, "content": PASSES})
    assert not is_good
    found = summary(tmp_path)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "dead": "failed",
        "idle": "skipped",
        "late": "passed",
        "needy": "skipped",
        "content": "passed",
    }
    assert found["good"]["numbers"] == {"answer": 42}
    assert "the last word" in found["bad"]["message"]
    assert "-9" in found["dead"]["message"]
    assert found["idle"]["message"] == "nothing to do"
    assert "bad" in found["needy"]["message"]
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert all(name in text for name in found) and "answer: 42" in text
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        assert "logs/bad.log" in archive.getnames()


def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 1.0)
    # A server in a session of its own, started by a stage that does not listen.
    child = tmp_path / "child"
    stubborn = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = subprocess.Popen([sys.executable, "-c", {HANGS!r}], start_new_session=True)
open({str(child)!r}, "w").write(str(server.pid))
time.sleep(600)
"""
    stages = [Stage("hangs", 2, "hangs"), Stage("late", 30, "comes after it")]
    _, is_good = run(tmp_path, stages, {"hangs": stubborn, "late": PASSES})
    assert not is_good
    found = summary(tmp_path)
    assert (
        found["hangs"]["status"] == "failed" and "not done after 2 s" in found["hangs"]["message"]
    )
    assert found["late"]["status"] == "passed"
    pid = int(child.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_whole_ends_in_time(tmp_path):
    stages = [Stage("hangs", 30, "hangs"), Stage("late", 30, "has no time left")]
    began = time.monotonic()
    _, is_good = run(tmp_path, stages, {"hangs": HANGS, "late": PASSES}, seconds=2.0)
    assert not is_good and time.monotonic() - began < 20
    found = summary(tmp_path)
    assert found["late"]["status"] == "skipped" and "no time" in found["late"]["message"]


def test_help_needs_no_package():
    """-S leaves out all installed packages."""
    command = [sys.executable, "-S", "-m", "scripts.gpu_host"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--dry-run" in shown.stdout
    refused = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "psutil" in refused.stderr.splitlines()[-1]


def test_a_second_run_keeps_what_the_first_one_found(tmp_path):
    stages = [Stage("one", 30, "first"), Stage("two", 30, "second")]
    run(tmp_path, stages, {"one": PASSES, "two": FAILS})
    _, is_good = run(tmp_path, stages[1:], {"two": PASSES})
    assert is_good
    assert [entry["status"] for entry in summary(tmp_path).values()] == ["passed", "passed"]


def test_numbers_are_shown_to_people():
    numbers = {
        "rate": 0.123456,
        "rows": [{"arm": "plain", "batch": 1}, {"arm": "cast", "batch": 1}],
    }
    lines = runner.describe(Outcome("speed", "passed", 1.0, 2.0, "", numbers)).splitlines()
    assert lines[0].startswith("PASSED  speed")
    assert lines[1] == "    rate: 0.1235"
    assert lines[-1].strip() == "arm cast, batch 1"


def test_stages_fit_into_ten_minutes(capsys):
    limits = {stage.name: stage.limit_s for stage in STAGES}
    # Nothing is installed where flashinfer is there.
    limits["install"] = max(limits["install"], limits.pop("equality-flashinfer"))
    assert sum(limits.values()) <= TOTAL_SECONDS < 600
    names = [stage.name for stage in STAGES]
    assert names == list(CHECKS)
    for number, stage in enumerate(STAGES):
        assert set(stage.needs) <= set(names[:number])
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_command_line_says_by_its_exit_code_what_came_of_it(tmp_path, capsys):
    work = ["--dry-run", "--work", str(tmp_path)]
    assert main([*work, "--stages", "install"]) == 0
    assert "no --carried" in capsys.readouterr().out
    # There is no large pair yet.
    assert main([*work, "--stages", "profile"]) == 1
    assert "run the stage inflate first" in capsys.readouterr().out
    for wrong, says in ((["--stages", "all"], "is none of install"), (["--carried", "no"], "no")):
        with pytest.raises(SystemExit) as ended:
            main([*work, *wrong])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err


def test_settings_survive_the_way_to_a_stage(tmp_path):
    for settings in (Settings(False, "w", "o", None), dry_settings("w", "o", "c")):
        settings.save(tmp_path / "settings.json")
        loaded = Settings.load(tmp_path / "settings.json")
        assert loaded.flags == settings.flags and list(loaded.batches) == list(settings.batches)
        assert loaded.python == Path("w/venv/bin/python")


# ----------------------------------------------------------------------------------- packing


def make_wheel(path, files):
    """Write a wheel with a correct RECORD; package data by name."""
    info = "toy-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ntoy-says = toy:says\n",
    }
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**files, **metadata}.items():
            wheel.writestr(name, content)
            rows.writerow([name, digest(content.encode()), len(content)])
        rows.writerow([f"{info}/RECORD", "", ""])
        wheel.writestr(f"{info}/RECORD", record.getvalue())
    return path


def digest(content):
    """Return the hash of a file as a RECORD gives it."""
    encoded = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + encoded.decode().rstrip("=")


TOY = {
    "toy/__init__.py": "def says():\n    print('toy')\n",
    "toy/with,comma.py": "",
    "toy/large.so": "x" * 100_000,
}


def test_a_stripped_wheel_lists_just_what_it_holds(tmp_path):
    source = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", TOY)
    carried = tmp_path / "carried" / "wheels"
    carried.mkdir(parents=True)
    stripped = carried / source.name
    pack.strip_wheel(source, stripped, lambda name: not name.endswith(".so"))
    assert stripped.stat().st_size < 5_000 < source.stat().st_size
    with zipfile.ZipFile(stripped) as wheel:
        assert wheel.testzip() is None
        files = {name: wheel.read(name) for name in wheel.namelist()}
    record = files.pop("toy-1.0.dist-info/RECORD").decode()
    rows = {name: (hashed, size) for name, hashed, size in csv.reader(record.splitlines())}
    assert rows.pop("toy-1.0.dist-info/RECORD") == ("", "")
    assert rows == {name: (digest(data), str(len(data))) for name, data in files.items()}
    assert "toy/with,comma.py" in rows and "toy/large.so" not in rows


def test_carried_wheels_are_installed_over_the_hosts_packages(tmp_path):
    pytest.importorskip("pip", reason="this environment has no pip, unlike a GPU host")
    carried = tmp_path / "wheels"
    carried.mkdir()
    make_wheel(carried / "toy-1.0-py3-none-any.whl", TOY)
    assert install(tmp_path, tmp_path / "venv") == 1
    said = subprocess.run([tmp_path / "venv/bin/toy-says"], capture_output=True, text=True)
    assert said.stdout == "toy\n"
    code = "import toy, torch, sys; print(toy.__file__)"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([tmp_path / "venv/bin/python", "-c", code], env=env, capture_output=True)
    assert done.returncode == 0 and str(tmp_path).encode() in done.stdout


def test_nothing_carried_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(InstallError, match="pack_gpu_host.sh"):
        install(tmp_path, tmp_path / "venv")


@pytest.mark.parametrize("keeps", [lambda name: False, lambda name: ".dist-info/" in name])
def test_a_wheel_is_not_stripped_to_nothing(tmp_path, keeps):
    source = make_wheel(tmp_path / "toy-1.0-py3-none-any.whl", TOY)
    with pytest.raises(pack.PackError, match="toy-1.0"):
        pack.strip_wheel(source, tmp_path / "stripped.whl", keeps)


def test_what_the_host_can_use_is_kept():
    kept = ["sglang/srt/server_args.py", "sglang/kernels/jit/csrc/a.cuh", "sglang/x.so"]
    dropped = [
        "sglang/multimodal_gen/__init__.py",
        "sglang/srt/rust_extensions/_server.cpython-312-x86_64-linux-gnu.so",
        "sglang/srt/mem_cache/rust_tree_core/mem_cache.cpython-312-x86_64-linux-gnu.so",
    ]
    # Python beside the Rust code is imported.
    kept.append("sglang/srt/rust_extensions/__init__.py")
    assert all(map(pack.keeps_of_sglang, kept)) and not any(map(pack.keeps_of_sglang, dropped))
    kept = ["sgl_kernel/sm90/common_ops.abi3.so", "sgl_kernel/gemm.py"]
    dropped = ["sgl_kernel/flash_ops.abi3.so", "sgl_kernel/sm100/common_ops.abi3.so"]
    assert all(map(pack.keeps_of_kernel, kept)) and not any(map(pack.keeps_of_kernel, dropped))


def test_a_folder_too_large_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "big.whl").write_bytes(b"x" * 30_000)
    (tmp_path / "checkout.tar.gz").write_bytes(b"x" * 20_000)
    monkeypatch.setattr(pack, "LIMIT_MB", 0.06)
    assert pack.write_manifest(tmp_path)["bytes"] == {
        "checkout.tar.gz": 20_000,
        "wheels/big.whl": 30_000,
    }
    monkeypatch.setattr(pack, "LIMIT_MB", 0.04)
    with pytest.raises(pack.PackError, match=r"more than 0.04 MB; .* wheels/big.whl"):
        pack.write_manifest(tmp_path)


# ----------------------------------------------------------------------- what checks make of it


def test_partings_end_the_comparison_of_an_answer():
    expected = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert partings(expected, expected)["flips"] == 0
    # The second token of the second answer differs, and all that follows from it.
    found = partings(expected, [[1, 2, 3, 4], [5, 9, 9, 9]])
    assert found == {"answers": 2, "flips": 1, "tokens": 6, "flip_rate": round(1 / 6, 5)}


def test_policy_time_of_a_trace(tmp_path):
    def kernel(name, ts, dur):
        return {"cat": "kernel", "ph": "X", "name": name, "ts": ts, "dur": dur}

    events = [
        kernel("gemm", 100, 50),
        # On another stream, half of it beside the first.
        kernel("gemm", 125, 50),
        kernel("grow_layer_kernel_0d1d2", 200, 10),
        kernel("rank_nodes_kernel", 240, 10),
        {"cat": "cpu_op", "ph": "X", "name": "grow_layer_kernel", "ts": 0, "dur": 999},
    ]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events}))
    read = read_events(tmp_path / "t.json")
    times = device_times(read, ["grow_layer_kernel", "rank_nodes_kernel"])
    assert times == (150, 95, 20, 2, 4)
    assert times.policy_share == pytest.approx(20 / 150)
    assert device_times([], ["grow_layer_kernel"]).policy_share is None


def test_goals_compare_with_what_matters_at_each_batch_size():
    goals = {goal.batch: goal for goal in goals_of(rows_with_all_fields((1, 4, 32, 64)))}
    assert [goal.to for goal in goals.values()] == [
        "static:5-4-8",
        *["the best fixed tree, static:3-1-4"] * 2,
        "plain decoding",
    ]
    assert [goal.wanted for goal in goals.values()] == [1.0, 1.05, 1.05, 0.98]
    auto = SPEEDS["cast:auto"]
    found = [goal.found.median for goal in goals.values()]
    assert found == pytest.approx([auto / 1.4, auto / 1.5, auto / 1.5, auto], rel=1e-3)


def test_a_goal_without_its_comparison_is_not_judged():
    rows = [row for row in rows_with_all_fields((1, 64)) if row["arm"] == "cast:auto"]
    for row in rows:
        row |= dict.fromkeys(("vs_plain", "vs_best_static"))
    assert goals_of(rows) == []


def rows_with_all_fields(batches):
    rows = [
        row for row in rows_of(batches=batches) if (row["task"], row["phase"]) == ("code", "warm")
    ]
    return normalised(rows)


@pytest.fixture
def checked(tmp_path):
    """A checkout with documents, and a check of a GPU that went well."""
    root, out = tmp_path / "root", tmp_path / "out"
    for folder in (root / "profiles", root / "benchmarks" / "results", root / "docs", out):
        folder.mkdir(parents=True)
    run = {"provenance": ORIGIN, "rows": rows_of()}
    shown = root / "benchmarks" / "results" / "earlier.json"
    shown.write_text(json.dumps({"runs": [run]}))
    for name in ("README.md", "docs/results.md"):
        command = "python -m benchmarks.report benchmarks/results/earlier.json --update-docs ."
        (root / name).write_text(f"{BEGIN}\n<!-- {command} -->\n{END}\n")
    (out / "speed.json").write_text(json.dumps({"runs": [run]}))
    save_profile(make_profile(), out / "profile.json")
    stages = [{"name": "speed", "status": "passed"}]
    (out / "summary.json").write_text(json.dumps({"mode": "device", "stages": stages}))
    return root, publish.write_bundle(out)


def test_what_a_check_leaves_goes_into_the_repository(checked):
    root, bundle = checked
    profile, results, *documents = publish.publish(bundle, root)
    assert load_profile(profile) == make_profile() and profile.parent == root / "profiles"
    assert profile.name.startswith("nvidia-h200__") and len(list(profile.parent.iterdir())) == 1
    assert results.name == "nvidia-h200__tiny-inflated.json"
    for document in documents:
        assert results_shown(document, root) == [results, root / "benchmarks/results/earlier.json"]
        assert "CAST" in document.read_text()
    # A second check of the same device replaces the first.
    publish.publish(bundle, root)
    assert len(results_shown(documents[1], root)) == 2


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("summary", {"mode": "dry run: no number is a measurement"}, "dry run"),
        ("summary", {"stages": [{"name": "goals", "status": "failed"}]}, "goals failed"),
        ("profile", None, "there is no profile in it"),
    ],
)
def test_what_is_not_published(checked, part, change, says):
    root, bundle = checked
    content = json.loads(bundle.read_text())
    content[part] = change and content[part] | change
    bundle.write_text(json.dumps(content))
    with pytest.raises(publish.PublishError, match=says):
        publish.publish(bundle, root)
    assert not list((root / "profiles").iterdir())
    if "failed" in says:
        assert publish.publish(bundle, root, even_if_failed=True)
