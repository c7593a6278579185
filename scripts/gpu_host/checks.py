"""The stages of a check: each takes settings, puts numbers where they are kept, or raises."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

from scripts.gpu_host.goals import goals_of
from scripts.gpu_host.serving import (
    CheckError,
    Numbers,
    compare_greedy,
    compare_laws,
    copy_logs,
    decode,
    environment,
    inflated,
    profile_path,
    serving_arms,
    traced,
)
from scripts.gpu_host.settings import ROOT, Settings

# Imported by a server on a GPU; what is missing is named before a server fails by it.
MODULES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.layers.attention.triton_backend",
    "sglang.srt.speculative.eagle_worker_v2",
    "cast_sglang.serving.worker",
)
GPU_MODULES = ("sgl_kernel", "tvm_ffi", "cast_sglang.ops.fused")
# A token in which bfloat16 decides otherwise than plain decoding ends the comparison of its answer.
# More of them than this share of the tokens before is no rounding.
MAX_FLIP_RATE = 0.02
MAX_TRACE_BYTES = 12_000_000


class NothingToDo(Exception):
    """A stage that does not apply; the message says why."""


def check_install(settings: Settings, numbers: Numbers) -> None:
    """Install the carried wheels."""
    from scripts.gpu_host.install import install

    if settings.carried is None:
        raise NothingToDo(f"no --carried: the packages are those of {sys.executable}")
    numbers["wheels"] = install(Path(settings.carried), settings.python.parent.parent)


def check_environment(settings: Settings, numbers: Numbers) -> None:
    """Import what a server imports; name device and versions."""
    import torch

    numbers["python"] = sys.version.split()[0]
    for package in ("torch", "triton", "transformers", "sglang", "sglang-kernel", "cast-sglang"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            numbers[package] = metadata.version(package)
    modules = MODULES
    if not settings.is_dry:
        if not torch.cuda.is_available():
            raise CheckError("torch sees no GPU; --dry-run needs none")
        numbers["device"] = torch.cuda.get_device_name(0)
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm"]
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        numbers["driver, memory, clock"] = done.stdout.strip()
        modules += GPU_MODULES
    missing = []
    for module in modules:
        try:
            import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            missing.append(f"{module}: {error!r}")
    if missing:
        raise CheckError("; ".join(missing))
    for command in ("sglang", "cast-sglang"):
        if not Path(sys.executable).with_name(command).exists():
            raise CheckError(f"there is no command {command} beside {sys.executable}")


def check_ops(settings: Settings, numbers: Numbers) -> None:
    """Compare the fused ops with the reference, on the device or in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfs"]
    command += [f"tests/ops/test_{name}.py" for name in ("fused", "kernels", "device")]
    command += ["tests/ops/sampled"]
    # Most of the time is the compiler's.
    if util.find_spec("xdist") and not settings.is_dry:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    printed = run(command, ok=(0, 1))
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", printed.strip().splitlines()[-1])
    numbers |= {kind: int(count) for count, kind in counts}
    failed = re.findall(r"^(?:FAILED|ERROR) .*", printed, re.M)
    if failed or not numbers.get("passed"):
        raise CheckError("; ".join(failed) or "no test ran")
    if not settings.is_dry and "no GPU" in printed:
        raise CheckError("tests were skipped for want of a GPU")


def check_op_times(settings: Settings, numbers: Numbers) -> None:
    """Time the ops of a step; dry, run each of them once."""
    command = [sys.executable, "-m", "benchmarks.micro.bench_ops"]
    command += ["--batches", ",".join(map(str, settings.batches))]
    command += ["--dry-run"] if settings.is_dry else ["--repeats", "20"]
    result = json.loads(run(command, stderr=None).splitlines()[-1])
    whole = [row for row in result["rows"] if row["op"].endswith(" layers")]
    numbers["policy of a step"] = [
        {name: row[name] for name in row if name != "op"} for row in whole
    ]
    write_json(Path(settings.out) / "ops.json", result)


def check_inflate(settings: Settings, numbers: Numbers) -> None:
    """Make the large pair from the tiny one."""
    from benchmarks.harness.pairs import tiny_pair

    pair, folder = tiny_pair(), Path(settings.work) / "inflated"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "scripts/inflate_model.py", "--model-path", pair.target]
    command += ["--draft-path", pair.draft, "--output-dir", str(folder)]
    printed = run([*command, *shlex.split(settings.inflate)])
    numbers["parameters"] = int(printed.split()[-2].replace(",", ""))
    files = folder.rglob("*.safetensors")
    numbers["gigabytes"] = round(sum(file.stat().st_size for file in files) / 1e9, 2)


