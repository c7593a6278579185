"""What every test runs under."""

import os
import signal
from types import FrameType

import psutil
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--law-samples", type=int, default=720, help="samples of each law of sampling (720)"
    )
    parser.addoption(
        "--mt-bench-questions", type=int, default=4, help="for the published model, at most 80 (4)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Settings of the user's own servers would change what is tested.
    for name in [name for name in os.environ if name.startswith("CAST_")]:
        del os.environ[name]
    # The workers of pytest-xdist share the cores, and so do their servers.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let a run that is cut short by SIGTERM end its servers."""
    has_workers = bool(getattr(session.config.option, "numprocesses", None))

    def end(number: int, frame: FrameType | None) -> None:
        if has_workers:  # this process would kill them if it ended before them
            for worker in psutil.Process().children():
                worker.terminate()
            return
        # Once: a second signal would cut the end of the servers short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Where what is raised here is caught, the run ends after the test.
        session.shouldstop = "SIGTERM"
        pytest.exit("SIGTERM", returncode=pytest.ExitCode.INTERRUPTED)

    signal.signal(signal.SIGTERM, end)
