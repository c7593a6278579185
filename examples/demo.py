"""Plain decoding, SGLang's EAGLE-3 and CAST, one after the other on this machine.

    make demo

Each arm serves the same prompts to the same client, greedily. The table shows tokens per second of
wall time; the last line of stdout says the same as JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.harness.arms import Arm, parse_arm
from benchmarks.harness.cells import answer_lengths
from benchmarks.harness.pairs import (
    INFLATED_NOTE,
    INFLATED_PARAMS,
    OUT,
    CommandError,
    device_name,
    heldout_prompts,
    inflated_pair,
    measured_profile,
)
from benchmarks.harness.servers import Server, ServerError, exit_on_sigterm, serving

MODEL = f"tiny pair at {INFLATED_PARAMS}"
ARMS = ("plain", "static", "cast")  # static is SGLang's EAGLE-3
NUM_PROMPTS = {1: 8, 8: 24}  # by batch size
WARMUP_TOKENS = 16
# The cost profile covers what a server admits, so the servers admit what the demo sends.
SERVER_FLAGS = ["--dtype", "bfloat16", "--max-total-tokens", "16384"]
SERVER_FLAGS += ["--max-running-requests", "8", "--context-length", "1024"]
PROFILE_SECONDS = 90


@dataclasses.dataclass(frozen=True)
class Run:
    """What one arm did at one batch size."""

    tok_s: float
    texts: list[str]
    accept_length: float | None  # None without speculation


class Stages:
    """The demo's progress: one line a stage, on stderr."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))

    @contextlib.contextmanager
    def stage(self, description: str, total: int = 1) -> Iterator[TaskID]:
        """Show a stage while it runs; one without steps to count pulsates."""
        task = self.progress.add_task(description, total=total if total > 1 else None)
        yield task
        self.progress.update(task, total=total, completed=total)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    args = parse_args(argv)
    exit_on_sigterm()
    console = Console()
    console.print(f"Device: {device_name()}\n{INFLATED_NOTE}\n", highlight=False)
    stages = Stages()
    try:
        with stages.progress:
            rows = run_demo(args, stages)
    except (CommandError, ServerError, OpenAIError, OSError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    console.print(as_table(rows), highlight=False)
    print(json.dumps({"rows": rows}), flush=True)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=64, help="tokens per answer, in the mean (default: 64)"
    )
    parser.add_argument("--profile", help="cost profile for CAST (default: measure one, once)")
    parser.add_argument(
        "--out", type=Path, default=OUT / "demo", help="directory of logs and profile"
    )
    return parser.parse_args(argv)


def run_demo(args: argparse.Namespace, stages: Stages) -> list[dict[str, Any]]:
    """Run all arms and return one row for each batch size."""
    with stages.stage("prepare the models"):
        pair = inflated_pair()
    profile = args.profile
    if profile is None:
        with stages.stage("measure the cost profile"):
            profile = str(measured_profile(pair, args.out, PROFILE_SECONDS, SERVER_FLAGS))

    runs: dict[tuple[str, int], Run] = {}
    for text in ARMS:
        arm = parse_arm(text, pair.draft, profile)
        with contextlib.ExitStack() as stack:
            with stages.stage(f"{arm.label}: start the server"):
                servers = stack.enter_context(serving([arm], pair.target, args.out, SERVER_FLAGS))
            for batch in NUM_PROMPTS:
                runs[arm.kind, batch] = run_arm(arm, servers[arm.name], batch, args.tokens, stages)
    return [as_row(batch, *(runs[kind, batch] for kind in ARMS)) for batch in NUM_PROMPTS]


def run_arm(arm: Arm, server: Server, batch: int, tokens: int, stages: Stages) -> Run:
    """Send the prompts, `batch` at a time, and time them."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300.0)
    prompts = heldout_prompts()[: NUM_PROMPTS[batch]]
    lengths = answer_lengths(tokens, len(prompts))

    def complete(prompt: str, max_tokens: int) -> Any:
        return client.completions.create(
            model="default",
            prompt=prompt,
            temperature=0.0,
            max_tokens=max_tokens,
            extra_body={"ignore_eos": True, "return_spec_tokens_details": True},
        )

    with (
        stages.stage(f"{arm.label}: batch {batch}", total=len(prompts)) as task,
        ThreadPoolExecutor(batch) as pool,
    ):
        list(pool.map(lambda prompt: complete(prompt, WARMUP_TOKENS), prompts[:batch]))
        server.flush_cache()
        start = time.perf_counter()
        answers = []
        for answer in pool.map(complete, prompts, lengths):
            answers.append(answer)
            stages.progress.advance(task)
        seconds = time.perf_counter() - start
    return Run(
        tok_s=sum(answer.usage.completion_tokens for answer in answers) / seconds,
        texts=[answer.choices[0].text for answer in answers],
        accept_length=accept_length(answers),
    )


def accept_length(answers: Sequence[Any]) -> float | None:
    """Return the tokens gained per verify pass, or None without speculation."""
    verified = [
        (answer.usage.completion_tokens, details["spec_verify_ct"])
        for answer in answers
        if (details := ((answer.model_extra or {}).get("sglext") or {}).get("spec_tokens_details"))
    ]
    passes = sum(count for _, count in verified)
    return sum(tokens for tokens, _ in verified) / passes if passes else None


def as_row(batch: int, plain: Run, eagle3: Run, cast: Run) -> dict[str, Any]:
    """Compare the arms at one batch size."""
    pairs = zip(plain.texts, cast.texts, strict=True)
    num_identical = sum(expected == text for expected, text in pairs)
    return {
        "device": device_name(),
        "model": MODEL,
        "batch": batch,
        "plain_tok_s": round(plain.tok_s, 1),
        "eagle3_tok_s": round(eagle3.tok_s, 1),
        "cast_tok_s": round(cast.tok_s, 1),
        "speedup_vs_plain": round(cast.tok_s / plain.tok_s, 3),
        "speedup_vs_eagle3": round(cast.tok_s / eagle3.tok_s, 3),
        "accept_length": cast.accept_length and round(cast.accept_length, 3),
        "identical": num_identical == len(plain.texts),
        "num_identical": num_identical,
        "num_prompts": len(plain.texts),
    }


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Show the rows to a person."""
    table = Table(
        title=f"{MODEL}, bf16, greedy, tokens/s",
        caption="same text: answers of CAST equal to plain decoding's, letter by letter; in bf16 a "
        "near tie between two tokens may fall either way",
    )
    headings = ("batch", "plain", "EAGLE-3", "CAST", "vs plain", "vs EAGLE-3", "accept length")
    for heading in (*headings, "same text"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            *(f"{row[f'{arm}_tok_s']:.1f}" for arm in ("plain", "eagle3", "cast")),
            f"{row['speedup_vs_plain']:.2f}x",
            f"{row['speedup_vs_eagle3']:.2f}x",
            "-" if row["accept_length"] is None else f"{row['accept_length']:.2f}",
            f"{row['num_identical']} of {row['num_prompts']}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
