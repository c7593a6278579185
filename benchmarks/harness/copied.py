"""Tasks whose answers repeat their prompts: edits, tables, quotations, tools that run again.

The prompts are made of the running Python's own standard library and documentation, and continued
as they are, so that models without instructions serve too. They change with the version of Python.
"""

import ast
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from http import HTTPStatus
from pydoc_data.topics import topics

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
# Passages of the documentation that a question is asked about, their length in characters, and
# words of the quotation that the prompt begins.
PASSAGES = 3
LEAST_PASSAGE, MOST_PASSAGE = 300, 600
BEGUN_WORDS = 6
# Functions that a module lists, so that its list is worth to be copied.
LEAST_FUNCTIONS = 4
NUM_SESSIONS = 40


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


def quotes() -> list[Item]:
    """Return questions about passages of Python's documentation, whose answers quote one."""
    passages = []
    for _, text in sorted(topics.items()):
        title, _, rest = text.partition("\n")
        # The first paragraph of plain text, in one line.
        paragraphs = [" ".join(part.split()) for part in rest.split("\n\n")]
        prose = " ".join(part for part in paragraphs if re.match(r"[A-Z][^*]+[.:]$", part))
        if len(prose) >= LEAST_PASSAGE and len(prose.split()) > 2 * BEGUN_WORDS:
            passages.append((title, prose[:MOST_PASSAGE].rsplit(". ", 1)[0].rstrip(".") + "."))
    items = []
    for start in range(0, len(passages) - PASSAGES + 1, PASSAGES):
        some = passages[start : start + PASSAGES]
        asked = (start // PASSAGES) % PASSAGES
        title, prose = some[asked]
        sources = "\n\n".join(
            f"[{number}] {name}\n{text}" for number, (name, text) in enumerate(some, start=1)
        )
        begun = " ".join(prose.split()[:BEGUN_WORDS])
        prompt = (
            f'Sources\n\n{sources}\n\nQuestion: what do the sources say under "{title}"? Quote '
            f'them.\n\nAnswer: source [{asked + 1}] says: "{begun}'
        )
        items.append(Item((prompt,), False, "quote"))
    return items


def sessions() -> list[Item]:
    """Return sessions of an agent at a shell, whose last command prints what was printed before.

    Either the same list of functions, or a file after an edit of one word.
    """
    made = [list(_sessions(name)) for name in EDITED_MODULES]
    longest = max(map(len, made))
    in_turn = [each[i] for i in range(longest) for each in made if i < len(each)]
    return in_turn[:NUM_SESSIONS]


def _sessions(module: str) -> Iterator[Item]:
    """Yield sessions about the functions of a module, the two kinds in turn."""
    file = f"{module}.py"
    lines = inspect.getsource(importlib.import_module(module)).splitlines()
    heads = [f"{i}:{line}" for i, line in enumerate(lines, start=1) if line.startswith("def ")]
    if len(heads) < LEAST_FUNCTIONS:
        return
    listing = f'$ grep -n "^def " {file}\n'
    for number, (name, source) in enumerate(_functions(module)):
        [first] = [int(head.split(":")[0]) for head in heads if f":def {name}(" in head]
        show = f'$ sed -n "{first},{first + source.count(chr(10))}p" {file}\n'
        begun = f"{listing}{chr(10).join(heads)}\n{show}{source}\n"
        if number % 2:
            edit = f'$ sed -i "s/\\b{name}\\b/{name}_of/" {file}\n'
            yield Item((f"{begun}{edit}{show}def {name}_of(",), False, "edited")
        else:
            yield Item((f"{begun}{listing}{heads[0]}\n",), False, "again")


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
