"""Soak and chaos: mixed requests under an open load with bursts, while everything goes wrong.

    python -m benchmarks.studies.soak --requests 1000 --out DIR
    python -m benchmarks.studies.soak --requests 10000 --wave 100 --prompts 132 --rate 16

Serves the tiny pair in float32 on CAST, with a cache so small that requests are retracted. Each
wave of requests meets one fault: clients that vanish, aborts, pauses, flushes of the cache, the
same and other weights, SIGTERM under load, kill -9 with calibration and profile left half written.
Behind the first third of the run the server is not ended. Plain decoding has answered all greedy
requests before. It is checked

  - that every request ends with an answer or an error that its fault explains (else it is lost),
  - that greedy answers are plain decoding's, token for token (else altered),
  - that after each wave every token of the cache is free or may be evicted (else it is leaked),
  - that memory, file handles and threads of the server do not grow,
  - that the same prompts are drafted for as well in the last third of the run as in the first.

DIR gets soak.log, soak.json and the logs of the servers. The exit code is 0 if all holds, 1 if not,
2 for a bad command line.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer

from benchmarks.harness.arms import parse_arm
from benchmarks.harness.faults import (
    ENDS,
    FAULTS,
    Holding,
    Subject,
    changed_target,
    held_by,
    largest_growth,
    schedule,
    update_weights,
)
from benchmarks.harness.mixed_load import KINDS, Ask, Outcome, expect, judge, make_asks, send
from benchmarks.harness.pairs import OUT, Pair, heldout_prompts, tiny_pair
from benchmarks.harness.provenance import provenance
from benchmarks.harness.servers import (
    Server,
    ServerError,
    exit_on_sigterm,
    own_cache,
    platform_environment,
)
from cast_sglang.config import user_cache_dir
from tests.support.profiles import write_profile

CONTEXT, POOL, RUNNING = 512, 1536, 12
# Share of a wave's requests whose own client vanishes, or that are aborted, in such a wave.
HIT_SHARE = 0.4
# The longest request takes some seconds, and after a pause or new weights the server catches up.
SETTLE_SECONDS = 60.0
# Greedy requests whose answers may have any length.
ACCEPT_KINDS = ("short", "long", "logprobs", "prefix", "turn")
BURST_SHARE, BURST = 0.15, 8
# Of these as many are asked after each wave, alone, which takes a second.
ACCEPT_ASKS = 8
# Trees follow the machine's speed, so accept lengths of equal prompts vary: in one run on a machine
# that others loaded from 2.8 to 3.7 from wave to wave, and the medians of its thirds by 0.88. What
# ratchets ends near 1.
LEAST_ACCEPT = 0.8
# What a server may hold beyond what it held after its first waves. Of its fifty threads some are in
# pools of Python's, which fill up to six in each of three processes as work comes.
MAX_GROWTH = {"memory_mb": 0.05, "handles": 0.05, "threads": 0.2}

logger = logging.getLogger("soak")


class Soak:
    """One run.

    Args:
        args: the command line's.
        kind: class of the servers.
    """

    def __init__(self, args: argparse.Namespace, kind: type[Server] = Server) -> None:
        self._args, self._kind = args, kind
        self._pair: Pair = tiny_pair()
        self._rng = random.Random(args.seed)
        self._subject: Subject | None = None
        self._burst = 0  # requests that are still to come at once
        self._at_once = asyncio.Semaphore(args.at_once)
        self._asks: list[Ask] = []
        self._expected: dict[str, list[Outcome]] = {}
        self.ends: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.holdings: list[Holding] = []
        self.accept: list[float] = []  # of the same prompts, after each wave
        self.retracted = 0

    def run(self) -> None:
        """Run all waves; results are in the attributes."""
        self._args.out.mkdir(parents=True, exist_ok=True)
        other = changed_target(Path(self._pair.target), self._args.out / "other-target")
        targets = {"own": self._pair.target, "other": str(other)}
        profiles = self._args.out / "profiles"
        write_profile(profiles / "made-up.json")
        with own_cache(profiles) as cache:
            self._env = {
                **platform_environment(),
                **cache,
                "CAST_ALLOW_FOREIGN_PROFILE": "1",
                # A slot of the cache that is lost ends the server.
                "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            }
            self._ask_plain(targets["other"])
            kept = Path(cache["XDG_CACHE_HOME"]) / user_cache_dir().name
            self._subject = Subject(lambda name: self._make("cast", name), targets, kept)
            try:
                self.subject.start()
                asyncio.run(self._waves())
            finally:
                self.subject.stop()

    @property
    def subject(self) -> Subject:
        assert self._subject is not None
        return self._subject

    def _make(self, arm: str, name: str) -> Server:
        flags = [*("--model-path", self._pair.target, *parse_arm(arm, self._pair.draft).flags)]
        flags += ["--dtype", "float32", "--context-length", str(CONTEXT)]
        flags += ["--max-total-tokens", str(POOL), "--max-running-requests", str(RUNNING)]
        flags += ["--chunked-prefill-size", "128", "--enable-metrics"]
        return self._kind(name, flags, self._args.out, self._env)

    def _ask_plain(self, other: str) -> None:
        """Collect plain decoding's answers, by its own weights and the other ones."""
        tokenizer = Tokenizer.from_file(str(Path(self._pair.target) / "tokenizer.json"))
        text = tokenizer.encode("\n".join(heldout_prompts())).ids
        drawn = make_asks(text, CONTEXT, POOL, self._args.prompts, self._args.seed)
        with self._make("plain", "plain") as plain:
            self._asks, self._expected["own"] = asyncio.run(expect(plain.url, drawn))
            update_weights(plain, other)
            _, self._expected["other"] = asyncio.run(expect(plain.url, self._asks))
        pairs = zip(self._expected["own"], self._expected["other"], strict=True)
        differ = sum(own != other for own, other in pairs)
        logger.info(
            "plain decoding answered %d prompts, %d change with the weights", len(drawn), differ
        )

    async def _waves(self) -> None:
        sizes = wave_sizes(self._args.requests, self._args.wave)
        sent, began = 0, time.monotonic()
        faults = schedule(len(sizes))
        for number, (size, fault) in enumerate(zip(sizes, faults, strict=True)):
            await self._wave(number, size, fault)
            sent += size
            await self._settle(number)
            self.retracted += self.subject.newly_retracted()
            self.accept.append(await self._accept_length())
            self.holdings.append(held_by(self.subject.server, self.subject.life))
            seconds = time.monotonic() - began
            logger.info(
                "wave %d of %d, fault %r: %d of %d requests, %d wrong, accept length %.2f, %.0f s, "
                "%.0f to go; %s",
                *(number + 1, len(sizes), fault, sent, self._args.requests, len(self.wrong)),
                *(self.accept[-1], seconds, seconds * (self._args.requests / sent - 1)),
                dict(self.ends),
            )

    async def _wave(self, number: int, size: int, fault: str) -> None:
        """Send requests at random moments, and let the fault happen in their middle."""
        if fault == "other weights":
            await asyncio.to_thread(self.subject.load, "other")
        indexes = [self._rng.randrange(len(self._asks)) for _ in range(size)]
        hit = [fault in ("vanish", "abort") and self._rng.random() < HIT_SHARE for _ in indexes]
        streams = [self._rng.random() < 0.5 for _ in indexes]
        weights, allowed = self.subject.weights, FAULTS[fault]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.subject.server.url, limits=limits) as client:
            client.timeout = httpx.Timeout(None)
            tasks: list[asyncio.Task[Outcome]] = []
            faults: list[asyncio.Task[None]] = []
            for place, index in enumerate(indexes):
                if place == size // 2:
                    faults.append(asyncio.create_task(self.subject.suffer(fault, client)))
                # SGLang aborts every request whose id begins with that of an abort.
                rid = f"soak-{number:06}-{place:06}"
                ask, vanishes = self._asks[index], hit[place] and fault == "vanish"
                tasks.append(
                    asyncio.create_task(self._send(client, ask, rid, streams[place], vanishes))
                )
                if hit[place] and fault == "abort":
                    faults.append(asyncio.create_task(self._abort(client, rid)))
                await self._arrive()
            outcomes = await asyncio.gather(*tasks)
            await asyncio.gather(*faults)
        self.faults[fault] += sum(hit) if fault in ("vanish", "abort") else 1
        for place, (index, outcome) in enumerate(zip(indexes, outcomes, strict=True)):
            explained = allowed | ({"vanished", "aborted"} if hit[place] else set())
            self._judge(index, outcome, weights, explained, f"wave {number} ({fault}), {place}")
        if fault == "other weights":
            await asyncio.to_thread(self.subject.load, "own")
        elif fault in ENDS:
            problem = await asyncio.to_thread(self.subject.restart, fault)
            if problem is not None:
                self.note(problem)
            logger.info("life %d begins", self.subject.life)

    async def _arrive(self) -> None:
        """Wait as long as the next request takes to come; some come at once."""
        if self._rng.random() < BURST_SHARE:
            self._burst = BURST
        if self._burst > 0:
            self._burst -= 1
            return
        await asyncio.sleep(self._rng.expovariate(self._args.rate))

    async def _send(
        self, client: httpx.AsyncClient, ask: Ask, rid: str, streams: bool, vanishes: bool
    ) -> Outcome:
        async with self._at_once:
            return await send(client, ask, rid, streams=streams, vanishes=vanishes)

    async def _abort(self, client: httpx.AsyncClient, rid: str) -> None:
        await asyncio.sleep(self._rng.uniform(0.05, 1.0))
        await client.post("/abort_request", json={"rid": rid}, timeout=30)

    def _judge(
        self, index: int, outcome: Outcome, weights: str, allowed: set[str], where: str
    ) -> None:
        ask = self._asks[index]
        self.kinds[ask.kind] += 1
        self.ends[outcome.end] += 1
        problem = judge(ask, outcome, self._expected[weights][index], allowed)
        if problem is not None:
            self.note(f"{problem} [{ask.kind}, prompt {index}, {where}]")

    def note(self, problem: str) -> None:
        """Keep and log what is wrong; up to its colon it names the check that fails."""
        self.wrong.append(problem)
        logger.error("%s", problem)

    async def _settle(self, number: int) -> None:
        """Wait until nothing runs; then no token may be held, but by prefixes that can be evicted.

        Before a flush, which would free what was lost as well.
        """
        self.subject.server.check()
        deadline = time.monotonic() + SETTLE_SECONDS
        held = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        while True:
            load = self.subject.server.get("/v1/loads")["loads"][0]
            if not any(load[name] for name in held):
                return
            if time.monotonic() > deadline:
                self.note(f"leaked: wave {number} leaves {load}")
                return
            await asyncio.sleep(0.1)

    async def _accept_length(self) -> float:
        """Return tokens per pass of the same prompts, asked one after the other."""
        self.subject.server.flush_cache()  # so that all are drafted for from their first token
        tokens = passes = 0
        async with httpx.AsyncClient(base_url=self.subject.server.url, timeout=120) as client:
            for ask in [ask for ask in self._asks if ask.kind in ACCEPT_KINDS][:ACCEPT_ASKS]:
                sampling = {**ask.sampling, "max_new_tokens": 32}
                body = ask._replace(sampling=sampling).body(f"accept-{time.monotonic_ns()}", False)
                info = (await client.post("/generate", json=body)).json()["meta_info"]
                tokens, passes = tokens + info["completion_tokens"], passes + info["spec_verify_ct"]
        return float(tokens / passes)

    def counts(self) -> dict[str, int]:
        """Return how often each thing went wrong."""
        found = Counter(problem.partition(":")[0] for problem in self.wrong)
        names = ("lost", "altered", "leaked", "unending", "unfinished")
        return {name: found[name] for name in names}

    def checks(self) -> dict[str, bool]:
        """Return what was checked, and whether it holds."""
        growth = largest_growth(self.holdings)
        return {
            **{name: count == 0 for name, count in self.counts().items()},
            "accept": keeps_up(self.accept),
            **{name: growth[name] <= most for name, most in MAX_GROWTH.items()},
        }


