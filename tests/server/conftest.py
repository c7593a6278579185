"""Servers on the CPU platform, each started once and kept for as long as tests need it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.harness.arms import parse_arm
from benchmarks.harness.pairs import Pair, heldout_prompts, tiny_pair
from benchmarks.harness.servers import CPU_PLATFORM, Server
from tests.server.client import greedy_ids
from tests.support.preloaded import PreloadedServer
from tests.support.profiles import write_profile

NUM_PROMPTS = 50
NUM_TOKENS = 48
# Prompts of some hundred tokens are then prefilled in several chunks.
COMMON_FLAGS = ("--max-total-tokens", "16384", "--chunked-prefill-size", "128")
# What some requests need; the others are served as without.
REQUEST_FLAGS = (
    *("--enable-custom-logit-processor", "--constrained-json-disable-any-whitespace"),
    # This one reasons only where the request says so.
    *("--tool-call-parser", "qwen25", "--reasoning-parser", "deepseek-v3"),
)

HIDDEN_STATES = "--enable-return-hidden-states"  # needs a draft model

ServerFactory = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def pair() -> Pair:
    return tiny_pair()


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return heldout_prompts()[:NUM_PROMPTS]


@pytest.fixture(scope="session")
def made_up_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profiles") / "made-up.json")


@pytest.fixture(scope="session")
def start_server(
    pair: Pair, made_up_profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> ServerFactory:
    """Return a function that starts a server of one arm, to be used in a `with`."""
    log_dir = tmp_path_factory.mktemp("servers")

    def start(
        arm: str,
        *flags: str,
        name: str = "",
        profile: Path | str = made_up_profile,
        kind: type[Server] = PreloadedServer,
        **env: str,
    ) -> Server:
        chosen = parse_arm(arm, pair.draft, str(profile))
        dtype = () if "--dtype" in flags else ("--dtype", "float32")
        return kind(
            name or chosen.name,
            ["--model-path", pair.target, *chosen.flags, *COMMON_FLAGS, *dtype, *flags],
            log_dir,
            # Any leak of a KV slot then ends the server.
            {
                **CPU_PLATFORM,
                "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
                "CAST_ALLOW_FOREIGN_PROFILE": "1",
                # What one server learned must not reach another.
                "CAST_CALIBRATION_FILE": "none",
                **env,
            },
        )

    return start


@pytest.fixture(scope="session")
def plain(start_server: ServerFactory) -> Iterator[Server]:
    with start_server("plain", *REQUEST_FLAGS, HIDDEN_STATES) as server:
        yield server


@pytest.fixture(scope="session")
def cast(start_server: ServerFactory) -> Iterator[Server]:
    """A server that drafts on every machine: it goes by the made-up costs alone."""
    flags = ("--enable-metrics", "--random-seed", "1", "--cast-residuals", "off")
    with start_server("cast", *REQUEST_FLAGS, HIDDEN_STATES, *flags) as server:
        yield server


@pytest.fixture(scope="session")
def expected_ids(plain: Server, prompts: list[str]) -> list[list[int]]:
    """Plain decoding's greedy answers; `test_server_lossless.py` has some of them alone too."""
    return greedy_ids(plain, prompts, batch=8, num_tokens=NUM_TOKENS)
