"""The model pairs that demo, benchmarks and tests run, and what is derived from them."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.servers import platform_environment

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out"
# Names another directory with target/, draft/ and heldout_prompts.jsonl.
DIRECTORY_VARIABLE = "TINY_PAIR_DIR"
INFLATED_PARAMS = "170M"
INFLATED_NOTE = (
    "The models are the trained tiny pair, padded with zeros to 170 million parameters: they cost "
    "what models of that size cost and behave as the tiny ones."
)
SMOLLM2_DRAFT = ROOT / "models" / "smollm2-draft"
SMOLLM2_NOTE = (
    "The target is SmolLM2-135M-Instruct, its published weights of 4 bits in bfloat16; the draft "
    "is of this project."
)


class CommandError(RuntimeError):
    """A command of this project failed; the message ends with what it printed."""


class Pair(NamedTuple):
    """A target and the draft made for it, as paths or hub ids."""

    target: str
    draft: str


def tiny_directory() -> Path:
    """Return where the trained tiny pair lies."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or ROOT / "models" / "tiny").resolve()


def tiny_pair() -> Pair:
    """Return the trained tiny pair.

    Raises:
        FileNotFoundError: it is not there.
    """
    directory = tiny_directory()
    for name in ("target", "draft"):
        if not (directory / name / "config.json").is_file():
            raise FileNotFoundError(f"no model in {directory / name}")
    return Pair(str(directory / "target"), str(directory / "draft"))


def heldout_prompts() -> list[str]:
    """Return prompts that neither model was trained on."""
    lines = (tiny_directory() / "heldout_prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def inflated_pair(directory: Path = OUT) -> Pair:
    """Return the tiny pair at the size of `INFLATED_PARAMS`, made on the first call.

    Raises:
        CommandError: it could not be made.
        FileNotFoundError: there is no tiny pair.
    """
    pair = tiny_pair()
    digest = hashlib.sha256()
    for model in pair:
        digest.update((Path(model) / "model.safetensors").read_bytes())
    made = directory / f"{TINY}-{digest.hexdigest()[:8]}"
    if not made.exists():
        partial = made.with_name(f"{made.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        script = [sys.executable, str(ROOT / "scripts" / "inflate_model.py")]
        script += ["--model-path", pair.target, "--draft-path", pair.draft]
        _run([*script, "--output-dir", str(partial), "--target-params", INFLATED_PARAMS])
        partial.rename(made)
    return Pair(str(made / "target"), str(made / "draft"))


def smollm2_pair() -> Pair:
    """Return SmolLM2-135M-Instruct with its draft; the first call fetches the target.

    Raises:
        CommandError: it could not be fetched.
        FileNotFoundError: there is no draft.
    """
    if not (SMOLLM2_DRAFT / "config.json").is_file():
        raise FileNotFoundError(f"no draft for SmolLM2 in {SMOLLM2_DRAFT}: this checkout lacks it")
    printed = _run([str(ROOT / "scripts" / "fetch_smollm2")], {"PYTHON": sys.executable})
    return Pair(printed.splitlines()[-1], str(SMOLLM2_DRAFT))


class KnownPair(NamedTuple):
    """A pair that a command line can name."""

    load: Callable[[], Pair]
    name: str  # for people
    note: str  # what must be said about its numbers
    task: str  # what it is asked if nothing else is named


TINY, SMOLLM2 = f"tiny-{INFLATED_PARAMS.lower()}", "smollm2"
PAIRS = {
    TINY: KnownPair(inflated_pair, f"tiny pair at {INFLATED_PARAMS}", INFLATED_NOTE, "code"),
    SMOLLM2: KnownPair(smollm2_pair, "SmolLM2-135M-Instruct", SMOLLM2_NOTE, "mt-bench"),
}


def measured_profile(
    pair: Pair, directory: Path, budget_seconds: float, flags: Sequence[str] = ()
) -> Path:
    """Return a cost profile of the pair on this machine, measured on the first call.

    Args:
        directory: holds the profile afterwards.
        budget_seconds: time for measuring, loading the models apart.
        flags: those of the servers that will use it.

    Raises:
        CommandError: it could not be measured.
    """
    key = hashlib.sha256(repr((pair, device_name(), tuple(flags))).encode()).hexdigest()
    profile = directory / f"profile-{key[:8]}.json"
    if not profile.exists():
        command = [str(Path(sys.executable).with_name("cast-sglang")), "profile", "--quick"]
        command += ["--budget-seconds", f"{budget_seconds:g}", "--output", str(profile)]
        command += ["--model-path", pair.target, "--speculative-draft-model-path", pair.draft]
        _run([*command, *flags], platform_environment())
    return profile


def found_profile_covers(pair: Pair, flags: Sequence[str] = ()) -> bool:
    """Return whether a server with these flags will find a cost profile that covers its batches.

    Raises:
        CommandError: CAST could not serve the pair at all.
    """
    command = [str(Path(sys.executable).with_name("cast-sglang")), "doctor", "--json"]
    command += ["--model-path", pair.target, "--speculative-draft-model-path", pair.draft, *flags]
    printed = _run(command, platform_environment(), ok=(0, 1))
    answer = next(line for line in printed.splitlines() if line.startswith('{"ok"'))
    checks = {check["name"]: check for check in json.loads(answer)["checks"]}
    for name, check in checks.items():
        if check["status"] == "fail":
            raise CommandError(f"{shlex.join(command)}: {name}: {check['found']}")
    return checks.get("profile range", {}).get("status") == "ok"


def device_name() -> str:
    """Return the name of the GPU, or that of the CPU and how many cores this process may use."""
    if not platform_environment():
        import torch

        return torch.cuda.get_device_name(0)
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def _run(
    command: Sequence[str], env: dict[str, str] | None = None, ok: Sequence[int] = (0,)
) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode not in ok:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise CommandError(f"{shlex.join(command)} failed ({done.returncode}):\n{tail}")
    return done.stdout
