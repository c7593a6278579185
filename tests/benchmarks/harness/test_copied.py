"""Tasks with much to copy: what is asked for stands in the prompt."""

import ast
import json
import re

import pytest

from benchmarks.harness.copied import (
    BEGUN_WORDS,
    MOST_LINES,
    MOST_PASSAGE,
    NUM_EDITS,
    NUM_SESSIONS,
    PASSAGES,
    ROWS_OF_A_TABLE,
    edits,
    quotes,
    sessions,
    tables,
)
from benchmarks.harness.dialogues import Encoder
from benchmarks.harness.pairs import tiny_pair
from benchmarks.harness.tasks import load_task


def test_a_function_is_to_be_written_again_under_another_name():
    items = edits()
    assert len(items) == NUM_EDITS == len({item.turns for item in items})
    for item in items:
        [prompt] = item.turns
        source, _, ending = prompt.partition("\n\n\n# The same function, named ")
        [function] = ast.parse(source).body
        assert ending == f"{function.name}_of.\ndef {function.name}_of("
        assert source.count("\n") < MOST_LINES and not item.is_chat


def test_records_are_to_be_written_in_another_form():
    items = tables()
    assert {item.category for item in items} == {"status", "error"} and len(items) >= 20
    for item in items:
        lines = item.turns[0].splitlines()
        rows = [json.loads(line) for line in lines[1 : 1 + ROWS_OF_A_TABLE]]
        assert len(rows) == ROWS_OF_A_TABLE and all(row["name"] for row in rows)
        assert lines[-2:] == ["[", '    {"']


def test_an_answer_quotes_one_of_several_sources():
    items, asked = quotes(), set()
    assert len(items) >= 20 and len({item.turns for item in items}) == len(items)
    for item in items:
        sources, _, answer = item.turns[0].partition("\n\nQuestion: ")
        title, begun = re.search(r'under "(.*)"\?[^"]*says: "(.*)$', answer).groups()
        found = re.findall(r"^\[(\d)\] (.*)\n(.*)$", sources, re.MULTILINE)
        assert len(found) == PASSAGES and all(len(text) <= MOST_PASSAGE for *_, text in found)
        [(number, text)] = [(number, text) for number, name, text in found if name == title]
        asked.add(number)
        # There is more to be quoted than was begun.
        assert f"source [{number}]" in answer and text.startswith(begun)
        assert len(text.split()) > len(begun.split()) + 10 and len(begun.split()) == BEGUN_WORDS
    assert asked == {"1", "2", "3"}


def test_a_command_prints_again_what_was_printed():
    items = sessions()
    assert len(items) == NUM_SESSIONS and {item.category for item in items} == {"again", "edited"}
    for item in items:
        outputs = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", item.turns[0], re.MULTILINE)
        command, begun = outputs[-1]
        [before] = [output for other, output in outputs[:-1] if other == command]
        if item.category == "again":
            assert before.startswith(begun) and len(before) > 2 * len(begun)
        else:
            old, new = re.search(r"s/.b(\w+).b/(\w+)/", outputs[-2][0]).groups()
            assert before.replace(f"def {old}(", f"def {new}(", 1).startswith(begun)
            assert len(before) > 2 * len(begun)


@pytest.mark.parametrize("name", ["edit", "table", "quote", "agent"])
def test_they_are_tasks(name):
    task = load_task(name, Encoder(tiny_pair().target, max_tokens=400))
    assert task.name == name and len(task.dialogues) >= 20 and "Python's" in task.note
