"""On a GPU, the fused ops neither wait for the device nor allocate beyond a graph's reach."""

import argparse

import pytest
import torch

from benchmarks.micro.bench_ops import captured, ops_of_a_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SIZES = argparse.Namespace(topk=10, steps=8, tokens=64)


@pytest.fixture(params=[1, 7, 64])
def calls(request):
    """Calls of each op at the sizes of a fully grown tree, compiled."""
    from cast_sglang.ops import fused

    calls = ops_of_a_step(fused, SIZES, request.param, "cuda")
    for call in calls.values():
        call()
    return calls


def test_no_op_waits_for_the_device(calls):
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_from_a_graph_an_op_returns_the_same(calls):
    for name, call in calls.items():
        results = []
        replay = captured(lambda call=call, results=results: results.append(call()))
        expected = tensors(call())
        # What the captured call returned is filled anew by a replay.
        for part in tensors(results[-1]):
            part.zero_()
        replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(tensors(results[-1]), expected, strict=True):
            assert torch.equal(ours, theirs), name


def tensors(result):
    """Return the tensors that an op returned, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result if isinstance(result, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]
