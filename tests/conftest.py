"""What every test runs under."""

import os

from benchmarks.harness.servers import exit_on_sigterm


def pytest_configure() -> None:
    # Settings of the user's own servers would change what is tested.
    for name in [name for name in os.environ if name.startswith("CAST_")]:
        del os.environ[name]
    # The workers of pytest-xdist share the cores, and so do their servers.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A run that is cut short must not leave servers behind.
    exit_on_sigterm()
