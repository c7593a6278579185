"""The journal: what a killed run had measured survives, and nothing else is believed."""

import json
from pathlib import Path

import pytest

from cast_sglang.errors import ProfileError
from cast_sglang.profiling.journal import Journal, Point, Visit, journal_path

SETTINGS = {"host": "one", "grid": {"batch_sizes": (1, 2)}, "sampling": {"seed": 0}}
VISITS = [
    Visit(Point("verify", 1, 128, rows), [1000.25, 999.5], [50.0, 80.0], [51.0, 79.0], 0.25)
    for rows in (1, 2, 4)
]


@pytest.fixture
def path(tmp_path):
    """A journal of three visits, in a folder that it has made."""
    path = journal_path(tmp_path / "deep" / "p.json")
    with Journal(path, SETTINGS) as journal:
        for visit in VISITS:
            journal.append(visit)
    return path


def test_the_journal_lies_beside_the_profile(monkeypatch):
    assert journal_path("a/p.json") == Path("a/p.json.partial.jsonl")
    monkeypatch.setenv("HOME", "/home/of/tests")
    assert journal_path("~/p.json") == Path("/home/of/tests/p.json.partial.jsonl")


def test_visits_come_back_as_they_were_and_are_added_to(path):
    journal = Journal(path, SETTINGS)
    assert journal.visits == VISITS and isinstance(journal.visits[0].point, Point)
    with journal:
        journal.append(VISITS[0])
    # What was appended is on disk before the next visit; settings stand once.
    assert Journal(path, SETTINGS).visits == [*VISITS, VISITS[0]]
    assert json.loads(path.read_text().splitlines()[0])["host"] == "one"


def test_each_visit_is_on_disk_at_once(tmp_path):
    with Journal(tmp_path / "j", SETTINGS) as journal:
        for count, visit in enumerate(VISITS, 1):
            journal.append(visit)
            assert Journal(tmp_path / "j", SETTINGS).visits == VISITS[:count]


def test_a_cut_anywhere_loses_the_last_line_alone(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in {*range(0, len(whole), 11), *ends, *(end - 1 for end in ends)}:
        path.write_bytes(whole[:length])
        complete = sum(end <= length for end in ends)
        with Journal(path, SETTINGS) as journal:
            assert journal.visits == VISITS[: max(complete - 1, 0)]
            journal.append(VISITS[2])
        # The torn line is gone, not continued.
        assert Journal(path, SETTINGS).visits == [*VISITS[: max(complete - 1, 0)], VISITS[2]]


def test_other_settings_are_named_and_refused(path):
    other = {**SETTINGS, "host": "two", "new": 1}
    with pytest.raises(ProfileError, match=r"other settings \(host, new\); delete it.*--output"):
        Journal(path, other)
    # Tuples and lists are one in JSON, so the same settings are the same.
    assert Journal(path, {**SETTINGS, "grid": {"batch_sizes": [1, 2]}}).visits == VISITS


@pytest.mark.parametrize("line", ["{", "[]", '{"point": 1}', "\xff", "null", "1"])
def test_a_damaged_line_is_named_and_refused(path, line):
    lines = path.read_text().splitlines()
    for position in range(len(lines)):
        damaged = "\n".join([*lines[:position], line, *lines[position:]]) + "\n"
        path.write_text(damaged, encoding="latin-1")
        with pytest.raises(ProfileError) as caught:
            Journal(path, SETTINGS)
        message = str(caught.value)
        assert "\n" not in message and str(path) in message and "delete" in message
        if position:
            assert f"line {position + 1} is damaged" in message
        assert path.read_text(encoding="latin-1") == damaged


def test_a_journal_that_cannot_be_opened_says_why(path):
    with pytest.raises(ProfileError, match=r"cannot be opened: Is a directory"):
        Journal(path.parent, SETTINGS)
    with pytest.raises(ProfileError, match=r"cannot be opened: File exists"):
        Journal(path / "below", SETTINGS).__enter__()
