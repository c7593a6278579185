"""A launch that cannot work ends soon, with one line that says why."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.harness.pairs import Pair
from benchmarks.harness.servers import CPU_PLATFORM, ServerError, device_kind, server_command
from tests.support.launches import resolve
from tests.support.preloaded import PreloadedServer, run
from tests.support.profiles import write_profile

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

PREFIX = "cast-sglang: error: "
# What SGLang logs when it begins to load a model.
LOADS_WEIGHTS = "Load weight begin"
# A launch that does not end is taken to be up. Importing SGLang takes 15 s of a core, and minutes
# where other work shares it.
END_SECONDS = 900


class Case(NamedTuple):
    """What is added to a good launch, and what the error must name; {dir} holds the files."""

    says: tuple[str, ...]
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = {}


DRAFT = "--speculative-draft-model-path"
CASES = {
    "missing profile": Case(("none.json", "no such file"), env={"CAST_PROFILE": "{dir}/none.json"}),
    "profile is a directory": Case(("not a file",), env={"CAST_PROFILE": "{dir}"}),
    "foreign profile": Case(
        ("good.json", "measured elsewhere"), env={"CAST_ALLOW_FOREIGN_PROFILE": "0"}
    ),
    "truncated profile": Case(("cut.json",), env={"CAST_PROFILE": "{dir}/cut.json"}),
    "empty profile": Case(("empty.json",), env={"CAST_PROFILE": "{dir}/empty.json"}),
    "time not a number": Case(("nan.json",), env={"CAST_PROFILE": "{dir}/nan.json"}),
    "time zero": Case(("zero.json", "time_us"), env={"CAST_PROFILE": "{dir}/zero.json"}),
    "time negative": Case(
        ("negative.json", "time_us"), env={"CAST_PROFILE": "{dir}/negative.json"}
    ),
    "later profile version": Case(
        ("later.json", "schema_version"), env={"CAST_PROFILE": "{dir}/later.json"}
    ),
    "costs without a profile": Case(
        ("profile=none", "--cast-policy"), flags=("--cast-profile", "none")
    ),
    "draft of another vocabulary": Case(
        ("other-draft", "vocab_size"), flags=(DRAFT, "{dir}/other-draft")
    ),
    "draft of another width": Case(
        ("wide-draft", "hidden_size"), flags=(DRAFT, "{dir}/wide-draft")
    ),
    "draft that is no draft": Case((DRAFT, "no EAGLE"), flags=(DRAFT, "{target}")),
    "draft missing": Case((DRAFT, "{dir}/nothing"), flags=(DRAFT, "{dir}/nothing")),
    "threshold flag out of range": Case(("--cast-c1", "-1"), flags=("--cast-c1=-1",)),
    "threshold flag no number": Case(("--cast-c2", "much"), flags=("--cast-c2", "much")),
    "threshold variable infinite": Case(("CAST_C3", "inf"), env={"CAST_C3": "inf"}),
    "threshold file out of range": Case(
        ("settings.toml", "c1"), flags=("--cast-config", "{dir}/settings.toml")
    ),
    "mistyped flag": Case(
        ("--cast-polcy", "did you mean --cast-policy?"), flags=("--cast-polcy", "fixed")
    ),
    "backend of a GPU": Case(
        ("--attention-backend fa3", "pass --attention-backend cast_cpu"),
        flags=("--attention-backend", "fa3"),
    ),
    "settings file missing": Case(("none.toml",), flags=("--cast-config", "{dir}/none.toml")),
    "unknown variable": Case(("CAST_C7", "unknown"), env={"CAST_C7": "1"}),
    "unknown policy": Case(("policy", "best"), flags=("--cast-policy", "best")),
    "verify size beyond the envelope": Case(
        ("--cast-verify-sizes", "999"), flags=("--cast-verify-sizes", "2,999")
    ),
    "adaptive": Case(("--speculative-adaptive",), flags=("--speculative-adaptive",)),
    "pages of a tree": Case(
        ("--speculative-eagle-topk 4", "pages of 16"),
        flags=("--page-size", "16", "--speculative-eagle-topk", "4"),
    ),
    "no children": Case(("--speculative-eagle-topk 0",), flags=("--speculative-eagle-topk", "0")),
    "no room for a tree": Case(
        ("--speculative-num-draft-tokens 1",), flags=("--speculative-num-draft-tokens", "1")
    ),
    "data parallel attention": Case(
        ("--enable-dp-attention",),
        flags=("--enable-dp-attention", "--dp-size", "2", "--tp-size", "2"),
    ),
    "hidden states mode": Case(
        ("--return-hidden-states-mode",), flags=("--return-hidden-states-mode", "last")
    ),
    "no draft and no copies": Case(
        (DRAFT, "--cast-copying off"), flags=("{no draft}", "--cast-copying", "off")
    ),
}
# What says why is the same code as of another case; `make test-extended` has them.
RARE = (
    *("profile is a directory", "empty profile", "time not a number", "time zero"),
    *("draft of another width", "threshold flag no number", "threshold file out of range"),
    *("settings file missing", "unknown policy", "no children", "hidden states mode"),
)
GOOD = Case(())
NO_DEVICE = Case(("no NVIDIA GPU", "SGLANG_PLATFORM=cast_cpu"), env={"SGLANG_PLATFORM": ""})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Path:
    """Write the files that the cases name."""
    directory = tmp_path_factory.mktemp("launches")
    text = write_profile(directory / "good.json").read_text()
    (directory / "cut.json").write_text(text[: len(text) // 2])
    (directory / "empty.json").write_text("")
    (directory / "settings.toml").write_text("c1 = -1\n")
    for name, value in {"nan": float("nan"), "zero": 0.0, "negative": -5.0}.items():
        content = json.loads(text)
        content["target"]["time_us"][0][0][0] = value
        (directory / f"{name}.json").write_text(json.dumps(content))
    later = {**json.loads(text), "schema_version": 99}
    (directory / "later.json").write_text(json.dumps(later))

    drafts = {
        "other-draft": {"vocab_size": 1999},
        "wide-draft": {"hidden_size": 1024},
    }
    for name, changes in drafts.items():
        (directory / name).mkdir()
        config = json.loads((Path(pair.draft) / "config.json").read_text())
        (directory / name / "config.json").write_text(json.dumps({**config, **changes}))
        shutil.copy(Path(pair.draft) / "model.safetensors", directory / name)
    return directory


@pytest.fixture(scope="module")
def launch(directory: Path, pair: Pair):
    """Return a function from a case to the arguments and the environment of its launch."""

    def fill(text: str) -> str:
        return text.replace("{dir}", str(directory)).replace("{target}", pair.target)

    def build(case: Case) -> tuple[list[str], dict[str, str]]:
        argv = ["--model-path", pair.target, "--dtype", "float32"]
        argv += ["--speculative-algorithm", "CAST"]
        flags = [fill(flag) for flag in case.flags if flag != "{no draft}"]
        argv += flags if len(flags) < len(case.flags) else [DRAFT, pair.draft, *flags]
        env = {"CAST_PROFILE": "{dir}/good.json", "CAST_ALLOW_FOREIGN_PROFILE": "1", **case.env}
        return argv, {**CPU_PLATFORM, **{key: fill(value) for key, value in env.items()}}

    return build


@pytest.fixture
def resolved(launch, tmp_path):
    """Return a function that resolves a launch and returns its exit code and output."""
    return lambda case: run(resolve, *launch(case), tmp_path / "launch.log")


def assert_one_clear_line(stderr: str, says: tuple[str, ...]) -> None:
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if PREFIX in line]
    assert len(errors) == 1, stderr
    assert errors[0].startswith(PREFIX)
    for words in says:
        assert words in errors[0]


def test_a_good_launch_resolves(resolved):
    code, stderr = resolved(GOOD)
    assert code == 0, stderr
    assert PREFIX not in stderr


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.extended] if name in RARE else []) for name in CASES],
)
def test_a_bad_launch_says_why(resolved, directory, name):
    code, stderr = resolved(CASES[name])
    assert code not in (0, None), stderr
    says = tuple(words.replace("{dir}", str(directory)) for words in CASES[name].says)
    assert_one_clear_line(stderr, says)


@pytest.mark.parametrize(
    "name", ["missing profile", "threshold flag out of range", "pages of a tree"]
)
def test_a_bad_server_ends_before_it_loads_a_model(launch, name, tmp_path):
    argv, env = launch(CASES[name])
    with pytest.raises(ServerError, match="ended with exit code [^0]"):
        PreloadedServer("bad", argv, tmp_path, env).__enter__()
    log = (tmp_path / "bad.log").read_text()
    assert_one_clear_line(log, CASES[name].says)
    assert LOADS_WEIGHTS not in log


def test_a_server_says_that_it_loads_a_model(plain):
    """The test above looks for a line that there is."""
    assert LOADS_WEIGHTS in plain.log_path.read_text()


def test_a_server_lists_no_hooks(plain):
    """SGLang logs one line for each, the platform's dozen among them."""
    assert "Applied 1 hook" not in plain.log_path.read_text()


@pytest.mark.skipif(device_kind() == "cuda", reason="this machine has a GPU")
@pytest.mark.parametrize(
    "command",
    [
        "sglang serve",
        pytest.param("python -m sglang.launch_server", marks=pytest.mark.extended),
    ],
)
def test_a_machine_without_a_gpu_is_told_of_the_cpu_platform(launch, command):
    # In a process of its own: SGLang looks for its platform once, when it is imported.
    argv, env = launch(NO_DEVICE)
    start = server_command(*argv)
    if command != "sglang serve":
        start = [sys.executable, "-m", "sglang.launch_server", *argv]
    assert_ends_early(start, env, NO_DEVICE.says)


def assert_ends_early(command: list[str], env: Mapping[str, str], says: tuple[str, ...]) -> None:
    """Start a server that cannot work; it ends with one clear line before it loads a model."""
    server = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = server.communicate(timeout=END_SECONDS)
    finally:
        # A server that comes up after all must not stay.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert server.returncode not in (0, None)
    assert_one_clear_line(output, says)
    assert LOADS_WEIGHTS not in output
