"""What all commands are parsed with."""

import argparse
from typing import Any

__all__ = ["COMMAND", "at_least_two", "positive", "positive_seconds"]

# Of every command; an abbreviation could swallow a flag of SGLang.
COMMAND: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


def at_least_two(text: str) -> int:
    """Read a count that is 2 or more."""
    count = int(text)
    if count < 2:
        raise ValueError(text)
    return count


def positive(text: str) -> int:
    """Read a count that is 1 or more."""
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def positive_seconds(text: str) -> float:
    """Read seconds that are more than 0."""
    seconds = float(text)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds
