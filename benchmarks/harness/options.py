"""The command line of the serving benchmarks: options, their defaults, and what a result states."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arms import STATIC_GRID
from benchmarks.harness.pairs import OUT, PAIRS, SMOLLM2, TINY
from benchmarks.harness.servers import device_kind
from benchmarks.harness.tasks import Task

WARMUP_TOKENS = 64
MIN_TOKENS = 32
# A cost profile covers what a server admits, so no more is admitted than the shipped one measured.
SERVER_FLAGS = (
    "--dtype bfloat16 --max-total-tokens {tokens} --max-running-requests {requests} "
    "--context-length 1024"
)
ARMS = ("plain", "static-grid", "adaptive", "cast:auto", "cast:fixed")
BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 64)}
FULL = {
    "temperatures": [0.0, 1.0],
    "tasks": [
        *("code", "hostile", "humaneval", "gsm8k", "mt-bench"),
        *("sharegpt-instruct", "sharegpt-summarise", "sharegpt-qa"),
    ],
}
FULL_BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 2, 4, 8, 16, 32, 64)}
SMOKE = {
    "arms": ["plain", "cast:auto"],
    "batches": [1, 4],
    "tokens": 96,
    "warmup_tokens": 8,
    "requests": 4,
    "repeats": 1,
    "profile": "estimate",
    "server_flags": (
        "--dtype float32 --max-total-tokens 4096 --max-running-requests 4 --context-length 512"
    ),
}


def parse_args(argv: Sequence[str] | None, description: str = "") -> argparse.Namespace:
    """Read the command line of `bench_serving`."""
    parser = argparse.ArgumentParser(
        prog="bench_serving",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arms",
        type=list_of(str),
        default=list(ARMS),
        metavar="LIST",
        help=f"(default: {','.join(ARMS)})",
    )
    parser.add_argument(
        "--static-grid",
        type=list_of(str),
        default=list(STATIC_GRID),
        metavar="LIST",
        help=f"shapes of the arm static-grid (default: {','.join(STATIC_GRID)})",
    )
    parser.add_argument(
        "--temperatures", type=list_of(float), default=[0.0], metavar="LIST", help="(default: 0)"
    )
    parser.add_argument(
        "--tasks",
        type=list_of(str),
        metavar="LIST",
        help=f"(default: code, with --pair {SMOLLM2} {PAIRS[SMOLLM2].task})",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="more tasks, each a file of JSON lines; alone, these instead of --tasks",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="longer prompts lose their beginning (default: what --context-length leaves)",
    )
    parser.add_argument(
        "--warmup-tokens",
        type=int,
        default=WARMUP_TOKENS,
        metavar="N",
        help="per answer, before each cell, of arms that learn; others take a few "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--start-at-once",
        type=int,
        metavar="N",
        help="servers that come up together (default: 2, on a GPU 1)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="servers in memory; more arms run in groups, each with a plain arm of its own "
        "(default: as many as fit)",
    )
    parser.add_argument("--profile", help="cost profile for CAST (default: search, else measure)")
    parser.add_argument(
        "--cooldown",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="rest before each run, for a machine that throttles (default: 0)",
    )
    parser.add_argument(
        "--cold",
        type=int,
        default=0,
        metavar="N",
        help="measure each cell cold too, N times: N x cells x arms more starts, one after the "
        "other, of 30 to 90 s each on two CPU cores; where CAST finds no cost profile, a start of "
        "all arms takes up to a minute more (default: 0)",
    )
    parser.add_argument("--out", type=Path, default=OUT / "bench", help="gets results and logs")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last run in --out, which must have been started with the same "
        "options: cells that every arm has finished are kept, the others measured",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="other defaults: the unpadded tiny pair and little of everything, to see that it runs",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="other defaults: every batch size, temperature 0 and 1, the paper's kinds of tasks",
    )
    add_workload_options(parser, BATCHES[device_kind()])
    chosen = parser.parse_known_args(argv)[0]
    if chosen.smoke and chosen.full:
        parser.error("--smoke and --full exclude each other")
    if chosen.smoke:
        parser.set_defaults(**SMOKE)
    if chosen.full:
        parser.set_defaults(**FULL, batches=list(FULL_BATCHES[device_kind()]))
    args = parser.parse_args(argv)
    check_workload(parser, args)
    if args.smoke and (args.pair or args.model_path) is not None:
        parser.error("--smoke serves the tiny pair; leave --pair and --model-path out")
    if min(args.cooldown, args.cold) < 0:
        parser.error("--cooldown and --cold must be at least 0")
    if args.warmup_tokens < 2:
        parser.error("--warmup-tokens must be at least 2")
    if args.tasks is None:
        args.tasks = [] if args.prompts else [PAIRS[args.pair or TINY].task]
    return args


def add_workload_options(parser: argparse.ArgumentParser, batches: Sequence[int] = (1, 8)) -> None:
    """Add what every study of serving speed asks: which pair, how many requests, how often.

    Args:
        batches: the default.
    """
    parser.add_argument(
        "--batches",
        type=list_of(int),
        default=list(batches),
        metavar="LIST",
        help=f"requests decoded together (default: {','.join(map(str, batches))})",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="of every run (default: 3)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=128,
        metavar="N",
        help="per answer, in the mean (default: 128)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=8,
        metavar="N",
        help="least number of requests a run, in whole batches and at least three (default: 8)",
    )
    parser.add_argument(
        "--pair",
        choices=PAIRS,
        help=f"{TINY} is the tiny pair, padded; {SMOLLM2} is SmolLM2-135M-Instruct, fetched once "
        f"(default: {TINY})",
    )
    parser.add_argument("--model-path", help="another target, in place of --pair")
    parser.add_argument("--draft-model-path", help="its draft, with --model-path")
    parser.add_argument(
        "--server-flags",
        default=server_flags(),
        help="for every server; room for the largest batch is needed (default: %(default)s)",
    )


def check_workload(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what `add_workload_options` cannot: the exit of a wrong command line."""
    if (args.model_path is None) != (args.draft_model_path is None):
        parser.error("--model-path and --draft-model-path go together")
    if None not in (args.pair, args.model_path):
        parser.error("--pair and --model-path exclude each other")
    if args.tokens < MIN_TOKENS:
        parser.error(f"--tokens must be at least {MIN_TOKENS}")
    if min([*args.batches, args.requests, args.repeats]) < 1:
        parser.error("--batches, --requests and --repeats must be at least 1")


def server_flags() -> str:
    """Return the flags that the padded tiny pair is served with on this machine."""
    largest = max(BATCHES[device_kind()])
    return SERVER_FLAGS.format(tokens=1536 * largest, requests=largest)


def workload_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what of `add_workload_options` belongs to a result."""
    return {
        "server_flags": args.server_flags,
        "tokens": args.tokens,
        "repeats": args.repeats,
    }


def settings(args: argparse.Namespace, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Return what made the numbers what they are."""
    return {
        **workload_settings(args),
        "requests": args.requests,
        "warmup_tokens": args.warmup_tokens,
        "arms": args.arms,
        "static_grid": args.static_grid,
        "batches": args.batches,
        "temperatures": args.temperatures,
        "profile": args.profile,
        "cooldown": args.cooldown,
        "cold": args.cold,
        "tasks": {task.name: task.note for task in tasks.values()},
    }


def list_of(kind: type) -> Any:
    """Return a parser of options such as 1,8."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse
