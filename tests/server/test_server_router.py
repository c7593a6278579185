"""Two CAST servers that share a profile and the file of what they learn, behind SGLang's router."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import httpx
import pytest

from benchmarks.harness.servers import Process, Server
from tests.server.client import generate, in_parallel
from tests.server.conftest import NUM_TOKENS, ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.extended, pytest.mark.timeout(1800)]

NUM_ASKED = 32


class Router(Server):
    """SGLang's router, which sends each request to the next of some servers."""

    ready_path = "/readiness"

    def __init__(self, servers: Sequence[Server], log_dir: Path) -> None:
        urls = [server.url for server in servers]
        super().__init__("router", ["--policy", "round_robin", "--worker-urls", *urls], log_dir)

    def _start_process(self, command: Sequence[str], log: IO[bytes]) -> Process:
        flags = command[command.index("--policy") :]
        return super()._start_process(
            [sys.executable, "-m", "sglang_router.launch_router", *flags], log
        )


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "learned.json"


@pytest.fixture(scope="module")
def servers(start_server: ServerFactory, learned: Path) -> Iterator[list[Server]]:
    def start(name: str) -> Server:
        return start_server(
            "cast", "--cast-residuals", "off", name=name, CAST_CALIBRATION_FILE=str(learned)
        )

    with start("cast-left") as left, start("cast-right") as right:
        yield [left, right]


def steps_of(servers: Sequence[Server]) -> list[int]:
    return [s.get("/server_info")["internal_states"][0]["cast"]["steps"] for s in servers]


def test_two_servers_keep_one_file_of_what_they_learn(
    servers, start_server, learned, prompts, expected_ids
):
    def ask(index: int) -> list[int]:
        return generate(servers[index % 2], prompts[index], max_new_tokens=NUM_TOKENS)["output_ids"]

    assert in_parallel(ask, range(NUM_ASKED), workers=4) == expected_ids[:NUM_ASKED]
    assert min(steps_of(servers)) > 64  # each has written what it learned
    assert json.loads(learned.read_bytes())["acceptance"]
    assert list(learned.parent.iterdir()) == [learned]
    with start_server("cast", name="cast-third", CAST_CALIBRATION_FILE=str(learned)) as third:
        assert (
            generate(third, prompts[0], max_new_tokens=NUM_TOKENS)["output_ids"]
            == (expected_ids[0])
        )


def test_the_router_sends_requests_to_both(servers, prompts, expected_ids, tmp_path):
    before = steps_of(servers)
    with Router(servers, tmp_path) as router:

        def ask(index: int) -> list[int]:
            return generate(router, prompts[index], max_new_tokens=NUM_TOKENS)["output_ids"]

        assert in_parallel(ask, range(NUM_ASKED), workers=4) == expected_ids[:NUM_ASKED]
        asked = {"model": "default", "prompt": prompts[0], "max_tokens": 8, "temperature": 0.0}
        answer = httpx.post(f"{router.url}/v1/completions", json=asked, timeout=60.0)
        assert answer.json()["usage"]["completion_tokens"] == 8
    after = steps_of(servers)
    assert all(now > then + 32 for now, then in zip(after, before, strict=True))
