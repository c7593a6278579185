"""The attention of a GPU, run by Triton's interpreter: SGLang's kernels and CAST's tree metadata.

Streams, overlap and graphs of the device need one. What runs here is what surrounds them: verify of
trees and chains over custom masks, draft layers over lists of slots, draft extend, plain steps, and
draft layers over the static buffers of graphs, replayed by a stand-in.
"""

from pathlib import Path

import pytest

from benchmarks.harness.servers import Server
from tests.server.client import generate, loads
from tests.server.conftest import ServerFactory
from tests.server.test_server_limits import Ask, ask, token_ids
from tests.support.interpreted import ENVIRONMENT, REPLAYS_FILE, CapturedLayersServer

# An interpreted step takes seconds.
pytestmark = [pytest.mark.server, pytest.mark.extended, pytest.mark.timeout(1800)]

NUM_TOKENS, CONTEXT = 6, 40
FLAGS = (
    *("--attention-backend", "triton", "--max-running-requests", "4", "--skip-server-warmup"),
    *("--cast-residuals", "off"),
)
TREE = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "2")
CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")


@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
def test_greedy_tokens_equal_plain_decoding(
    start_server: ServerFactory, plain: Server, prompts: list[str], shape: tuple[str, ...]
):
    short = [prompt[:40] for prompt in prompts[:2]]
    wanted = [generate(plain, text, max_new_tokens=NUM_TOKENS)["output_ids"] for text in short]
    with start_server(
        "cast", *FLAGS, *shape, name=f"interpreted-{shape[-1]}", kind=Server, **ENVIRONMENT
    ) as server:
        answers = generate(server, short, max_new_tokens=NUM_TOKENS)
        assert [answer["output_ids"] for answer in answers] == wanted
        # One that wants no drafts is decoded plainly, by verify of its root.
        alone = generate(server, short[0], max_new_tokens=NUM_TOKENS, custom_params={"cast": "off"})
        assert alone["output_ids"] == wanted[0]
        state = server.get("/server_info")["internal_states"][0]["cast"]
        assert state["steps"] > NUM_TOKENS and state["nodes_verified"] > state["requests"]


@pytest.mark.parametrize("shape", [TREE, CHAIN], ids=["tree", "chain"])
def test_captured_layers_serve_what_eager_ones_do(
    start_server: ServerFactory,
    plain: Server,
    prompts: list[str],
    shape: tuple[str, ...],
    tmp_path: Path,
):
    """One request, then three, whose graph is one of four: padding reads and writes slot 0.

    Then one is aborted while it runs, and one runs to the limit of the context.
    """
    short, replays = [prompt[:40] for prompt in prompts[:3]], tmp_path / "replays"
    wanted = [generate(plain, text, max_new_tokens=NUM_TOKENS)["output_ids"] for text in short]
    environment = {**ENVIRONMENT, REPLAYS_FILE: str(replays)}
    with start_server(
        *("cast", *FLAGS, *shape, "--context-length", str(CONTEXT)),
        name=f"captured-{shape[-1]}",
        kind=CapturedLayersServer,
        **environment,
    ) as server:
        alone = generate(server, short[0], max_new_tokens=NUM_TOKENS)
        assert alone["output_ids"] == wanted[0]
        answers = generate(server, short, max_new_tokens=NUM_TOKENS)
        assert [answer["output_ids"] for answer in answers] == wanted

        ids = token_ids()[: CONTEXT // 2]
        longest = generate(plain, ids, max_new_tokens=CONTEXT // 2)["output_ids"]
        aborted = ask(server, Ask(ids, None, abort_after=2.0)).get("output_ids", [])
        assert aborted == longest[: len(aborted)]
        to_the_limit = ask(server, Ask(ids, None))["output_ids"]
        assert to_the_limit == longest[: len(to_the_limit)]
        assert len(ids) + len(to_the_limit) >= CONTEXT - 2
        server.flush_cache()
        assert loads(server)["num_used_tokens"] == 0
    batches = {line.split()[0] for line in replays.read_text().splitlines()}
    assert batches == {"1", "4"}
