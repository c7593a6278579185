"""What every test runs under."""

import os

from benchmarks.harness.servers import exit_on_sigterm


def pytest_configure() -> None:
    # Settings of the user's own servers would change what is tested.
    for name in [name for name in os.environ if name.startswith("CAST_")]:
        del os.environ[name]
    # A run that is cut short must not leave servers behind.
    exit_on_sigterm()
