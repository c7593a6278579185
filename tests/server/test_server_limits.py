"""Requests at the limits of context and memory: the server lives, answers are plain decoding's.

TEST_LIMITS_ROUNDS=20 sends twenty times as many random requests, TEST_LIMITS=256:4096,1024:16384
at other context lengths and pool sizes.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
from tokenizers import Tokenizer

from benchmarks.harness.pairs import heldout_prompts, tiny_directory
from benchmarks.harness.servers import Server
from tests.server.client import GREEDY, REQUEST_SECONDS, in_parallel, loads
from tests.server.conftest import ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

ROUNDS = int(os.environ.get("TEST_LIMITS_ROUNDS", "1"))
# Context length and pool size in tokens; a pool hardly larger than one request retracts and, with a
# request that runs alone, has no room for drafts.
LIMITS = [
    tuple(map(int, pair.split(":")))
    for pair in os.environ.get("TEST_LIMITS", "512:16384,512:640").split(",")
]


class Ask(NamedTuple):
    """A request of some length to come and some to be generated; None to run to the limit."""

    prompt: list[int]
    max_new_tokens: int | None
    abort_after: float | None = None  # seconds


class Served(NamedTuple):
    """Plain decoding and CAST under the same limits."""

    plain: Server
    cast: Server
    context: int
    pool: int


def token_ids() -> list[int]:
    """Return the tokens of the held-out texts, one after the other."""
    tokenizer = Tokenizer.from_file(str(tiny_directory() / "target" / "tokenizer.json"))
    return list(tokenizer.encode("\n".join(heldout_prompts())).ids)


@pytest.fixture(scope="module")
def text() -> list[int]:
    return token_ids()


@pytest.fixture(
    scope="module", params=LIMITS, ids=lambda limits: "context-{}-pool-{}".format(*limits)
)
def served(request: pytest.FixtureRequest, start_server: ServerFactory) -> Iterator[Served]:
    context, pool = request.param
    flags = ("--context-length", str(context), "--max-total-tokens", str(pool))
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(start_server("plain", *flags, name=f"plain-{context}-{pool}"))
        cast = stack.enter_context(start_server("cast", *flags, name=f"cast-{context}-{pool}"))
        yield Served(plain, cast, context, pool)


def ask(server: Server, wanted: Ask) -> dict[str, Any]:
    rid = f"{id(wanted)}-{time.monotonic_ns()}"
    sampling = dict(GREEDY)
    if wanted.max_new_tokens is not None:
        sampling["max_new_tokens"] = wanted.max_new_tokens
    body = {"rid": rid, "input_ids": wanted.prompt, "sampling_params": sampling}
    with ThreadPoolExecutor(1) as pool:
        url = f"{server.url}/generate"
        sent = pool.submit(httpx.post, url, json=body, timeout=REQUEST_SECONDS)
        if wanted.abort_after is not None:
            time.sleep(wanted.abort_after)
            abort = {"rid": rid}
            httpx.post(f"{server.url}/abort_request", json=abort, timeout=30).raise_for_status()
        response = sent.result()
    answer: dict[str, Any] = response.json()
    return answer if response.is_success else {"error": response.status_code}


def essence(answer: dict[str, Any]) -> tuple[Any, ...]:
    """Return what must be equal: tokens and the reason to stop, or the refusal."""
    if "error" in answer:
        return (answer["error"],)
    return answer["output_ids"], answer["meta_info"]["finish_reason"]["type"]


def compare(served: Served, asks: list[Ask], workers: int) -> None:
    """Send the requests to both servers and compare; the aborted ones as far as they came."""
    expected = in_parallel(
        lambda wanted: ask(served.plain, wanted._replace(abort_after=None)), asks, 4
    )
    answers = in_parallel(lambda wanted: ask(served.cast, wanted), asks, workers)
    for wanted, answer, plain in zip(asks, answers, expected, strict=True):
        case = f"prompt {len(wanted.prompt)}, max_new_tokens {wanted.max_new_tokens}"
        if wanted.abort_after is None:
            assert essence(answer) == essence(plain), case
        elif "error" not in answer:
            # SGLang does not cut off what the last step brought past the request's length.
            tokens, expected_ids = answer["output_ids"], plain.get("output_ids", [])
            assert tokens[: len(expected_ids)] == expected_ids[: len(tokens)], case
    served.cast.check()
    served.cast.flush_cache()
    assert loads(served.cast)["num_used_tokens"] == 0


def test_one_request_that_runs_to_the_limit(served, text):
    for prompt in (439, served.context - 7, served.context - 8, served.context // 2):
        compare(served, [Ask(text[:prompt], None)], workers=1)


def test_one_request_of_a_length_that_just_fits(served, text):
    compare(served, [Ask(text[:300], served.context - 300)], workers=1)
    compare(served, [Ask(text[:300], served.context - 301)], workers=1)
    compare(served, [Ask(text[:300], 140)], workers=1)


def test_plain_decodings_limits_of_length_are_casts(served, text):
    """The longest prompts and lengths that are served, and the first ones that are refused."""
    asks = [Ask(text[:length], 4) for length in range(served.context - 9, served.context + 2)]
    asks += [Ask(text[:100], served.context - 100 + more) for more in (-1, 0, 1)]
    compare(served, asks, workers=1)


def test_long_requests_beside_short_ones(served, text):
    asks = [Ask(text[300 * i : 300 * i + length], None) for i, length in enumerate((303, 440, 390))]
    asks += [Ask(text[900:960], 48), Ask(text[960:1000], 64), Ask(text[50:400], 30)]
    compare(served, asks, workers=len(asks))


@pytest.mark.parametrize("seed", range(2 * ROUNDS))
def test_random_requests(served, text, seed):
    rng = random.Random(seed)
    asks = []
    for _ in range(12):
        near = rng.random() < 0.6
        limit = served.context - 6
        length = rng.randint(limit - 70, limit) if near else rng.randint(1, limit)
        room = served.context - length
        choices = [None, rng.randint(1, max(1, room)), max(1, room - rng.randint(0, 12))]
        start = rng.randrange(len(text) - length)
        abort_after = rng.uniform(0.05, 1.5) if rng.random() < 0.2 else None
        asks.append(Ask(text[start : start + length], rng.choice(choices), abort_after))
    compare(served, asks, workers=rng.choice((1, 2, 5, 16)))
