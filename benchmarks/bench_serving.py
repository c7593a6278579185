"""Decoding speed of several ways to serve one model, measured side by side.

    python -m benchmarks.bench_serving --arms plain,static,static:3-1-4,cast --batches 1,8 --out DIR

All servers are up at once; those that are not measured sleep. A run starts `batch` requests of the
same length together and counts tokens from the moment all of them stream until the first one ends,
so every step counted has exactly `batch` requests and no prefill. Arms take turns within a repeat,
and ratios are formed within a repeat, so that a drift of the machine cancels.

Arms: plain | static[:STEPS-TOPK-TOKENS] (SGLang's EAGLE-3) | cast[:POLICY].
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.pairs import (
    INFLATED_NOTE,
    OUT,
    CommandError,
    Pair,
    inflated_pair,
    measured_profile,
    tiny_directory,
)
from benchmarks.provenance import provenance
from benchmarks.servers import Arm, Server, ServerError, exit_on_sigterm, parse_arm, serving
from benchmarks.streams import Answer, accept_length, steady_window, stream_batch

WARMUP_TOKENS = 16
PROFILE_SECONDS = 180
# A cost profile covers what a server admits, so no more is admitted than is measured.
SERVER_FLAGS = (
    "--dtype bfloat16 --max-total-tokens 16384 --max-running-requests 16 --context-length 1024"
)


class Cell(NamedTuple):
    """One condition under which every arm is measured."""

    batch: int
    temperature: float
    task: str


@dataclasses.dataclass
class Result:
    """One arm in one cell: a value for each repeat, and the answers of the last one."""

    tok_s: list[float] = dataclasses.field(default_factory=list)
    answers: list[Answer] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = parse_args(argv)
    exit_on_sigterm()
    try:
        pair, note = choose_pair(args)
        arms = choose_arms(args, pair)
        tasks = {path.stem: read_prompts(path) for path in args.prompts}
        cells = [Cell(*cell) for cell in itertools.product(args.batches, args.temperatures, tasks)]
        flags = shlex.split(args.server_flags)
        with serving(arms, pair.target, args.out, flags) as servers:
            rows = measure(args, arms, servers, cells, tasks)
    except (CommandError, ServerError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"bench_serving: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_serving: interrupted", file=sys.stderr)
        return 130
    path = args.out / "results.json"
    origin = provenance("benchmarks.bench_serving", argv, pair, note, workload_settings(args))
    content = {"provenance": origin, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    # A file or pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 120).print(as_table(rows))
    print(path)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", type=list_of(str), default=["plain", "static", "cast"])
    parser.add_argument("--temperatures", type=list_of(float), default=[0.0])
    parser.add_argument("--profile", help="cost profile for CAST (default: search for one)")
    parser.add_argument("--out", type=Path, default=OUT / "bench", help="gets results.json, logs")
    add_workload_options(parser)
    args = parser.parse_args(argv)
    check_workload(parser, args)
    return args


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add what every study of serving speed asks: which pair, which requests, how often."""
    parser.add_argument("--batches", type=list_of(int), default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="per answer (default: 128)")
    parser.add_argument(
        "--requests",
        type=int,
        default=8,
        help="least number of requests a run, rounded up to whole batches (default: 8)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[tiny_directory() / "heldout_prompts.jsonl"],
        metavar="FILE",
        help="JSON lines with a field `prompt`; the name of a file names its task",
    )
    parser.add_argument("--model-path", help="target (default: the tiny pair, padded to 170M)")
    parser.add_argument("--draft-model-path", help="its draft, with --model-path")
    parser.add_argument(
        "--server-flags",
        default=SERVER_FLAGS,
        help="for every server; room for the largest batch is needed (default: %(default)s)",
    )


