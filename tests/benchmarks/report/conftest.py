"""A results file for every test of the report."""

from pathlib import Path

import pytest

from benchmarks.harness.ledger import Ledger
from benchmarks.harness.rows import summarise
from tests.support.reported import ORIGIN, rows_of


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a file of two runs, the latest cut short."""
    directory = tmp_path / "bench"
    for is_complete in (True, False):
        ledger = Ledger(directory, ORIGIN, summarise)
        rows = rows_of()
        # Of the other one only a warm cell and the cold ones.
        ledger.put("all", rows if is_complete else [*rows[:8], *rows[-16:]])
        ledger.close(is_complete)
    return directory / "results.json"
