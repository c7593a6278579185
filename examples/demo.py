"""Plain decoding, SGLang's EAGLE-3 and CAST on this machine, cold and warm, within ten minutes.

    make demo                               # SmolLM2-135M-Instruct, fetched once
    make demo ARGS="--pair tiny-170m"       # the trained tiny pair of this repository, no network

A server of each arm is up, and they take turns: in every round each serves the same few requests,
greedily. Speeds are compared within a round, so a drift of the machine cancels, and rounds go on
until they agree. Cold are the rounds in which a fresh CAST server makes its first 100 steps; no
server finds what an earlier one has learned. A chat model answers a question aloud before the
table. The last line of stdout says the same as JSON.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.harness.arms import Arm, parse_arm
from benchmarks.harness.cells import (
    COLD,
    COLD_STEPS,
    WARM,
    Cell,
    Request,
    Result,
    gather,
    take_turn,
)
from benchmarks.harness.dialogues import Encoder
from benchmarks.harness.pairs import (
    OUT,
    PAIRS,
    SMOLLM2,
    TINY,
    CommandError,
    Pair,
    device_name,
    heldout_prompts,
)
from benchmarks.harness.rows import num_identical
from benchmarks.harness.servers import Server, ServerError, exit_on_sigterm, serving
from benchmarks.harness.streams import accept_length, num_steps
from benchmarks.harness.tasks import load_task
from benchmarks.harness.turns import Ratio, interval, is_settled, is_sure, quotients, rounds
from examples import chat

ARMS = {"plain": "plain", "eagle3": "static:5-4-8", "cast": "cast"}  # as `parse_arm` takes them
BATCHES = (1, 8)
# A turn of two answers a place takes a second or two on two cores, so a round is over before the
# machine has drifted far, and about six of them make the first 100 steps.
PER_PLACE = 2
MEAN_TOKENS = 40
# Of a context of 1024, so that the longest answer fits.
MAX_PROMPT_TOKENS = 768
QUESTION = "Why is the sky blue? Explain it to a child."
CHAT_TOKENS = 160
# What six cold and six warm rounds at batch 8 take on two cores. Where a batch size would get less,
# it is not worth the start of other servers.
LEAST_SECONDS = 90.0
# Ten minutes, less what imports take before and stopping the servers takes after.
TIME_LIMIT = 540.0
# The cost profile covers what a server admits, so the servers admit what the demo sends.
SERVER_FLAGS = ["--dtype", "bfloat16", "--max-total-tokens", "16384"]
SERVER_FLAGS += ["--max-running-requests", "8", "--context-length", "1024"]

Round = Mapping[str, Result]  # by the arm's name
Row = dict[str, Any]


@dataclasses.dataclass
class Measured:
    """The rounds at one batch size."""

    pair: str  # its name in `PAIRS`
    batch: int
    cold: list[Round] = dataclasses.field(default_factory=list)
    warm: list[Round] = dataclasses.field(default_factory=list)
    is_fresh: bool = True  # whether the cold rounds were the first that their servers served


class Stages:
    """The demo's progress: one line a stage, on stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))

    @contextlib.contextmanager
    def stage(self, description: str) -> Iterator[TaskID]:
        """Show a stage while it runs."""
        task = self.progress.add_task(description, total=None)
        yield task
        self.progress.update(task, total=1, completed=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    until = time.monotonic() + TIME_LIMIT
    args = parse_args(argv)
    exit_on_sigterm()
    # A file or pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(f"Device: {device_name()}\n{PAIRS[args.pair].note}\n", highlight=False)
    stages = Stages()
    try:
        with stages.progress:
            measured = run_demo(args, stages, until, console)
    except (CommandError, ServerError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    rows = [row for one in measured for row in as_rows(one)]
    console.print(as_table(rows), highlight=False)
    for row in rows:
        console.print(in_words(row), highlight=False, soft_wrap=True)
    print(json.dumps({"rows": rows}), flush=True)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pair",
        choices=PAIRS,
        default=SMOLLM2,
        help="the models; smollm2 is fetched once, tiny-170m needs no network (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=MEAN_TOKENS,
        help="tokens per answer, in the mean (default: %(default)s)",
    )
    parser.add_argument(
        "--profile",
        help="cost profile for CAST (default: one that fits, if there is one in profiles/ or of an "
        "earlier demo, else the server measures one before its first request)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT / "demo",
        help="directory of logs and cost profiles (default: out/demo)",
    )
    return parser.parse_args(argv)


def run_demo(
    args: argparse.Namespace, stages: Stages, until: float, console: Console
) -> list[Measured]:
    """Measure every batch size, each with servers of its own if there is time to start them.

    A chat model then answers a question on CAST's server.

    Args:
        until: when to be done, of `time.monotonic`.
    """
    with stages.stage("prepare the models"):
        pair = PAIRS[args.pair].load()
        prompts = choose_prompts(args.pair, pair)
    arms = [parse_arm(text, pair.draft, args.profile) for text in ARMS.values()]
    measured: list[Measured] = []
    start_seconds = 0.0
    while len(measured) < len(BATCHES):
        with contextlib.ExitStack() as stack:
            begin = time.monotonic()
            with stages.stage("start a server of each arm"):
                # CAST's comes last and alone: it may have to measure a cost profile.
                launch = serving(
                    arms, pair.target, args.out, SERVER_FLAGS, None, 2, args.out / "profiles"
                )
                servers = stack.enter_context(launch)
            start_seconds = max(start_seconds, time.monotonic() - begin)
            is_fresh = True
            for batch in BATCHES[len(measured) :]:
                num_left = len(BATCHES) - len(measured)
                seconds = (until - time.monotonic() - start_seconds * (num_left - 1)) / num_left
                starts_again = seconds >= LEAST_SECONDS
                if not starts_again:
                    seconds = (until - time.monotonic()) / num_left
                one = Measured(args.pair, batch, is_fresh=is_fresh)
                end = time.monotonic() + seconds
                measure(one, arms, servers, prompts, args.tokens, end, stages)
                measured.append(one)
                is_fresh = False
                if starts_again:
                    break
            if len(measured) == len(BATCHES) and args.pair == SMOLLM2:
                stages.progress.stop()
                console.print(f"> {QUESTION}", highlight=False)
                talk = [{"role": "user", "content": QUESTION}]
                pieces = chat.ask(servers[ARMS["cast"]].url, talk, CHAT_TOKENS, 0.0)
                chat.show(pieces, console)
    return measured


def choose_prompts(name: str, pair: Pair) -> list[Request]:
    """Return what the pair is asked: its own task, of conversations the first turns."""
    if name == TINY:
        return list(heldout_prompts())
    dialogues = load_task(PAIRS[name].task, Encoder(pair.target, MAX_PROMPT_TOKENS)).dialogues
    return [dialogue._replace(num_turns=1) for dialogue in dialogues]


def measure(
    measured: Measured,
    arms: Sequence[Arm],
    servers: Mapping[str, Server],
    prompts: Sequence[Request],
    tokens: int,
    until: float,
    stages: Stages,
) -> None:
    """Let the arms take turns: cold, then warm until the rounds agree or the time is up."""
    cell = Cell(measured.batch, 0.0, PAIRS[measured.pair].task)
    size = PER_PLACE * measured.batch
    slowest = 0.0

    def take(arm: Arm, number: int) -> Result:
        # Every round has other prompts; the warm ones begin with those of the cold ones.
        chosen = itertools.islice(itertools.cycle(prompts), number * size, (number + 1) * size)
        return take_turn(arm, servers[arm.name], cell, list(chosen), tokens)

    def is_time_up() -> bool:
        return time.monotonic() + slowest > until

    for phase, taken in ((COLD, measured.cold), (WARM, measured.warm)):
        name = f"batch {measured.batch}, {phase}"
        with stages.stage(name) as task:
            begin = time.monotonic()
            for turns in rounds(arms, take):
                taken.append(turns)
                slowest = max(slowest, time.monotonic() - begin)
                begin = time.monotonic()
                ratios = vs(taken, "eagle3")
                done = f"{name}: {len(taken)} rounds, CAST vs EAGLE-3 {shown(interval(ratios))}"
                stages.progress.update(task, description=done)
                is_over = steps(taken) >= COLD_STEPS if phase == COLD else is_settled(ratios)
                if is_over or is_time_up():
                    break


def of_arm(taken: Sequence[Round], name: str) -> Result:
    """Return what an arm did in all rounds."""
    return gather(taken)[ARMS[name]]


def vs(taken: Sequence[Round], base: str) -> list[float]:
    """Return CAST's speed relative to that of another arm, in each round."""
    return quotients(of_arm(taken, "cast").tok_s, of_arm(taken, base).tok_s)


def steps(taken: Sequence[Round]) -> float:
    """Return the steps that CAST made: the passes of the target, per place."""
    answers = of_arm(taken, "cast").answers
    return num_steps(answers) * PER_PLACE * len(taken) / len(answers)


def as_rows(measured: Measured) -> list[Row]:
    """Compare the arms at one batch size, cold and warm."""
    return [
        as_row(measured, phase, taken)
        for phase, taken in ((COLD, measured.cold), (WARM, measured.warm))
    ]


def as_row(measured: Measured, phase: str, taken: Sequence[Round]) -> Row:
    """Compare the arms in the rounds of one phase."""
    results = {name: of_arm(taken, name) for name in ARMS}
    row: Row = {
        "device": device_name(),
        "model": PAIRS[measured.pair].name,
        "batch": measured.batch,
        "phase": phase,
        "fresh": measured.is_fresh,
        "rounds": len(taken),
        "cast_steps": round(steps(taken)),
    }
    for name, result in results.items():
        row[f"{name}_tok_s"] = round(statistics.median(result.tok_s), 1)
    for base in ("plain", "eagle3"):
        ratio = interval(vs(taken, base))
        row |= {
            f"speedup_vs_{base}": ratio.median,
            f"speedup_vs_{base}_low": ratio.low,
            f"speedup_vs_{base}_high": ratio.high,
        }
    same = num_identical(results["cast"], results["plain"])
    return row | {
        "accept_length": accept_length(results["cast"].answers),
        "identical": same == len(results["cast"].answers),
        "num_identical": same,
        "eagle3_num_identical": num_identical(results["eagle3"], results["plain"]),
        "num_prompts": len(results["cast"].answers),
    }


def ratio_of(row: Row, base: str) -> Ratio:
    """Return CAST's speed relative to that of another arm with its ends."""
    return Ratio(*(row[f"speedup_vs_{base}{end}"] for end in ("", "_low", "_high")))


def shown(ratio: Ratio) -> str:
    """Return a ratio for people."""
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def in_words(row: Row) -> str:
    """Say in plain words whether CAST was faster than the other arms."""
    texts = []
    if row["phase"] == COLD and row["fresh"]:
        texts.append(f"These are the first {row['cast_steps']} steps of CAST's server.")
    elif row["phase"] == COLD:
        texts.append(
            "The servers had served the smaller batch size before: there was no time to start "
            "others."
        )
    for base, label in (("eagle3", "EAGLE-3"), ("plain", "plain decoding")):
        ratio = ratio_of(row, base)
        assert ratio.low is not None and ratio.high is not None
        if ratio.low <= 1 <= ratio.high:
            texts.append(f"CAST and {label} differ by no more than the noise, {shown(ratio)}.")
        else:
            word = "faster" if ratio.low > 1 else "slower"
            texts.append(f"CAST is {word} than {label}, {shown(ratio)}.")
    if not is_sure(row["rounds"]):
        texts.append(f"But {row['rounds']} rounds are too few to be sure.")
    return f"Batch {row['batch']}, {row['phase']}: {' '.join(texts)}"


def as_table(rows: Sequence[Row]) -> Table:
    """Show the rows to a person."""
    table = Table(
        title=f"{rows[0]['model']}, bf16, greedy, tokens/s",
        caption="medians of rounds; in brackets the 95 % confidence interval of the median, of "
        "fewer than six rounds the least and the greatest; same text: answers of CAST and of "
        "EAGLE-3 equal to plain decoding's, token by token; in bf16 a near tie between two tokens "
        "may fall either way",
    )
    headings = ("batch", "phase", "rounds", "plain", "EAGLE-3", "CAST", "vs plain", "vs EAGLE-3")
    for heading in (*headings, "accept length", "same text"):
        table.add_column(heading, justify="right")
    for row in rows:
        length = row["accept_length"]
        table.add_row(
            *(str(row[name]) for name in ("batch", "phase", "rounds")),
            *(f"{row[f'{arm}_tok_s']:.1f}" for arm in ARMS),
            *(shown(ratio_of(row, base)) for base in ("plain", "eagle3")),
            "-" if length is None else f"{length:.2f}",
            f"{row['num_identical']}, {row['eagle3_num_identical']} of {row['num_prompts']}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
