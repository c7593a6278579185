"""The kernels of sampled requests compile for sm_90 without a GPU."""

import os
import re

import pytest
import torch

from cast_sglang.ops.sampled.contract import DrawCuts
from tests.ops.sampled import cases

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def draw_children(fused, num_tokens, topk):
    shape = 6, num_tokens
    probs, tokens = torch.full(shape, 0.1), torch.zeros(shape, dtype=torch.int64)
    cuts = cases.cuts(torch.Generator().manual_seed(0), 3)
    cuts = DrawCuts(*cuts)._replace(top_ks=cuts.top_ks.to(torch.int32))
    fused.draw_children(probs, tokens, cuts, probs, topk)


def accept_draws(fused, num_tokens, topk):
    fused.accept_draws(
        *cases.walk(torch.Generator().manual_seed(0), 2, 3, topk, num_tokens, vocab=500)
    )


@pytest.mark.parametrize(("num_tokens", "topk"), [(32, 8), (33, 10), (2, 1)])
@pytest.mark.parametrize("op", [draw_children, accept_draws])
def test_kernels_compile_for_sm_90(op, num_tokens, topk, monkeypatch):
    from cast_sglang.ops.sampled import fused
    from tests.ops.test_kernels import MAX_SHARED_BYTES, Recorder, spilled_bytes

    name = f"_{op.__name__}_kernel"
    recorder = Recorder(getattr(fused, name))
    monkeypatch.setattr(fused, name, recorder)
    op(fused, num_tokens, topk)
    compiled = recorder.compile()
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)  # nothing depends on a race
    assert compiled.metadata.shared <= MAX_SHARED_BYTES
    assert spilled_bytes(compiled.asm["cubin"]) == 0
