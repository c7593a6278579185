"""Questions for the draft trainer: what is taken from library, man pages and people."""

import gzip
import json
import random
import sys

import pytest

from benchmarks.harness import sharegpt
from scripts import make_prompts

PAGE = r""".TH DEMO 1
.SH NAME
demo \- shows \fIthings\fR to people
.SH DESCRIPTION
.B demo
writes a picture of each thing that it is given, in the order of the command line, and nothing else.
.PP
A second paragraph says what happens to a thing that cannot be read: \fBdemo\fR leaves it out.
.SH SEE ALSO
ls(1)
"""


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)


@pytest.fixture
def people(tmp_path, monkeypatch):
    """Conversations as the package has them."""
    entries = [
        ("a_0", ["How do I sort a list in Python?", "And in the other direction?"]),
        ("a_15", ["it continues another entry of the same talk"]),
        ("b_0", ["Wie sortiere ich eine Liste?"]),
        ("c_0", ["Write a poem about the sea. " * 60]),
        ("d_0", ["What is the name of the tallest mountain?"]),
    ]
    talks = [
        {"id": name, "conversations": [{"from": "human", "value": turn} for turn in turns]}
        for name, turns in entries
    ]
    file = tmp_path / "talks.json"
    file.write_text(json.dumps(talks))
    monkeypatch.setattr(sharegpt, "sharegpt_file", lambda: file)
    tested = ["What is the name of the tallest mountain?"]
    monkeypatch.setattr(sharegpt, "prompts", lambda kind: tested)


def test_people_ask_in_english_first_and_not_what_is_tested(people):
    turns = list(make_prompts.turns_of_people())
    assert [each[0] for each in turns] == ["How do I sort a list in Python?"]
    assert len(turns[0]) in (1, 2)


def test_man_pages_become_questions_about_command_and_text(tmp_path, monkeypatch):
    folder = tmp_path / "man1"
    folder.mkdir()
    (folder / "demo.1.gz").write_bytes(gzip.compress(PAGE.encode()))
    (folder / "gcloud_x.1.gz").write_bytes(gzip.compress(PAGE.encode()))
    monkeypatch.setattr(make_prompts, "MAN_PAGES", tmp_path)
    about_command, about_text = make_prompts.man_pages()
    assert "`demo`" in about_command
    assert "demo writes a picture of each thing" in about_text
    assert "A second paragraph says" in about_text
    assert "\\f" not in about_text and ".PP" not in about_text


def test_functions_and_topics_of_the_library_become_questions():
    functions = make_prompts.library_functions()
    first = [next(functions) for _ in range(40)]
    assert any("```python" in question for question in first)
    assert any("Write a Python function" in question for question in first)
    assert len(next(make_prompts.reference_passages())) > 120


def test_the_file_has_as_many_questions_as_asked(people, tmp_path, monkeypatch):
    monkeypatch.setattr(make_prompts, "MAN_PAGES", tmp_path)
    # The whole library takes a minute to parse.
    functions = (f"Write the function f{i}." for i in range(99))
    monkeypatch.setattr(make_prompts, "library_functions", lambda: functions)
    out = tmp_path / "new" / "prompts.jsonl"
    monkeypatch.setattr(sys, "argv", ["make_prompts", "--out", str(out), "--count", "20"])
    make_prompts.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 20
    assert sum(record["turns"][0].startswith("How do I sort") for record in records) == 1
