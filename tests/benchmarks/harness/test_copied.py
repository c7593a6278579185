"""Tasks with much to copy: what is asked for stands in the prompt."""

import ast
import json

import pytest

from benchmarks.harness.copied import MOST_LINES, NUM_EDITS, ROWS_OF_A_TABLE, edits, tables
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


@pytest.mark.parametrize("name", ["edit", "table"])
def test_they_are_tasks(name):
    task = load_task(name, Encoder(tiny_pair().target, max_tokens=400))
    assert task.name == name and len(task.dialogues) >= 20 and "standard library" in task.note
