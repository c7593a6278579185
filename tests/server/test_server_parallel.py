"""Two ranks decide alike: they grow the same trees, never wait for each other, and lose nothing."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from benchmarks.harness.counters import cast_state
from benchmarks.harness.servers import Server
from cast_sglang.trace.file import read_trace
from tests.server.client import GREEDY, REQUEST_SECONDS, generate, greedy_ids, loads
from tests.server.conftest import NUM_TOKENS, ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_STEPS = 200
MAX_BATCH = 6
TEMPERATURES = (0.0, 0.0, 0.5, 1.0)
# Far more than a request gets before it is aborted.
ABORTED_TOKENS = 2000


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces") / "tp2.trace"


@pytest.fixture(scope="module")
def tp2(start_server: ServerFactory, trace: Path) -> Iterator[Server]:
    # The default policy: it learns from what each rank sees, and the ranks must agree on trees.
    # Only rank 0 writes the trace.
    flags = ("--tp-size", "2", "--cast-trace", str(trace))
    with start_server("cast", *flags, name="cast-tp2") as server:
        yield server


class Ask(NamedTuple):
    """A request of the varied load."""

    prompt: int
    temperature: float
    num_tokens: int
    abort_after: float | None  # seconds


def test_tensor_parallel_tokens_equal(tp2, prompts, expected_ids):
    assert greedy_ids(tp2, prompts[:4], 1, NUM_TOKENS) == expected_ids[:4]
    assert greedy_ids(tp2, prompts[:8], 8, NUM_TOKENS) == expected_ids[:8]


def test_ranks_stay_together_under_varied_load(tp2, trace, prompts, expected_ids):
    """A rank that chose another tree, or read another decision, would hang or part from plain."""
    rng = random.Random(0)
    first_step, num_waves, num_aborted, batches = cast_state(tp2)["steps"], 0, 0, set()
    while cast_state(tp2)["steps"] < first_step + NUM_STEPS or num_waves < 2 * MAX_BATCH:
        size = num_waves % MAX_BATCH + 1
        asks = [draw(rng, len(prompts)) for _ in range(size)]
        if num_waves % 3 == 2:
            asks[0] = asks[0]._replace(num_tokens=ABORTED_TOKENS, abort_after=rng.uniform(0.2, 0.6))
        with ThreadPoolExecutor(size) as pool:
            answers = list(
                pool.map(lambda pair: answer(tp2, prompts, *pair), enumerate(asks), timeout=300)
            )
        for ask, found in zip(asks, answers, strict=True):
            got, reason = found["output_ids"], found["meta_info"]["finish_reason"]["type"]
            if ask.abort_after is not None:
                assert reason == "abort" and len(got) < ABORTED_TOKENS
                num_aborted += 1
            else:
                assert reason == "length" and len(got) == ask.num_tokens
            if ask.temperature == 0:
                assert got[:NUM_TOKENS] == expected_ids[ask.prompt][: len(got)]
        batches.add(size)
        num_waves += 1
    assert batches == set(range(1, MAX_BATCH + 1)) and num_aborted >= 4
    tp2.flush_cache()
    assert loads(tp2)["num_used_tokens"] == 0
    num_steps = cast_state(tp2)["steps"]  # which also writes the last ones
    assert len(read_trace(trace).steps) == num_steps


def draw(rng: random.Random, num_prompts: int) -> Ask:
    """Draw a request; one length in two ends it while others go on."""
    num_tokens = NUM_TOKENS if rng.random() < 0.5 else rng.randint(2, NUM_TOKENS)
    return Ask(rng.randrange(num_prompts), rng.choice(TEMPERATURES), num_tokens, None)


def answer(server: Server, prompts: list[str], number: int, ask: Ask) -> Any:
    """Send a request, abort it if it is to be, and return the answer."""
    sampling = {"temperature": ask.temperature, "max_new_tokens": ask.num_tokens}
    if ask.abort_after is None:
        return generate(server, prompts[ask.prompt], **sampling)
    rid = f"aborted-{number}-{time.monotonic_ns()}"
    body = {
        "rid": rid,
        "text": prompts[ask.prompt],
        "sampling_params": {**GREEDY, **sampling},
    }
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(httpx.post, f"{server.url}/generate", json=body, timeout=REQUEST_SECONDS)
        time.sleep(ask.abort_after)
        httpx.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=30).raise_for_status()
        return sent.result().json()