def check_workload(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what `add_workload_options` cannot: the exit of a wrong command line."""
    if (args.model_path is None) != (args.draft_model_path is None):
        parser.error("--model-path and --draft-model-path go together")
    if args.tokens < 2 * WARMUP_TOKENS:
        parser.error(f"--tokens must be at least {2 * WARMUP_TOKENS}")


def workload_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what of `add_workload_options` belongs to a result."""
    return {
        "server_flags": args.server_flags,
        "tokens": args.tokens,
        "repeats": args.repeats,
    }


def choose_pair(args: argparse.Namespace) -> tuple[Pair, str]:
    """Return the pair to serve and what must be said about it."""
    if args.model_path is not None:
        return Pair(args.model_path, args.draft_model_path), ""
    return inflated_pair(), INFLATED_NOTE


def choose_arms(args: argparse.Namespace, pair: Pair) -> list[Arm]:
    """Return the arms; for the padded pair, measure the cost profile they need first."""
    profile = args.profile
    arms = [parse_arm(text, pair.draft, profile) for text in args.arms]
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError("--arms: each arm at most once")
    if profile is None and args.model_path is None and any(arm.kind == "cast" for arm in arms):
        profile = measured_profile(pair, args.out, PROFILE_SECONDS, shlex.split(args.server_flags))
        arms = [parse_arm(text, pair.draft, str(profile)) for text in args.arms]
    return arms


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of one task."""
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def measure(
    args: argparse.Namespace,
    arms: Sequence[Arm],
    servers: dict[str, Server],
    cells: Sequence[Cell],
    tasks: dict[str, list[str]],
) -> list[dict[str, Any]]:
    """Measure every arm in every cell and return the rows of the result."""
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(cells) * args.repeats * len(arms))
        for cell in cells:
            prompts = choose_prompts(tasks[cell.task], cell.batch, args.requests)
            warm_up(arms, servers, cell, prompts)
            results = take_turns(args, arms, servers, cell, prompts, progress, bar)
            rows += as_rows(cell, arms, results)
    return rows


def warm_up(
    arms: Sequence[Arm], servers: dict[str, Server], cell: Cell, prompts: Sequence[str]
) -> None:
    """Let every arm decode a few tokens in the cell's batch size."""
    for arm in arms:
        run(servers[arm.name], prompts[: cell.batch], cell, WARMUP_TOKENS)


def take_turns(
    args: argparse.Namespace,
    arms: Sequence[Arm],
    servers: dict[str, Server],
    cell: Cell,
    prompts: Sequence[str],
    progress: Progress,
    bar: TaskID,
) -> dict[str, Result]:
    """Run every arm once in each repeat; return the results by the arm's name."""
    results = {arm.name: Result() for arm in arms}
    for repeat in range(args.repeats):
        # Another order each time, so that no arm always follows the same one.
        for arm in _rotated(arms, repeat):
            progress.update(bar, description=f"{arm.name} batch {cell.batch}")
            tok_s, answers = run(servers[arm.name], prompts, cell, args.tokens)
            results[arm.name].tok_s.append(tok_s)
            results[arm.name].answers = answers
            progress.advance(bar)
    return results


def choose_prompts(prompts: list[str], batch: int, num_requests: int) -> list[str]:
    """Return whole batches of prompts, at least `num_requests`, repeating them if they run out."""
    count = -(-num_requests // batch) * batch
    return list(itertools.islice(itertools.cycle(prompts), count))


def run(
    server: Server, prompts: Sequence[str], cell: Cell, num_tokens: int
) -> tuple[float, list[Answer]]:
    """Send the prompts in batches; return tokens per second of steady decoding, and the answers."""
    server.check()
    server.flush_cache()
    answers: list[Answer] = []
    tokens = seconds = 0.0
    for start in range(0, len(prompts), cell.batch):
        batch = prompts[start : start + cell.batch]
        wave = asyncio.run(stream_batch(server.url, batch, cell.temperature, num_tokens))
        gained, elapsed = steady_window(wave)
        tokens, seconds = tokens + gained, seconds + elapsed
        answers += wave
    return tokens / seconds, answers


def as_rows(cell: Cell, arms: Sequence[Arm], results: dict[str, Result]) -> list[dict[str, Any]]:
    """Summarise a cell: one row for each arm."""
    plain = next((results[arm.name] for arm in arms if arm.kind == "plain"), None)
    statics = [results[arm.name] for arm in arms if arm.kind == "static"]
    best = max(statics, key=lambda result: statistics.median(result.tok_s), default=None)
    rows = []
    for arm in arms:
        result = results[arm.name]
        num_same = None
        if plain is not None and cell.temperature == 0:
            num_same = num_identical(result, plain)
        rows.append(
            {
                "arm": arm.name,
                **cell._asdict(),
                **speeds(result),
                "vs_plain": ratio(result, plain),
                "vs_best_static": ratio(result, best),
                "accept_length": accept_length(result.answers),
                "identical_to_plain": (
                    None if num_same is None else num_same == len(result.answers)
                ),
                "num_identical": num_same,
                "num_requests": len(result.answers),
            }
        )
    return rows


def speeds(result: Result) -> dict[str, Any]:
    """Return the tokens per second of an arm as fields of a row."""
    return {
        "tok_s_median": round(statistics.median(result.tok_s), 2),
        "tok_s_min": round(min(result.tok_s), 2),
        "tok_s_max": round(max(result.tok_s), 2),
        "tok_s": [round(value, 2) for value in result.tok_s],
    }


def num_identical(result: Result, base: Result) -> int:
    """Return how many answers are those of the other arm, token for token."""
    answers = zip(result.answers, base.answers, strict=True)
    return sum(ours.output_ids == theirs.output_ids for ours, theirs in answers)


def ratio(result: Result, base: Result | None) -> float | None:
    """Return the median over repeats of the ratio within a repeat."""
    return None if base is None else round(statistics.median(ratios(result, base)), 4)


def ratios(result: Result, base: Result) -> list[float]:
    """Return the ratio within each repeat."""
    return [ours / theirs for ours, theirs in zip(result.tok_s, base.tok_s, strict=True)]


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Show the rows to a person."""
    table = Table(title="Steady decoding, tokens/s: median (min to max) of the repeats")
    for heading in ("task", "T", "batch", "arm"):
        table.add_column(heading)
    for heading in ("tokens/s", "vs plain", "vs best static", "accept length", "same as plain"):
        table.add_column(heading, justify="right")
    for row in rows:
        same = row["num_identical"]
        table.add_row(
            row["task"],
            f"{row['temperature']:g}",
            str(row["batch"]),
            row["arm"],
            f"{row['tok_s_median']:.1f} ({row['tok_s_min']:.1f} to {row['tok_s_max']:.1f})",
            *(_shown(row[key], "x") for key in ("vs_plain", "vs_best_static")),
            _shown(row["accept_length"]),
            "-" if same is None else f"{same} of {row['num_requests']}",
        )
    return table


def _shown(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _rotated(arms: Sequence[Arm], by: int) -> list[Arm]:
    by %= len(arms)
    return [*arms[by:], *arms[:by]]


def list_of(kind: type) -> Any:
    """Return a parser of options such as 1,8."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


if __name__ == "__main__":
    sys.exit(main())