def keeps_up(accept: Sequence[float]) -> bool:
    """Return whether accept lengths are in their last third about what they are in the first."""
    third = len(accept) // 3
    if not third:
        return False
    first, last = statistics.median(accept[:third]), statistics.median(accept[-third:])
    return last >= LEAST_ACCEPT * first


def wave_sizes(requests: int, wave: int) -> list[int]:
    """Return the sizes of waves of at most `wave` requests, as even as can be."""
    count = -(-requests // wave)
    return [requests // count + (number < requests % count) for number in range(count)]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(flag: str, kind: type, default: Any, about: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=f"{about} (default: {default})")

    option("--requests", int, 1000, "how many are sent")
    option("--wave", int, 25, "requests between two checks; each wave meets the next fault")
    option("--prompts", int, 6 * len(KINDS), "different requests that are drawn from")
    option("--rate", float, 8.0, "requests that come in a second, bursts apart")
    option("--at-once", int, 32, "requests that are open at most")
    option("--seed", int, 0, "of requests, moments and faults")
    option("--out", Path, OUT / "soak", "gets log, results and logs of servers")
    args = parser.parse_args(argv)
    for name in ("requests", "wave", "prompts", "rate", "at_once"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return args


def main(argv: Sequence[str] | None = None, kind: type[Server] = Server) -> int:
    """Run the soak; return the exit code."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(args.out / "soak.log", "w")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    soak, began = Soak(args, kind), time.monotonic()
    try:
        soak.run()
    except (ServerError, httpx.HTTPError) as error:
        soak.note(f"lost: the server is gone: {type(error).__name__}: {error}")
    except (KeyboardInterrupt, SystemExit):
        soak.note("unfinished: this program was told to end")
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):
                handler.close()
    return report(soak, args, argv, time.monotonic() - began)


def report(soak: Soak, args: argparse.Namespace, argv: Sequence[str] | None, seconds: float) -> int:
    """Write soak.json, print what was found, and return the exit code."""
    checks = soak.checks()
    note = f"float32, context {CONTEXT}, a cache of {POOL} tokens, {RUNNING} requests at once"
    content = {
        "provenance": provenance("benchmarks.studies.soak", argv, tiny_pair(), note, {}),
        "ok": all(checks.values()),
        "checks": checks,
        **soak.counts(),
        "seconds": round(seconds, 1),
        "requests": sum(soak.ends.values()),
        "by_kind": dict(soak.kinds),
        "by_end": dict(soak.ends),
        "faults": dict(soak.faults),
        "retracted": soak.retracted,
        "accept_lengths": [round(length, 3) for length in soak.accept],
        "growth": largest_growth(soak.holdings),
        "holdings": [holding._asdict() for holding in soak.holdings],
        "wrong": soak.wrong,
    }
    (args.out / "soak.json").write_text(json.dumps(content, indent=1) + "\n")
    shown = ("seconds", "requests", "by_end", "faults", "retracted", "accept_lengths", "growth")
    shown = (*shown, "checks", *soak.counts())
    print("\n".join(f"{name}: {content[name]}" for name in shown))
    print("all holds" if content["ok"] else f"NOT all holds; {args.out / 'soak.log'} has it")
    return 0 if content["ok"] else 1


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
