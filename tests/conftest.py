"""What every test runs under."""

import os
import signal
from types import FrameType

import psutil
import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Settings of the user's own servers would change what is tested.
    for name in [name for name in os.environ if name.startswith("CAST_")]:
        del os.environ[name]
    # The workers of pytest-xdist share the cores, and so do their servers.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A run that is cut short must not leave servers behind.
    has_workers = bool(getattr(config.option, "numprocesses", None))
    signal.signal(signal.SIGTERM, _end_workers if has_workers else _end)


def _end(number: int, frame: FrameType | None) -> None:
    # Once: a second signal would cut the end of the servers short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pytest.exit("SIGTERM", returncode=pytest.ExitCode.INTERRUPTED)


def _end_workers(number: int, frame: FrameType | None) -> None:
    """End each worker's run, and with them this one, which would kill them if it ended first."""
    for worker in psutil.Process().children():
        worker.terminate()
