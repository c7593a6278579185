"""The path of a GPU without one: Triton's interpreter, recorded graphs, overlap scheduling.

`tests/support/interpreted.py` says what is put in place of a device; everything else is what a GPU
runs. `docs/gpu.md` lists what only a device can show.
"""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.harness.servers import Server
from tests.server.client import check_answers, generate, loads
from tests.server.conftest import ServerFactory
from tests.server.test_server_limits import Ask, ask, token_ids
from tests.support.interpreted import BATCHES, DENSE, ENVIRONMENT, REPLAYS_FILE, CapturedServer
from tests.support.waits import WAITS_FILE

# An interpreted step takes seconds.
pytestmark = [pytest.mark.server, pytest.mark.extended, pytest.mark.timeout(1800)]

NUM_TOKENS, CONTEXT = 6, 40
FLAGS = (
    *("--max-running-requests", "4", "--skip-server-warmup"),
    *("--cast-residuals", "off", "--context-length", str(CONTEXT)),
)
TREE = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "2")
TREE += ("--speculative-num-draft-tokens", "6", "--cast-verify-sizes", "2,4,6")
CHAIN = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1")
# `flashinfer` plans by the lengths that the scheduler has on the host; these read them. The watch
# does not know the sums and copies of these lengths as the host's own.
OF_LENGTHS = {
    "catch_up.py:past_of",
    "requests.py:mean_context",
    "eagle_utils.py:eagle_prepare_for_verify",
    "eagle_worker_common.py:prepare_for_draft_extend",
    "flashinfer_backend.py:call_begin_forward",
    "flashinfer_backend.py:fast_prefill_plan",
}
RUNS = [
    *(
        (backend, shape)
        for backend in ("triton", "fa3", "flashinfer")
        for shape in ("tree", "chain")
    ),
    ("trtllm_mha", "chain"),
]


def test_kernel_by_kernel_greedy_tokens_equal_plain_decoding(
    start_server: ServerFactory, plain: Server, prompts: list[str]
):
    short = [prompt[:40] for prompt in prompts[:2]]
    wanted = [generate(plain, text, max_new_tokens=NUM_TOKENS)["output_ids"] for text in short]
    with start_server(
        *("cast", "--attention-backend", "triton", *FLAGS, *TREE),
        name="interpreted",
        kind=Server,
        **ENVIRONMENT,
    ) as server:
        answers = generate(server, short, max_new_tokens=NUM_TOKENS)
        assert [answer["output_ids"] for answer in answers] == wanted
        # One that wants no drafts is decoded plainly.
        alone = generate(server, short[0], max_new_tokens=NUM_TOKENS, custom_params={"cast": "off"})
        assert alone["output_ids"] == wanted[0]
        state = server.get("/server_info")["internal_states"][0]["cast"]
        assert state["steps"] > NUM_TOKENS and state["nodes_verified"] > state["requests"]


@pytest.mark.parametrize(("backend", "shape"), RUNS)
def test_captured_and_overlapped_greedy_tokens_equal_plain_decoding(
    start_server: ServerFactory,
    plain: Server,
    prompts: list[str],
    backend: str,
    shape: str,
    tmp_path: Path,
):
    """One request, then three, whose graphs are those of four: padding reads and writes slot 0.

    Then one that is decoded plainly, one that is aborted while it runs, and one that runs to the
    limit of the context.
    """
    short, replays = [prompt[:40] for prompt in prompts[:3]], tmp_path / "replays"
    wanted = [generate(plain, text, max_new_tokens=NUM_TOKENS)["output_ids"] for text in short]
    waits = tmp_path / "waits"
    environment = {**ENVIRONMENT, REPLAYS_FILE: str(replays), WAITS_FILE: str(waits)}
    flags = (*FLAGS, *(TREE if shape == "tree" else CHAIN))
    if backend != "triton":
        environment[DENSE] = "1"
    if backend == "trtllm_mha":
        flags += ("--page-size", "16")  # the smallest of its kernels
    with start_server(
        *("cast", "--attention-backend", backend, *flags),
        name=f"captured-{backend}-{shape}",
        kind=CapturedServer,
        **environment,
    ) as server:
        info = server.get("/server_info")
        assert not info["disable_overlap_schedule"]
        check_answers(server, short, wanted, NUM_TOKENS)

        ids = token_ids()[: CONTEXT // 2]
        longest = generate(plain, ids, max_new_tokens=CONTEXT // 2)["output_ids"]
        aborted = ask(server, Ask(ids, None, abort_after=2.0)).get("output_ids", [])
        assert aborted == longest[: len(aborted)]
        to_the_limit = ask(server, Ask(ids, None))["output_ids"]
        assert to_the_limit == longest[: len(to_the_limit)]
        assert len(ids) + len(to_the_limit) >= CONTEXT - 2
        server.flush_cache()
        assert loads(server)["num_used_tokens"] == 0
    ran = Counter(line.rpartition(",")[0] for line in replays.read_text().splitlines())
    runners = ("DecodeCudaGraphRunner", "EAGLEDraftExtendCudaGraphRunner", "LayerGraphs")
    # Every pass of every step was a replay, of both batch sizes.
    assert set(ran) == {f"{runner},{batch}" for runner in runners for batch in BATCHES}
    assert "DecodeCudaGraphRunner,1,1 rows" in replays.read_text()
    # Whatever the host waits for is read through `HostReads`.
    places = {line.rpartition("/")[2] for line in waits.read_text().splitlines()}
    assert places <= (OF_LENGTHS if backend == "flashinfer" else set())
