"""What speculation costs of the cache: CAST against SGLang's default tree and plain decoding.

    python -m benchmarks.studies.bench_capacity --out FILE

Serves conversations of the tiny pair in float32 from a cache that they fill: all of them take a
turn, then all the next. Slots that running requests reserve push earlier turns out of the cache,
whose tokens are then not found again. Counted are

  - max_total_num_tokens, what the server says its cache holds,
  - cached_tokens of all turns but the first, and the share of what was said before that they are,
  - the most requests that ran at once, and how many were retracted.

Without --pool the server sizes its cache by itself, as on a GPU, where memory that is taken beside
the cache makes it smaller.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.arms import parse_arms
from benchmarks.harness.pairs import OUT, Pair, tiny_pair
from benchmarks.harness.provenance import provenance
from benchmarks.harness.servers import Server, exit_on_sigterm, serving
from benchmarks.harness.talks import said_in_turns, take_turn
from tests.support.profiles import write_profile

ARMS = (
    "plain",
    "static:5-4-8",
    "cast",
    "cast+--speculative-num-steps=5+--speculative-eagle-topk=4+--speculative-num-draft-tokens=8",
)


class Capacity(NamedTuple):
    """What one arm had room for."""

    max_total_num_tokens: int
    cached_tokens: int
    said_before: int  # tokens of the prompts that had been in the cache at some time
    most_running: int
    retracted: int
    answers: list[list[int]]

    def report(self, name: str) -> dict[str, Any]:
        """Return the figures as JSON."""
        figures = {"arm": name, **self._asdict()}
        del figures["answers"]
        return figures | {"share": round(self.cached_tokens / max(1, self.said_before), 4)}


def converse(
    server: Server, said: Sequence[Sequence[list[int]]], num_tokens: int, at_once: int
) -> Capacity:
    """Let a server answer all turns of all conversations; its cache holds nothing before."""
    server.flush_cache()
    known = server.get("/server_info")
    log_begins = len(server.log_path.read_bytes())
    heard: list[list[int]] = [[] for _ in said]
    cached = past = 0
    for turn in range(len(said[0])):
        past += sum(map(len, heard))
        prompts = [
            past_tokens + said_in[turn] for past_tokens, said_in in zip(heard, said, strict=True)
        ]
        replies = take_turn(server.url, prompts, num_tokens, at_once)
        cached += sum(reply.cached for reply in replies)
        heard = [prompt + reply.tokens for prompt, reply in zip(prompts, replies, strict=True)]
    log = server.log_path.read_bytes()[log_begins:].decode(errors="replace")
    return Capacity(
        max_total_num_tokens=int(known["max_total_num_tokens"]),
        cached_tokens=cached,
        said_before=past,
        most_running=_most_running(log),
        retracted=_retracted(log),
        answers=heard,
    )


def _retracted(log: str) -> int:
    """Return how many times a server took a running request back."""
    return sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log)))


def _most_running(log: str) -> int:
    """Return how many requests ran at once at most, by what was running at each prefill."""
    found = re.findall(r"Prefill batch, #new-seq: (\d+),.*#running-req: (\d+)", log)
    return max((int(new) + int(running) for new, running in found), default=0)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="(default: %(default)s)")
    for flag, default, about in (
        ("--pool", 4096, "tokens of the cache; 0 to let the server size it"),
        ("--conversations", 16, "that are held at the same time"),
        ("--turns", 4, "of each"),
        ("--said", 28, "tokens that the user says in a turn"),
        ("--tokens", 32, "of an answer"),
        ("--at-once", 16, "requests that come together"),
        ("--repeats", 1, "of all conversations, on the same servers"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{about} (default: {default})")
    parser.add_argument("--out", type=Path, default=OUT / "capacity.json", help="gets the figures")
    args = parser.parse_args(argv)
    for name in ("conversations", "turns", "said", "tokens", "at_once", "repeats"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures for people."""
    names = ("max_total_num_tokens", "cached_tokens", "share", "most_running", "retracted")
    lines = ["| arm | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in ("arm", *names)) + " |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 1 if answers differ between arms."""
    exit_on_sigterm()
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pair: Pair = tiny_pair()
    profile = write_profile(args.out.with_suffix(".profile.json"))
    flags = ["--dtype", "float32", "--cast-allow-foreign-profile"]
    if args.pool:
        flags += ["--max-total-tokens", str(args.pool)]
    said = said_in_turns(pair, args.conversations, [args.said] * args.turns)
    rows, answers = [], []
    for arm in parse_arms(args.arms, pair.draft, str(profile)):
        with serving([arm], pair.target, args.out.parent, flags) as servers:
            for _ in range(args.repeats):
                found = converse(servers[arm.name], said, args.tokens, args.at_once)
                rows.append(found.report(arm.name))
                answers.append(found.answers)
    agree = all(each == answers[0] for each in answers)
    facts = {name: value for name, value in vars(args).items() if name != "out"}
    where = provenance("benchmarks.studies.bench_capacity", argv, pair, "", facts)
    content = {**where, "answers_agree": agree, "rows": rows}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows))
    print("answers agree" if agree else "answers DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