def check_equality_tiny(settings: Settings, numbers: Numbers) -> None:
    """Compare with plain decoding in float32: greedy tokens are the same, laws of samples too.

    Trees, copies, chains and plain steps each take part.
    """
    from benchmarks.harness.pairs import tiny_pair

    arms = ["plain", *settings.equality_arms, *settings.tiny_arms]
    # Triton multiplies float32 in TF32 by default.
    with (
        environment({"TRITON_F32_DEFAULT": "ieee"}),
        serving_arms(settings, tiny_pair(), "float32", arms, "equality-tiny") as servers,
    ):
        compare_greedy(settings, numbers, servers)
        flips = {name: found["flips"] for name, found in numbers.items() if found["flips"]}
        if flips:
            raise CheckError(f"float32 tokens differ from plain decoding's: {flips}")
        compare_laws(settings, numbers, servers, settings.equality_arms[-1])


def check_equality_inflated(settings: Settings, numbers: Numbers) -> None:
    """Compare greedy tokens with plain decoding's in bfloat16, and count where they part."""
    _compare_inflated(settings, numbers, settings.equality_arms, "equality-inflated")


def check_equality_flashinfer(settings: Settings, numbers: Numbers) -> None:
    """Do the same with verify and plain steps on flashinfer."""
    if not settings.flashinfer_arms:
        raise NothingToDo("a dry run has no flashinfer")
    if util.find_spec("flashinfer") is None:
        raise NothingToDo("flashinfer is not installed here")
    with environment({"SGLANG_IS_FLASHINFER_AVAILABLE": "true"}):
        _compare_inflated(settings, numbers, settings.flashinfer_arms, "equality-flashinfer")


def _compare_inflated(settings: Settings, numbers: Numbers, arms: Sequence[str], log: str) -> None:
    pair = inflated(settings)
    with serving_arms(settings, pair, "bfloat16", ["plain", *arms], log) as servers:
        compare_greedy(settings, numbers, servers)
    for name, found in numbers.items():
        if found["flips"] > 1 and found["flip_rate"] > MAX_FLIP_RATE:
            raise CheckError(
                f"{name}: {found['flips']} flips in {found['tokens']} tokens are more than rounding"
            )


def check_profile(settings: Settings, numbers: Numbers) -> None:
    """Measure the cost profile of the large pair."""
    pair = inflated(settings)
    command = [str(Path(sys.executable).with_name("cast-sglang")), "profile", "--quick"]
    command += ["--budget-seconds", f"{settings.profile_seconds:g}"]
    command += ["--output", str(profile_path(settings)), "--model-path", pair.target]
    command += ["--speculative-draft-model-path", pair.draft, "--dtype", "bfloat16"]
    for stale in Path(settings.out).glob("profile.json*"):
        stale.unlink()
    flags = shlex.split(f"{settings.capacity} {settings.flags}")
    printed = run([*command, *flags], platform_env(), stderr=None)
    numbers |= json.loads(printed.splitlines()[-1])
    numbers.pop("output", None)
    numbers["captured"] = json.loads(profile_path(settings).read_text())["provenance"]["cuda_graph"]
    if not settings.is_dry and not numbers["captured"]:
        raise CheckError("the profile was measured without graphs, which a server runs")


def check_speed(settings: Settings, numbers: Numbers) -> None:
    """Measure all arms side by side."""
    from benchmarks import bench_serving

    pair, out = inflated(settings), Path(settings.work) / "speed"
    shutil.rmtree(out, ignore_errors=True)
    is_measured = profile_path(settings).exists()
    numbers["profile"] = "measured" if is_measured else "estimate"
    argv = ["--arms", ",".join(settings.arms), "--batches", ",".join(map(str, settings.batches))]
    argv += ["--model-path", pair.target, "--draft-model-path", pair.draft, "--out", str(out)]
    argv += ["--profile", str(profile_path(settings)) if is_measured else "estimate"]
    argv += ["--server-flags", f"--dtype bfloat16 {settings.capacity} {settings.flags}"]
    argv += ["--start-at-once", str(settings.start_at_once), *shlex.split(settings.speed)]
    try:
        if bench_serving.main(argv):
            raise CheckError("the serving benchmark failed; its log says why")
    finally:
        # Also what was measured before the time was over.
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(out / "results.json", Path(settings.out) / "speed.json")
            rows = json.loads((out / "results.json").read_text())["rows"]
            columns = "arm batch tok_s_median vs_plain vs_best_static accept_length policy_share"
            numbers["rows"] = [{name: row[name] for name in columns.split()} for row in rows]
        copy_logs(out / "logs", settings, "speed")


