"""Cells of a benchmark, and what an arm does in one."""

import asyncio
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from benchmarks.harness.arms import Arm
from benchmarks.harness.counters import cast_state, gained
from benchmarks.harness.dialogues import Dialogue
from benchmarks.harness.servers import Server
from benchmarks.harness.streams import (
    Answer,
    Prompt,
    client_of,
    keep_running,
    steady_window,
    stream,
)
from benchmarks.harness.turns import FAILURES, OnFailure

WARMUP_TOKENS = 16
_GOLDEN = (5**0.5 - 1) / 2
# In its first hundred steps a server is furthest from what it will have learned (docs/results.md).
COLD_STEPS = 100
# So that most of what is served lies between the first tokens and the first place that stays empty.
LEAST_PER_PLACE = 3
WARM, COLD = "warm", "cold"

_plays = itertools.count()

T = TypeVar("T")
Request = str | Dialogue  # a prompt, or several of which each depends on the answers before


class Cell(NamedTuple):
    """One condition under which every arm is measured.

    Phase cold is the first `COLD_STEPS` steps of a server that has served nothing yet; it finds
    nothing that an earlier server has learned, but for cost profiles that it was given.
    """

    batch: int
    temperature: float
    task: str
    phase: str = WARM


@dataclasses.dataclass
class Result:
    """One arm in one cell; results of the same arm and cell can be added."""

    tok_s: list[float] = dataclasses.field(default_factory=list)  # one a repeat
    answers: list[Answer] = dataclasses.field(default_factory=list)  # of all repeats
    totals: Counter[str] = dataclasses.field(default_factory=Counter)  # CAST's, of all repeats

    def __add__(self, other: "Result") -> "Result":
        totals = Counter(self.totals)
        totals.update(other.totals)
        return Result(self.tok_s + other.tok_s, self.answers + other.answers, totals)


class Group(NamedTuple):
    """Arms that were measured in turns, and what each did in one cell."""

    arms: Sequence[Arm]
    results: Mapping[str, Result]  # by the arm's name; an arm that failed has none

    @property
    def plain(self) -> Result | None:
        """What plain decoding did in this group."""
        names = [arm.name for arm in self.arms if arm.kind == "plain"]
        return self.results.get(names[0]) if names else None


def choose_prompts(prompts: Sequence[T], batch: int, num_requests: int) -> list[T]:
    """Return whole batches of prompts, at least `num_requests` and three, repeated as needed."""
    count = -(-max(num_requests, LEAST_PER_PLACE * batch) // batch) * batch
    return list(itertools.islice(itertools.cycle(prompts), count))


def warm_up(
    arms: Sequence[Arm],
    servers: Mapping[str, Server],
    cell: Cell,
    requests: Sequence[Request],
    num_tokens: int = WARMUP_TOKENS,
    on_failure: OnFailure | None = None,
) -> None:
    """Let every arm decode a few tokens in the cell's batch size.

    Args:
        num_tokens: per answer, of an arm that learns; of another no more than it needs.
        on_failure: called for an arm that fails; None to raise.
    """
    for arm in list(arms):
        try:
            learns = arm.kind in ("adaptive", "cast")
            tokens = num_tokens if learns else min(num_tokens, WARMUP_TOKENS)
            first = requests[: cell.batch]
            play(servers[arm.name], first, cell, [tokens] * len(first))
        except FAILURES as error:
            if on_failure is None:
                raise
            on_failure(arm, error)


def take_turn(
    arm: Arm, server: Server, cell: Cell, requests: Sequence[Request], num_tokens: int
) -> Result:
    """Let an arm serve the requests once; the result has one repeat.

    Args:
        num_tokens: per answer, in the mean.

    Raises:
        ValueError: there was no time at which `cell.batch` requests ran.
    """
    before = cast_state(server) if arm.kind == "cast" else {}
    tok_s, answers = run(server, requests, cell, num_tokens)
    totals = gained(before, cast_state(server)) if before else {}
    return Result([tok_s], answers, Counter(totals))


def gather(rounds: Iterable[Mapping[str, Result]]) -> dict[str, Result]:
    """Join rounds of turns to results of several repeats, without arms that missed a round."""
    listed = list(rounds)
    names = [name for name in listed[0] if all(name in turns for turns in listed)]
    return {name: sum((turns[name] for turns in listed), Result()) for name in names}


def cold_load(accept_length: float, num_tokens: int) -> tuple[int, int]:
    """Return the requests of each place, and the mean tokens of an answer, of a cold run.

    Args:
        accept_length: tokens per step of the arm that gains most; it then takes about `COLD_STEPS`
            steps, and every other arm, for the same text, more.
        num_tokens: per answer of a warm run.
    """
    tokens = COLD_STEPS * accept_length
    per_place = max(LEAST_PER_PLACE, round(tokens / num_tokens))
    return per_place, round(tokens / per_place)


def run(
    server: Server, requests: Sequence[Request], cell: Cell, num_tokens: int
) -> tuple[float, list[Answer]]:
    """Send the requests; return tokens per second of steady serving, and the answers.

    Args:
        num_tokens: per answer, in the mean.

    Raises:
        ValueError: there was no time at which `cell.batch` requests ran.
    """
    answers, end = play(server, requests, cell, answer_lengths(num_tokens, len(requests)))
    tokens, seconds = steady_window(answers, cell.batch, end)
    return tokens / seconds, answers


def answer_lengths(mean: int, count: int) -> list[int]:
    """Return lengths spread evenly from half to one and a half times the mean, in no order.

    Answers of one length would all end at once under plain decoding, and the next prompts be
    prefilled in one pass; speculation spreads the ends, so its arms would pay more for prefill.
    Real answers differ in length whatever decodes them.
    """
    # Steps of the golden ratio fill an interval evenly, however many there are.
    return [max(1, round(mean * (0.5 + (i * _GOLDEN) % 1.0))) for i in range(count)]


def play(
    server: Server, requests: Sequence[Request], cell: Cell, num_tokens: Sequence[int]
) -> tuple[list[Answer], float]:
    """Keep `cell.batch` requests running until all are answered.

    A dialogue sends its next prompt as soon as the one before is answered.

    Args:
        num_tokens: of each request's answers.

    Returns:
        the answers, and when there was no further request for one that ended.
    """
    server.check()
    server.flush_cache()
    number = next(_plays)  # what was answered in one play must not help the next

    async def play_all() -> tuple[list[Answer], float]:
        async with client_of(server.url) as client:

            async def converse(item: tuple[Request, int]) -> list[Answer]:
                request, length = item
                answers: list[Answer] = []
                pool = request.pool if isinstance(request, Dialogue) else None
                pool = None if pool is None else f"{number} {pool}"
                for _ in range(request.num_turns if isinstance(request, Dialogue) else 1):
                    prompt = next_prompt(request, [answer.text for answer in answers])
                    answers.append(await stream(client, prompt, cell.temperature, length, pool))
                return answers

            items = list(zip(requests, num_tokens, strict=True))
            return await keep_running(items, cell.batch, converse)

    return asyncio.run(play_all())


def next_prompt(request: Request, answers: Sequence[str]) -> Prompt:
    """Return what a request sends after these answers."""
    return request.prompt(answers) if isinstance(request, Dialogue) else request
