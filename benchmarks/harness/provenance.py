"""Where and how the numbers of a benchmark were measured."""

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from benchmarks.harness.pairs import ROOT, Pair, device_name

PACKAGES = ("cast-sglang", "sglang", "torch", "triton")


def provenance(
    module: str, argv: Sequence[str] | None, pair: Pair, note: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Say where and how numbers were measured.

    Args:
        module: the benchmark, as `python -m` takes it.
        argv: its arguments; None for those of this process.
        note: what must be said about the pair.
        settings: what else made the numbers what they are.
    """
    words = sys.argv[1:] if argv is None else argv
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *words]),
        "device": device_name(),
        "target": "/".join(pair.target.rstrip("/").split("/")[-2:]),
        "draft": "/".join(pair.draft.rstrip("/").split("/")[-2:]),
        "note": note,
        **settings,
        "versions": versions,
        "git_commit": git_commit(),
    }


def git_commit() -> str:
    """Return the commit of this checkout, marked if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