def check_goals(settings: Settings, numbers: Numbers) -> None:
    """Judge the speeds: never below SGLang's default, above every fixed tree, and no loss at 64."""
    from benchmarks.report.data import load_runs

    speed = Path(settings.out) / "speed.json"
    if not speed.exists():
        raise NothingToDo("no speeds were measured")
    missed = []
    for goal in goals_of(load_runs(speed)[0].rows):
        numbers[f"batch {goal.batch}"] = {
            "to": goal.to,
            "wanted": goal.wanted,
            "found": goal.found.median,
            "least": goal.found.low,
            "greatest": goal.found.high,
        }
        if goal.found.median < goal.wanted:
            missed.append(f"batch {goal.batch}: {goal.found.median:.2f} of {goal.to}")
    if not numbers:
        raise CheckError("speed.json compares CAST with nothing")
    if settings.is_dry:
        raise NothingToDo("a dry run measures nothing, so nothing is judged")
    if missed:
        raise CheckError("; ".join(missed))


def check_trace(settings: Settings, numbers: Numbers) -> None:
    """Take a profiler trace of CAST's steps and sum up the policy's time in it."""
    from benchmarks.harness.counters import cast_state, gained, step_means
    from cast_sglang.ops import kernels
    from scripts.gpu_host.trace import device_times, read_events

    profile = profile_path(settings)
    arm = "cast:auto" if profile.exists() else "cast:auto+profile=estimate"
    with serving_arms(settings, inflated(settings), "bfloat16", [arm], "trace") as servers:
        (server,) = servers.values()
        for batch in (settings.batches[0], settings.batches[-1]):
            decode(server, settings, batch, 16)  # warm
            before = cast_state(server)
            folder = Path(settings.work) / f"trace-{batch}"
            shutil.rmtree(folder, ignore_errors=True)
            path = traced(server, settings, batch, folder)
            times = device_times(read_events(path), kernels.__all__)
            host = step_means(gained(before, cast_state(server)))
            numbers[f"batch {batch}"] = {
                "host_policy_us": host["mean_policy_us"],
                "host_policy_share": host["policy_share"],
                "step_us": host["mean_measured_us"],
                **{f"device_{name}": value for name, value in times._asdict().items()},
                "device_policy_share": times.policy_share,
            }
            if path.stat().st_size <= MAX_TRACE_BYTES:
                shutil.copyfile(path, Path(settings.out) / "trace.json.gz")


CHECKS: dict[str, Callable[[Settings, Numbers], None]] = {
    "install": check_install,
    "environment": check_environment,
    "ops": check_ops,
    "op-times": check_op_times,
    "inflate": check_inflate,
    "equality-tiny": check_equality_tiny,
    "equality-inflated": check_equality_inflated,
    "equality-flashinfer": check_equality_flashinfer,
    "profile": check_profile,
    "speed": check_speed,
    "goals": check_goals,
    "trace": check_trace,
}


def platform_env() -> dict[str, str]:
    """Return what selects SGLang's platform on this machine."""
    from benchmarks.harness.servers import platform_environment

    return platform_environment()


def write_json(path: Path, content: Any) -> None:
    """Write a result."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(
    command: Sequence[str],
    env: dict[str, str] | None = None,
    ok: Sequence[int] = (0,),
    stderr: int | None = subprocess.STDOUT,
) -> str:
    """Run a command in the checkout; return what it printed, which is also printed here.

    Raises:
        CheckError: it failed.
    """
    done = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        errors="replace",
    )
    print(done.stdout, flush=True)
    if done.returncode not in ok:
        lines = " | ".join(done.stdout.strip().splitlines()[-4:])
        raise CheckError(f"{shlex.join(command[:4])} ... failed ({done.returncode}): {lines}")
    return done.stdout
