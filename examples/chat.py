"""Talk to a model under CAST, and see how many tokens each step brought.

    make chat                                  # starts a server of the pair smollm2
    make chat ARGS="--url http://host:30000"   # a server that runs already

Each line is a question; earlier ones are remembered until an empty line, and end of file (Ctrl-D)
ends the talk. Each step's tokens have another colour than those of the step before, and behind an
answer stands how many tokens its steps brought.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import httpx
from rich.console import Console

from benchmarks.harness.arms import parse_arm
from benchmarks.harness.pairs import OUT, CommandError, smollm2_pair
from benchmarks.harness.servers import ServerError, exit_on_sigterm, serving

SERVER_FLAGS = ["--dtype", "bfloat16", "--max-total-tokens", "8192"]
SERVER_FLAGS += ["--max-running-requests", "2", "--context-length", "4096"]
COLORS = ("cyan", "green")  # of a step and the next
TIMEOUT = 600.0


class Piece(NamedTuple):
    """What one step of the server brought."""

    text: str
    num_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until the end of the input; return the exit code."""
    args = parse_args(argv)
    exit_on_sigterm()
    console = Console(highlight=False)
    try:
        with server_url(args, console) as url:
            talk(url, args.max_tokens, args.temperature, console)
    except (CommandError, ServerError, OSError, httpx.HTTPError, ValueError) as error:
        print(f"chat: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="a server that runs already (default: start one)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="of an answer (default: %(default)s)"
    )
    return parser.parse_args(argv)


@contextlib.contextmanager
def server_url(args: argparse.Namespace, console: Console) -> Iterator[str]:
    """Yield the address of the server that was named, or of one that is started for the talk."""
    if args.url:
        yield args.url.rstrip("/")
        return
    pair = smollm2_pair()
    arm = parse_arm("cast", pair.draft, None)
    logs = OUT / "chat"
    with contextlib.ExitStack() as stack:
        with console.status("start a server; the first time it measures what its steps cost"):
            launch = serving([arm], pair.target, logs, SERVER_FLAGS, profiles=logs / "profiles")
            servers = stack.enter_context(launch)
        yield servers[arm.name].url


def talk(url: str, max_tokens: int, temperature: float, console: Console) -> None:
    """Read questions and show answers until the end of the input."""
    messages: list[dict[str, str]] = []
    is_person = sys.stdin.isatty()
    while True:
        if is_person:
            console.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            messages = []
            continue
        if not is_person:
            console.print(f"> {line.strip()}", markup=False)
        messages.append({"role": "user", "content": line.strip()})
        try:
            answer = show(ask(url, messages, max_tokens, temperature), console)
        except ValueError as error:
            if len(messages) == 1:
                raise
            console.print(f"{error}\nThe talk begins anew.", style="red", markup=False)
            messages = []
            continue
        messages.append({"role": "assistant", "content": answer})


def ask(
    url: str, messages: Sequence[dict[str, str]], max_tokens: int, temperature: float
) -> Iterator[Piece]:
    """Yield the pieces of an answer as they come.

    Raises:
        ValueError: the server refused the request, for instance because the talk is too long.
        httpx.HTTPError: the server did not answer.
    """
    body: dict[str, Any] = {
        "model": "default",
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    num_before = 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT) as response:
        if response.is_error:
            response.read()
            raise ValueError(f"the server answered {response.status_code}: {response.text}")
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise ValueError(f"the server answered {chunk['error']}")
            num_tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else num_before
            text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if text or num_tokens > num_before:
                yield Piece(text, num_tokens - num_before)
            num_before = num_tokens


def show(pieces: Iterator[Piece], console: Console) -> str:
    """Print an answer while it comes, and what each step brought; return its text."""
    began = time.monotonic()
    text, counts = "", []
    for number, piece in enumerate(pieces):
        console.print(
            piece.text, style=COLORS[number % len(COLORS)], markup=False, end="", soft_wrap=True
        )
        text += piece.text
        if piece.num_tokens:
            counts.append(piece.num_tokens)
    seconds = time.monotonic() - began
    console.print(f"\n{in_numbers(counts, seconds)}\n", style="dim", markup=False, soft_wrap=True)
    return text


def in_numbers(counts: Sequence[int], seconds: float) -> str:
    """Say how many tokens came in how many steps, and how often how many came together."""
    if not counts:
        return "no tokens"
    times = Counter(counts)
    parts = ", ".join(f"{times[count]} x {count}" for count in sorted(times))
    return (
        f"{sum(counts)} tokens in {seconds:.1f} s: {len(counts)} steps of "
        f"{sum(counts) / len(counts):.2f} tokens in the mean (steps x tokens: {parts})"
    )


if __name__ == "__main__":
    sys.exit(main())
