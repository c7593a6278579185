"""Programs that start in seconds: each is forked from one process that has imported SGLang.

Importing SGLang takes most of the start of a server on a CPU, once in each of its three processes.
Python's forkserver imports it once for all programs of a test run. They run as any other; only
their own processes are forked, not spawned.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, cast
from unittest import mock

from benchmarks.harness.servers import CPU_PLATFORM, Server

PRELOADED = [
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    # What the platform and the plugin import in each process.
    "cast_sglang.cpu.install",
    "cast_sglang.serving.worker",
]


class ForkedProcess:
    """A process of multiprocessing with the part of `subprocess.Popen` that Server uses."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        process.start()
        self._process = process
        self.pid = cast(int, process.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code, None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("sglang serve", timeout or 0.0)
        return self._process.exitcode


Program = Callable[[Sequence[str]], object]


class PreloadedServer(Server):
    """A Server forked from a process that has imported SGLang."""

    @staticmethod
    def program(argv: Sequence[str]) -> None:
        """Run this command of `sglang`; another kind of server may change something before."""
        serve(argv)

    def _start_process(self, command: Sequence[str], log: IO[bytes]) -> ForkedProcess:
        return start(self.program, command, self._env, log.name)


def start(
    program: Program, argv: Sequence[str], env: Mapping[str, str], log_path: str
) -> ForkedProcess:
    """Start a program with these arguments; its output goes to the log.

    Args:
        program: a function of a module; returns the exit code, if it has one.
        env: its whole environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The first start makes the forkserver, whose imports need the platform.
    with mock.patch.dict(os.environ, CPU_PLATFORM):
        return ForkedProcess(context.Process(target=_run, args=(program, argv, env, log_path)))


def run(
    program: Program, argv: Sequence[str], env: Mapping[str, str], log_path: Path
) -> tuple[int, str]:
    """Run a program to its end; return its exit code and its output.

    Args:
        env: additions to this process's environment.
    """
    log_path.write_bytes(b"")
    code = start(program, argv, {**os.environ, **env}, str(log_path)).wait()
    return code, log_path.read_text(errors="replace")


def serve(argv: Sequence[str]) -> None:
    """Run this command of `sglang`."""
    from sglang.cli.main import main

    sys.argv = list(argv)
    fork_all()
    main()


def fork_all() -> None:
    """Let SGLang fork its processes; it asks for "spawn", whose processes import all again."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None  # type: ignore[assignment]


def _run(program: Program, argv: Sequence[str], env: Mapping[str, str], log_path: str) -> None:
    os.setsid()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(env)
    try:
        code = program(argv)
    except Exception:  # noqa: BLE001 - the hook reports it, as at the end of any program
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.exit(code)
