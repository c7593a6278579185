"""The loops and the kernels of sampled requests against their definition in plain torch.

The interpreter must be chosen before Triton is imported, so `test_in_the_interpreter` runs this
file again in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

from cast_sglang.ops.sampled import loops, reference
from cast_sglang.ops.sampled.contract import DrawCuts
from tests.ops.sampled import cases

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not IS_INTERPRETED else "cpu"
NODES = [(1, 1, 1, 1), (1, 1, 4, 5), (3, 2, 3, 7), (2, 5, 8, 32), (5, 1, 10, 33), (7, 3, 2, 2)]


@pytest.fixture(params=["loops", "fused"])
def ops(request):
    if request.param == "loops":
        if IS_INTERPRETED:
            pytest.skip("the loops are compared outside of the interpreter")
        return loops
    if not (HAS_GPU or IS_INTERPRETED):
        pytest.skip("no GPU: test_in_the_interpreter runs it")
    from cast_sglang.ops.sampled import fused

    return fused


def on_device(case):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case]


def proposals_of(generator, batch, width, num_tokens):
    shape = batch * width, num_tokens
    probs = torch.rand(shape, generator=generator).pow(3).sort(1, descending=True).values
    probs = probs / probs.sum(1, keepdim=True)
    tokens = torch.rand(*shape[:1], 97, generator=generator).argsort(1)[:, :num_tokens]
    noise = torch.empty(shape).exponential_(generator=generator).clamp(min=1e-20)
    return probs, tokens, noise


@pytest.mark.parametrize("size", NODES, ids=str)
def test_children(ops, size):
    batch, width, topk, num_tokens = size
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        probs, tokens, noise = proposals_of(generator, batch, width, num_tokens)
        cuts = cases.cuts(generator, batch)
        expected = reference.draw_children(probs, tokens, cuts, noise, topk)
        case = on_device((probs, tokens))
        found = ops.draw_children(*case, DrawCuts(*on_device(cuts)), noise.to(DEVICE), topk)
        torch.testing.assert_close(found.proposals.cpu(), expected.proposals, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.probs.cpu(), expected.probs, rtol=1e-3, atol=2e-6)
        # Tokens that cannot be drawn come last, in any order.
        is_possible = torch.arange(topk) < (expected.proposals > 0).sum(1, keepdim=True)
        is_possible |= ~cuts.is_drawn.repeat_interleave(width)[:, None]
        assert ((found.tokens.cpu() == expected.tokens) | ~is_possible).all()


@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_accepted(ops, size):
    for seed in range(8):
        case = cases.walk(torch.Generator().manual_seed(seed), *size)
        if seed == 7:
            case = case._replace(max_nodes=max(1, case.max_nodes - 1))
        expected = reference.accept_draws(*case)
        found = ops.accept_draws(*on_device(case))
        assert found.nodes.cpu().equal(expected.nodes)
        assert found.num_drafts.cpu().equal(expected.num_drafts)
        residual = found.residual.cpu() / found.residual.cpu().sum(1, keepdim=True)
        torch.testing.assert_close(residual, expected.residual, rtol=1e-3, atol=1e-5)
        assert (expected.residual.gather(1, found.tokens.cpu()[:, None]) > 0).all()
        torch.testing.assert_close(
            found.chances.cpu(), expected.chances, rtol=1e-3, atol=1e-5, equal_nan=True
        )


def test_draws_follow_the_draft(ops):
    """First and second draw have the law of draws without replacement."""
    count, probs = 4000 if not IS_INTERPRETED else 0, torch.tensor([[0.6, 0.3, 0.1]])
    if not count:
        pytest.skip("too slow interpreted; the order is that of the loops, see test_children")
    generator = torch.Generator().manual_seed(1)
    noise = torch.empty(count, 3).exponential_(generator=generator)
    cuts = cases.cuts(
        generator, 1, temperatures=torch.ones(1), top_ks=torch.tensor([3]),
        top_ps=torch.ones(1), min_ps=torch.zeros(1), is_drawn=torch.ones(1, dtype=torch.bool),
    )  # fmt: skip
    tokens = torch.tensor([[5, 6, 7]]).repeat(count, 1)
    case = on_device((probs.repeat(count, 1), tokens))
    drawn = ops.draw_children(*case, DrawCuts(*on_device(cuts)), noise.to(DEVICE), 2)
    pairs = drawn.tokens.cpu() - 5
    for first in range(3):
        for second in set(range(3)) - {first}:
            p = probs[0]
            expected = float(p[first] * p[second] / (1 - p[first]))
            seen = ((pairs == torch.tensor([first, second])).all(1)).float().mean().item()
            assert abs(seen - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


def test_what_chances_rest_on_never_increases():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        probs, tokens, noise = proposals_of(generator, 3, 2, 9)
        cuts = cases.cuts(generator, 3, is_drawn=torch.ones(3, dtype=torch.bool))
        for ops in (loops, reference):
            children = ops.draw_children(probs, tokens, cuts, noise, 8).probs
            assert (children.diff(dim=1) <= 0).all()
            assert (children.sum(1) <= 1 + 1e-5).all()
            # Nothing of it depends on the draws.
            other = ops.draw_children(probs, tokens, cuts, 1 / noise, 8)
            assert other.probs.equal(children)


def test_arguments_are_checked():
    generator = torch.Generator().manual_seed(0)
    probs, tokens, noise = proposals_of(generator, 3, 2, 9)
    cuts = cases.cuts(generator, 4)
    with pytest.raises(ValueError, match=r"\[4 \* W, 3 or more\]"):
        loops.draw_children(probs, tokens, cuts, noise, 3)


@pytest.mark.skipif(IS_INTERPRETED or HAS_GPU, reason="this is the inner run")
def test_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.count("PASSED") > len(NODES) + len(cases.SIZES)
