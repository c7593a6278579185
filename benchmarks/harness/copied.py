"""Tasks whose answers repeat their prompts: edits of source code, tables in another form.

The prompts are made of the running Python's own standard library, and continued as they are, so
that models without instructions serve too. They change with the version of Python.
"""

import ast
import importlib
import inspect
import json
import os
from collections.abc import Iterator
from http import HTTPStatus

from benchmarks.harness.prompt_files import Item

# Of the standard library; what they define is edited in this order, one of each in turn.
EDITED_MODULES = (
    *("textwrap", "fractions", "statistics", "shutil", "posixpath", "bisect", "heapq", "copy"),
    *("string", "shlex", "calendar", "difflib", "fnmatch", "glob", "csv", "colorsys", "keyword"),
)
# Lines of a function that is edited: enough to copy from, and short enough for small models.
LEAST_LINES, MOST_LINES = 10, 40
NUM_EDITS = 40
ROWS_OF_A_TABLE = 6


def edits() -> list[Item]:
    """Return prompts that rename a function; the rest of it stays as it is."""
    functions = [list(_functions(name)) for name in EDITED_MODULES]
    longest = max(map(len, functions))
    in_turn = [each[i] for i in range(longest) for each in functions if i < len(each)]
    return [_edit(name, source) for name, source in in_turn[:NUM_EDITS]]


def tables() -> list[Item]:
    """Return prompts that write JSON records in another form, all of whose values stay."""
    codes = [
        {"code": int(status), "name": status.name, "phrase": status.phrase, "about": about}
        for status in HTTPStatus
        if (about := status.description)
    ]
    errors = [
        {"code": number, "name": name, "message": os.strerror(number)}
        for name, number in sorted(vars(importlib.import_module("errno")).items())
        if isinstance(number, int)
    ]
    items = []
    for kind, key, new_key, rows in (
        ("status", "phrase", "text", codes),
        ("error", "message", "reason", errors),
    ):
        for start in range(0, len(rows) - ROWS_OF_A_TABLE + 1, ROWS_OF_A_TABLE):
            some = rows[start : start + ROWS_OF_A_TABLE]
            lines = "\n".join(json.dumps(row) for row in some)
            prompt = (
                f"# {kind} records, one a line\n{lines}\n\n"
                f'# the same records as a list, with "{key}" named "{new_key}"\n[\n    {{"'
            )
            items.append(Item((prompt,), False, kind))
    return items


def _functions(module: str) -> Iterator[tuple[str, str]]:
    """Yield name and source of the functions of a module that are of the right size."""
    source = inspect.getsource(importlib.import_module(module))
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            text = ast.get_source_segment(source, node) or ""
            if LEAST_LINES <= text.count("\n") + 1 <= MOST_LINES and len(node.name) > 2:
                yield node.name, text


def _edit(name: str, source: str) -> Item:
    new_name = f"{name}_of"
    prompt = f"{source}\n\n\n# The same function, named {new_name}.\ndef {new_name}("
    return Item((prompt,), False, "rename")
