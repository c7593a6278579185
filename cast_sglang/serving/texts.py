"""The texts that the package brings: prompts of a short run on text, and of a probe."""

import json
from importlib import resources

__all__ = ["read_texts"]


def read_texts() -> list[tuple[str, str]]:
    """Return the kind, code | chat | prose, and the text of each prompt."""
    lines = resources.files(__package__).joinpath("texts.jsonl").read_text("utf-8").splitlines()
    return [(each["kind"], each["text"]) for each in map(json.loads, lines)]
