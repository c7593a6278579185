"""Servers that start in seconds: each is forked from one process that has imported SGLang.

Importing SGLang takes most of the start of a server on a CPU, once in each of its three processes.
Python's forkserver imports it once for all servers of a test run. They run `sglang serve` as any
other; only their own processes are forked, not spawned.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, cast
from unittest import mock

from benchmarks.harness.servers import CPU_PLATFORM, Server

PRELOADED = [
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
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


class PreloadedServer(Server):
    """A Server forked from a process that has imported SGLang."""

    def _start_process(self, command: Sequence[str], log: IO[bytes]) -> ForkedProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # The first start makes the forkserver, whose imports need the platform.
        with mock.patch.dict(os.environ, CPU_PLATFORM):
            return ForkedProcess(context.Process(target=run, args=(command, self._env, log.name)))


def run(command: Sequence[str], env: Mapping[str, str], log_path: str) -> None:
    """Become this command of `sglang`, with this environment; its output goes to the log."""
    from sglang.cli.main import main

    os.setsid()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(command)
    # SGLang asks for "spawn", whose processes import everything again.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda method, force=False: None  # type: ignore[assignment]
    main()
