"""How well a later turn drafts behind tokens that were decoded plainly.

    python -m benchmarks.studies.bench_after_plain --out FILE

Tokens of plain steps enter the prefix cache without keys and values of the draft, whose slots hold
what other requests have left there. Drafts of a later turn that reuses them attend to that, which
costs acceptance and no correctness. Each conversation is held three times, with the same answers:

  drafted   the first answer is drafted, so the draft has seen all of it
  plain     the first answer is decoded plainly (request mode off)
  flushed   the same, and the cache is flushed between the turns, so that the second prompt is
            prefilled anew, for the draft too

Compared are tokens per pass of the second answer, with EAGLE's tree 5-4-8 in every step, so that
nothing but what the draft has seen differs. The tiny pair in float32.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arms import parse_arm
from benchmarks.harness.pairs import OUT, Pair, tiny_pair
from benchmarks.harness.provenance import provenance
from benchmarks.harness.servers import Server, exit_on_sigterm, serving
from benchmarks.harness.talks import Reply, said_in_turns, take_turn
from benchmarks.harness.turns import ratio_of_sums

TREE = "+--speculative-num-steps=5+--speculative-eagle-topk=4+--speculative-num-draft-tokens=8"
# Request mode of the first turn, and whether the cache is flushed before the second.
CONDITIONS: Mapping[str, tuple[str | None, bool]] = {
    "drafted": (None, False),
    "plain": ("off", False),
    "flushed": ("off", True),
}
PERCENT = 80  # of the range of a ratio


def second_replies(
    server: Server,
    said: Sequence[Sequence[list[int]]],
    num_tokens: Sequence[int],
    condition: str,
    at_once: int,
) -> list[Reply]:
    """Hold all conversations under a condition and return what came in the second turn.

    Args:
        num_tokens: of the first answer and of the second.
    """
    mode, flushes = CONDITIONS[condition]
    server.flush_cache()
    first = [parts[0] for parts in said]
    replies = take_turn(server.url, first, num_tokens[0], at_once, mode)
    if flushes:
        server.flush_cache()
    second = [
        prompt + reply.tokens + parts[1]
        for prompt, reply, parts in zip(first, replies, said, strict=True)
    ]
    return take_turn(server.url, second, num_tokens[1], at_once)


def ratio(ours: Sequence[Reply], theirs: Sequence[Reply]) -> tuple[float, float, float]:
    """Return tokens per pass of one over the other's, and the range of it that holds 80 %."""
    counts = [[[len(r.tokens), r.passes] for r in replies] for replies in (ours, theirs)]
    return ratio_of_sums(*counts, percent=PERCENT)


def accept_length(replies: Sequence[Reply]) -> float:
    """Return tokens per pass of the target."""
    return sum(len(reply.tokens) for reply in replies) / sum(reply.passes for reply in replies)


def measure(server: Server, pair: Pair, first: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was found with first answers of this many tokens.

    Raises:
        AssertionError: answers depend on the condition.
    """
    said = said_in_turns(pair, args.conversations, [args.said, args.said])
    found = {
        condition: second_replies(server, said, (first, args.tokens), condition, args.at_once)
        for condition in CONDITIONS
    }
    answers = {name: [reply.tokens for reply in replies] for name, replies in found.items()}
    assert answers["plain"] == answers["drafted"] == answers["flushed"], "answers differ"
    return {
        "first_answer": first,
        "accept_length": {name: round(accept_length(each), 4) for name, each in found.items()},
        "plain_to_drafted": [round(x, 4) for x in ratio(found["plain"], found["drafted"])],
        "flushed_to_drafted": [round(x, 4) for x in ratio(found["flushed"], found["drafted"])],
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_after_plain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--first", type=int, nargs="+", default=[32, 128], help="tokens of first answers"
    )
    for flag, default, about in (
        ("--conversations", 48, "that are held"),
        ("--said", 32, "tokens that the user says in a turn"),
        ("--tokens", 64, "of the second answer"),
        ("--at-once", 8, "requests that come together"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{about} (default: {default})")
    parser.add_argument(
        "--out", type=Path, default=OUT / "after-plain.json", help="gets the figures"
    )
    args = parser.parse_args(argv)
    if min(*args.first, args.conversations, args.said, args.tokens, args.at_once) <= 0:
        parser.error("all counts must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the figures."""
    exit_on_sigterm()
    args = parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pair = tiny_pair()
    arm = parse_arm(f"cast:eagle+profile=none{TREE}", pair.draft)
    with serving([arm], pair.target, args.out.parent, ["--dtype", "float32"]) as servers:
        rows = [measure(servers[arm.name], pair, first, args) for first in args.first]
    facts = {name: value for name, value in vars(args).items() if name != "out"}
    where = provenance("benchmarks.studies.bench_after_plain", argv, pair, "", facts)
    args.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
