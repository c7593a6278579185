"""Start SGLang servers as child processes, see them come up, and stop them for certain.

The one home of launching: the demo, the benchmarks and the tests use it.
"""

import contextlib
import functools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, Self

import httpx

from benchmarks.harness.arms import Arm
from cast_sglang.config import user_cache_dir

CPU_PLATFORM = {"SGLANG_PLATFORM": "cast_cpu"}
STARTUP_SECONDS = 600.0
# Longer than SGLang takes to drain; what is left then is killed.
STOP_SECONDS = 15.0
LOG_TAIL_LINES = 25


class ServerError(RuntimeError):
    """A server did not come up or went away; the message ends with the tail of its log."""


@functools.cache
def device_kind() -> str:
    """Return "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def platform_environment() -> dict[str, str]:
    """Return what selects the platform of this machine's device."""
    return {} if device_kind() == "cuda" else dict(CPU_PLATFORM)


class Process(Protocol):
    """What is used here of `subprocess.Popen`."""

    pid: int

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Server:
    """An SGLang server in a process group of its own; up inside `with`, gone after it.

    Attributes:
        ready_path: what is asked until it is answered.

    Args:
        name: names the log file.
        flags: SGLang's flags, without host and port.
        log_dir: where the log goes.
        env: additions to this process's environment.

    Raises:
        ServerError: on entry, when the server ends or is not ready in time.
    """

    ready_path = "/ready"

    def __init__(
        self,
        name: str,
        flags: Sequence[str],
        log_dir: Path,
        env: Mapping[str, str] | None = None,
        startup_seconds: float = STARTUP_SECONDS,
    ) -> None:
        self.name = name
        self.log_path = log_dir / f"{re.sub(r'[^A-Za-z0-9_.+=-]', '-', name)}.log"
        self._flags = flags
        self._env = {**os.environ, **(env or {})}
        self._startup_seconds = startup_seconds
        self._process: Process | None = None

    def __enter__(self) -> Self:
        self.launch()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def launch(self) -> None:
        """Start the process, which then needs a while."""
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "wb") as log:
            address = ("--host", "127.0.0.1", "--port", str(self.port))
            self._process = self._start_process(server_command(*self._flags, *address), log)

    def _start_process(self, command: Sequence[str], log: IO[bytes]) -> Process:
        return subprocess.Popen(
            command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id, which is also that of its group."""
        assert self._process is not None
        return self._process.pid

    def check(self) -> None:
        """Raise ServerError if the server has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._error(f"ended with exit code {self._process.returncode}")

    def stop(self) -> None:
        """End the server and every process it started."""
        if self._process is None:
            return
        # Not to the group: SGLang takes the end of its scheduler for a crash and collects evidence.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def get(self, path: str) -> Any:
        """Return the JSON that the server answers to a GET of `path`."""
        response = httpx.get(self.url + path, timeout=30.0)
        response.raise_for_status()
        return response.json()

    def flush_cache(self) -> None:
        """Forget all prefixes; the server must be idle."""
        httpx.post(f"{self.url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()

    def refuse_log_line(self, phrase: str) -> None:
        """Raise ServerError with the line of the log that has the phrase, if there is one."""
        for line in self.log_path.read_text(errors="replace").splitlines():
            if phrase in line:
                raise ServerError(f"server {self.name} is not what it is to be: {line.strip()}")

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def wait_until_ready(self) -> None:
        """Wait for the server that was launched.

        Raises:
            ServerError: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + self._startup_seconds
        # One client for all tries: a new one takes 65 ms of a core that the server needs to start.
        with httpx.Client(timeout=5.0) as client:
            while time.monotonic() < deadline:
                self.check()
                with contextlib.suppress(httpx.TransportError):
                    if client.get(self.url + self.ready_path).is_success:
                        return
                time.sleep(0.25)
        raise self._error(f"was not ready after {self._startup_seconds:.0f} s")

    def _error(self, what: str) -> ServerError:
        return ServerError(f"server {self.name} {what}; {self.log_path} ends:\n{self.log_tail()}")


def server_command(*flags: str) -> list[str]:
    """Return the command line of a server, run by the environment of this interpreter."""
    # An idle scheduler otherwise polls without pause, at the cost of a core.
    return [str(Path(sys.executable).with_name("sglang")), "serve", "--sleep-on-idle", *flags]


@contextlib.contextmanager
def serving(
    arms: Sequence[Arm],
    model: str,
    log_dir: Path,
    flags: Sequence[str] = (),
    on_start: Callable[[Sequence[Arm]], contextlib.AbstractContextManager[object]] | None = None,
    at_once: int = 1,
    profiles: Path | None = None,
) -> Iterator[dict[str, Server]]:
    """Run one server for each arm, all of them at once, and yield them by the arm's name.

    Each has a cache directory of its own, so it knows nothing that another server has learned.

    Args:
        model: the target.
        log_dir: gets a log for each arm.
        flags: for every server, after those of its arm.
        on_start: entered while the servers of these arms come up, to show it.
        at_once: servers that come up together. It takes more than one core little longer, but on a
            GPU each measures what the others left of the memory.
        profiles: directory of cost profiles that they find, and save to, in place of the user's.

    Raises:
        ServerError: a server did not come up, or not as its arm asks.
    """
    env = platform_environment()
    with contextlib.ExitStack() as stack:
        servers = {
            arm.name: Server(
                arm.name,
                ["--model-path", model, *arm.flags, *flags],
                log_dir,
                {**env, **stack.enter_context(own_cache(profiles)), **arm.env},
            )
            for arm in arms
        }
        for start in range(0, len(arms), at_once):
            group = arms[start : start + at_once]
            with contextlib.nullcontext() if on_start is None else on_start(group):
                for arm in group:
                    stack.callback(servers[arm.name].stop)
                    servers[arm.name].launch()
                for arm in group:
                    servers[arm.name].wait_until_ready()
            for arm in group:
                if arm.refusal is not None:
                    servers[arm.name].refuse_log_line(arm.refusal)
        yield servers


@contextlib.contextmanager
def own_cache(profiles: Path | None = None) -> Iterator[dict[str, str]]:
    """Make a cache directory for one server; yield the environment that names it.

    What one server leaves in the user's cache directory, another one may begin with. Here it finds
    cost profiles only, and all that other packages have in the user's.

    Args:
        profiles: directory of the profiles, made if need be; None for the user's.
    """
    users = user_cache_dir()
    others = [path for path in users.parent.glob("*") if path.name != users.name]
    if profiles is None:
        profiles = users / "profiles"
    else:
        profiles.mkdir(parents=True, exist_ok=True)
    # A server that was killed may still write while the directory is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for path in others:
            (Path(name) / path.name).symlink_to(path)
        (Path(name) / users.name).mkdir()
        if profiles.is_dir():
            (Path(name) / users.name / "profiles").symlink_to(profiles.resolve())
        yield {"XDG_CACHE_HOME": name}


def exit_on_sigterm() -> None:
    """Let a SIGTERM unwind this process as an exit does, so that its servers are stopped."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _free_port() -> int:
    """Return a port that nothing has now and the system gives to nobody who asks for any port.

    A port that the system chooses would be one that it may give away again before the server, whose
    imports take a while, listens on it. SGLang itself draws from 22000 on.
    """
    for port in random.sample(range(10_000, 22_000), k=100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("none of 100 ports of 127.0.0.1 between 10000 and 22000 is free")
