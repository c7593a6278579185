"""Targets whose drafts are chains: latent attention (DeepSeek V3) and gated delta nets (Qwen3.5).

Tiny ones with random weights and an MTP layer, on the path of a GPU (`tests/support/interpreted`):
kernels in Triton's interpreter, recorded graphs, overlap scheduling.
"""

from collections import Counter
from pathlib import Path

import pytest

from tests.server.client import check_answers, generate
from tests.server.conftest import ServerFactory
from tests.server.test_server_chains import num_accepted
from tests.server.test_server_interpreted import CHAIN
from tests.support.interpreted import (
    BATCHES,
    DELTA_RULE,
    DENSE,
    ENVIRONMENT,
    REPLAYS_FILE,
    CapturedServer,
)
from tests.support.tiny_targets import write_latent_target, write_linear_target

# An interpreted step takes seconds.
pytestmark = [pytest.mark.server, pytest.mark.extended, pytest.mark.timeout(1800)]

TRITON = ("--attention-backend", "triton")
FA3 = ("--attention-backend", "fa3", "--decode-attention-backend", "fa3")
NUM_TOKENS = 8
FLAGS = (
    *("--max-running-requests", "4", "--skip-server-warmup", "--disable-radix-cache"),
    *("--context-length", "64"),
)


@pytest.mark.parametrize("backend", [TRITON, FA3], ids=["triton", "fa3"])
@pytest.mark.parametrize("write", [write_latent_target, write_linear_target])
def test_chains_of_captured_passes_equal_plain_decoding(
    start_server: ServerFactory, pair, prompts, tmp_path: Path, write, backend
):
    """One request, then three, whose graphs are those of four, then one that is decoded plainly."""
    target = str(write(tmp_path / "target", Path(pair.target)))
    replays, name = tmp_path / "replays", f"{write.__name__}-{backend[1]}"
    short = [prompt[:40] for prompt in prompts[:3]]
    flags = ("--model-path", target, *FLAGS)
    environment = {**ENVIRONMENT, DELTA_RULE: "1"}
    plain = start_server(
        *("plain", *flags, *TRITON), name=f"plain-{name}", kind=CapturedServer, **environment
    )
    with plain:
        wanted = [generate(plain, text, max_new_tokens=NUM_TOKENS)["output_ids"] for text in short]
    environment |= {REPLAYS_FILE: str(replays)} | ({DENSE: "1"} if backend == FA3 else {})
    cast = start_server(
        *("cast", *flags, *backend, *CHAIN, "--speculative-draft-model-path", target),
        *("--cast-residuals", "off"),
        name=f"cast-{name}",
        kind=CapturedServer,
        **environment,
    )
    with cast as server:
        check_answers(server, short, wanted, NUM_TOKENS)
        assert num_accepted(server) > 0
    ran = Counter(line.rpartition(",")[0] for line in replays.read_text().splitlines())
    runners = ("DecodeCudaGraphRunner", "EAGLEDraftExtendCudaGraphRunner", "LayerGraphs")
    assert set(ran) == {f"{runner},{batch}" for runner in runners for batch in BATCHES}
    # Passes of several sizes, each of which has a layout of its own.
    verified = {line for line in replays.read_text().splitlines() if line.startswith("Decode")}
    assert len({line.rpartition(",")[2] for line in verified}) > 2
