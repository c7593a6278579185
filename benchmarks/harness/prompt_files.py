"""Prompts from JSON lines, in the formats that benchmarks of speculative decoding use."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

EXPECTED = (
    'one JSON object a line: {"prompt": TEXT}, {"turns": [TEXT, ...]} as in MT-bench and '
    'Spec-Bench, or {"conversations": [{"from": "human", "value": TEXT}, ...]} as in ShareGPT'
)
HUMANS = ("human", "user")


class PromptFileError(ValueError):
    """A file of prompts is malformed; the message names file and line and what was expected."""


class Item(NamedTuple):
    """One entry of a file: what a user says, turn by turn."""

    turns: tuple[str, ...]
    is_chat: bool = True  # False: a text to be continued as it is
    category: str = ""


def read_items(path: Path) -> list[Item]:
    """Read a file of prompts; its first line decides on the format.

    Entries of a ShareGPT file in which no human speaks are left out; they do occur.

    Raises:
        PromptFileError: names file and line.
        OSError: it cannot be read.
    """
    items: list[Item] = []
    expected_key = None
    # Not splitlines: a text may hold characters that Unicode counts as ends of lines.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptFileError(f"{where}: no JSON ({error}); expected {EXPECTED}") from error
        if not isinstance(entry, dict):
            raise PromptFileError(f"{where}: {_kind(entry)}; expected {EXPECTED}")
        key = next((key for key in READERS if key in entry), None)
        if key is None:
            found = ", ".join(map(repr, entry)) or "none"
            raise PromptFileError(f"{where}: has the keys {found}; expected {EXPECTED}")
        if expected_key not in (None, key):
            raise PromptFileError(f"{where}: has {key!r}; expected {expected_key!r}, as before")
        expected_key = key
        if (item := READERS[key](entry, where)).turns:
            items.append(item)
    if not items:
        raise PromptFileError(f"{path}: no prompt; expected {EXPECTED}")
    return items


def read_prompts(path: Path) -> list[str]:
    """Read the first turn of every entry of a file.

    Raises:
        PromptFileError, OSError: see `read_items`.
    """
    return [item.turns[0] for item in read_items(path)]


def _read_prompt(entry: Mapping[str, Any], where: str) -> Item:
    return Item((_text(entry["prompt"], f"{where}: 'prompt'"),), False, _category(entry, where))


def _read_turns(entry: Mapping[str, Any], where: str) -> Item:
    turns = entry["turns"]
    if not isinstance(turns, list) or not turns:
        raise PromptFileError(f"{where}: 'turns' is {_kind(turns)}; expected a list of texts")
    texts = tuple(_text(turn, f"{where}: turn {i}") for i, turn in enumerate(turns, start=1))
    return Item(texts, True, _category(entry, where))


def _read_conversations(entry: Mapping[str, Any], where: str) -> Item:
    messages = entry["conversations"]
    shape = 'a list of {"from": SPEAKER, "value": TEXT}'
    if not isinstance(messages, list):
        raise PromptFileError(f"{where}: 'conversations' is {_kind(messages)}; expected {shape}")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            raise PromptFileError(f"{where}: message {number} is malformed; expected {shape}")
        if message["from"] in HUMANS:
            turns.append(_text(message["value"], f"{where}: 'value' of message {number}"))
    return Item(tuple(turns), True, _category(entry, where))


READERS: dict[str, Callable[[Mapping[str, Any], str], Item]] = {
    "turns": _read_turns,
    "conversations": _read_conversations,
    "prompt": _read_prompt,
}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PromptFileError(f"{what} is {_kind(value)}; expected a text")
    return value


def _category(entry: Mapping[str, Any], where: str) -> str:
    category = entry.get("category", "")
    if not isinstance(category, str):
        raise PromptFileError(f"{where}: 'category' is {_kind(category)}; expected a text")
    return category


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "empty" if not value.strip() else "a text"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {dict: "an object", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )
