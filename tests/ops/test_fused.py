"""The fused ops against the reference: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `test_in_the_interpreter` runs this
file again in a process of its own.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from cast_sglang.ops import reference
from tests.ops import cases

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not IS_INTERPRETED else "cpu"
compares = pytest.mark.skipif(
    not (HAS_GPU or IS_INTERPRETED), reason="no GPU: test_in_the_interpreter runs it"
)

# Requests, expanded nodes, K.
LAYERS = (
    [(1, 1, k) for k in range(1, 17)]
    + [(2, w, 5) for w in range(1, 6)]
    + [(b, 3, 3) for b in (3, 7, 13, 67)]
    + [(3, 10, 10), (2, 7, 11), (1, 16, 16), (2, 2, 2), (5, 1, 8)]
)
# Requests, candidates, nodes kept.
RANKINGS = [(b, m, n) for b, m in ((1, 5), (2, 17), (3, 40)) for n in (1, 2, m // 2, m - 1, m)]
RANKINGS += [(1, 1, 1), (2, 2, 1), (7, 3, 2), (67, 6, 5), (1, 257, 31), (2, 110, 63)]
# Committed lengths, expanded nodes, D, depth.
SLOTS = [([n], w, d, 1 + n % d) for n, w, d in ((1, 1, 1), (2, 3, 1), (511, 2, 3), (512, 1, 4))]
SLOTS += [([n, 513, 1], w, 7, d) for n, w, d in ((1, 1, 7), (5, 2, 6), (1025, 8, 1), (30, 5, 3))]
SLOTS += [(list(range(1, b + 1)), 1 + b % 4, 5, 1 + b % 5) for b in range(4, 15)]
SLOTS += [([3] * 67, 2, 9, 9), ([600, 2, 40], 16, 8, 8)]
# Requests, K, expanded nodes of each layer, N.
TREES = [(1, 1, [1] * d, n) for d, n in ((0, 2), (1, 2), (4, 4), (7, 9))]
TREES += [(2, k, [k] * d, n) for k, d, n in ((2, 3, 9), (3, 2, 7), (5, 2, 33), (4, 4, 16))]
TREES += [(3, 4, [2, 1, 3], n) for n in (2, 3, 5, 8, 17, 25)]
TREES += [(67, 2, [1, 2], 5), (13, 3, [3], 11), (1, 10, [10, 7, 10], 64), (1, 16, [16], 130)]
TREES += [(2, 8, [1], 12), (1, 6, [], 7), (2, 3, [3, 3, 3, 3], 32), (1, 7, [4, 2, 1], 21)]


class Launches:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.fixture
def fused(monkeypatch):
    """The module under test; each of its kernels must have run at the end if it is named."""
    import triton

    from cast_sglang.ops import fused, kernels

    interpreted = type(kernels.grow_layer_kernel).__name__ == "InterpretedFunction"
    assert interpreted == IS_INTERPRETED
    assert triton.next_power_of_2(5) == 8
    for name in kernels.__all__:
        monkeypatch.setattr(kernels, name, Launches(getattr(kernels, name)))
    return fused


def launches(fused, op):
    return getattr(fused.kernels, f"{op}_kernel").count


def run(op, *arguments):
    """Run an op on the device under test and bring what it returns to the host."""

    def move(x, device):
        if isinstance(x, torch.Tensor):
            return as_laid_out(x, device)
        if isinstance(x, tuple):
            moved = [move(part, device) for part in x]
            return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
        return x

    return move(op(*(move(argument, DEVICE) for argument in arguments)), "cpu")


def as_laid_out(x, device):
    """Copy to a device with the strides as they are: `to` would make a row-strided view dense."""
    if x.device.type == device or x.is_contiguous():
        return x.to(device)
    base = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device=device)
    copy = base.as_strided(x.shape, x.stride(), x.storage_offset())
    return copy.copy_(x)


def kinds(shapes):
    """Pair each shape with a kind of values and a seed, all kinds in turn."""
    for seed, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        yield shape, cases.KINDS[seed % len(cases.KINDS)], generator


def assert_same(ours, theirs, shape):
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, shape
        assert torch.equal(ours, theirs), shape
        return
    for part, expected in zip(ours, theirs, strict=True):
        assert_same(part, expected, shape)


@compares
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_grow_layer(fused, is_calibrated):
    """Bit for bit, calibrated too: nothing is contracted, so ties are the same ties."""
    acceptance = cases.learned(3)
    for (batch, width, topk), kind, generator in kinds(LAYERS):
        case = cases.layer(generator, batch, width, topk, kind)
        curve = cases.curve_at(acceptance, topk % 5, batch) if is_calibrated else None
        ours = run(fused.grow_layer, *case, curve)
        assert_same(ours, reference.grow_layer(*case, curve), (batch, width, topk, kind))
    assert launches(fused, "grow_layer") == len(LAYERS) >= 20


@compares
def test_calibration_with_one_line_needs_no_knots(fused):
    from cast_sglang.ops.contract import AcceptanceCurve

    case = cases.layer(torch.Generator().manual_seed(0), 2, 2, 3, "random")
    # Beyond 0 and 1 the line is clipped.
    line = torch.tensor([[-0.5]]), torch.tensor([[2.0]])
    curve = AcceptanceCurve(torch.zeros(0), *line, torch.zeros(2, dtype=torch.int64))
    ours = run(fused.grow_layer, *case, curve)
    assert_same(ours, reference.grow_layer(*case, curve), curve)
    assert ours.probs.min() == 0.0 and ours.probs.max() == 1.0


@compares
def test_a_probability_at_a_knot_belongs_to_the_piece_above(fused):
    from cast_sglang.ops.contract import AcceptanceCurve

    case = cases.layer(torch.Generator().manual_seed(0), 3, 3, 5, "ties")
    starts = torch.tensor([[0.9, 0.6, 0.3, 0.0], [0.0, 0.3, 0.6, 0.9]])
    kinds = torch.tensor([1, 0, 1])
    steps = AcceptanceCurve(torch.tensor([0.25, 0.5, 1.0]), starts, torch.zeros(2, 4), kinds)
    assert_same(run(fused.grow_layer, *case, steps), reference.grow_layer(*case, steps), steps)


@compares
def test_rank_nodes(fused):
    for (batch, m, n), kind, generator in kinds(RANKINGS):
        scores = cases.values(generator, (batch, m), kind)
        assert_same(
            run(fused.rank_nodes, scores, n), reference.rank_nodes(scores, n), (batch, m, n, kind)
        )
    # Values beyond the contract's range are ranked too, and a row may be strided.
    scores = torch.tensor([[0.5, -1.0, -0.0, 0.0, float("inf"), -float("inf"), -1e-40, 7.0]])
    for view in (scores, scores[:, :5], scores[:, ::2]):
        n = view.shape[1]
        assert_same(run(fused.rank_nodes, view, n), reference.rank_nodes(view, n), view)
    assert launches(fused, "rank_nodes") == len(RANKINGS) + 3 >= 20


@compares
def test_select_nodes(fused):
    for (batch, m, n), _, generator in kinds(RANKINGS):
        index = torch.stack([torch.randperm(m, generator=generator) for _ in range(batch)])
        tokens = torch.randint(2**40, (batch, m), generator=generator)
        parents = cases.parents(generator, batch, m)
        rows = torch.randint(1, n + 2, (batch,), generator=generator)
        for num_rows in (None, rows, torch.ones_like(rows)):
            arguments = (index[:, :n], tokens, parents, n + 1, num_rows)
            expected = reference.select_nodes(*arguments)
            assert_same(run(fused.select_nodes, *arguments), expected, (batch, m, n))
    assert launches(fused, "select_nodes") == 3 * len(RANKINGS) >= 60


@compares
def test_list_slots(fused):
    for (lens, width, max_depth, depth), _, generator in kinds(SLOTS):
        slot = torch.int32 if width % 2 else torch.int64
        case = cases.slots(generator, lens, width, max_depth, depth, slot)
        ours = [as_laid_out(part, DEVICE) for part in case]
        reference.list_slots(*case)
        fused.list_slots(*ours)
        shape = (lens, width, max_depth, depth)
        assert_same(tuple(part.cpu() for part in ours[5:]), tuple(case[5:]), shape)
    assert launches(fused, "list_slots") == len(SLOTS) >= 20


@compares
@pytest.mark.parametrize("kind", ["in turn", "grafted", "ragged"])
def test_build_tree(fused, kind):
    for (batch, topk, widths, num_tokens), values, generator in kinds(TREES):
        case = cases.tree(
            generator, batch, topk, widths, num_tokens,
            values if kind == "in turn" else kind, kind == "ragged",
        )  # fmt: skip
        if values in ("ties", "mixed"):
            case = case._replace(seq_lens=case.seq_lens.int())
        expected = cases.poisoned_links(batch, case.parent_rows.shape[1] + 1)
        ours = cases.TreeLinks(*(part.clone().to(DEVICE) for part in expected))
        arguments = case.parent_rows, case.seq_lens
        reference.build_tree(*arguments, *expected, case.num_steps)
        on_device = (part.to(DEVICE) for part in arguments)
        fused.build_tree(*on_device, *ours, case.num_steps)
        for name, part, theirs in zip(ours._fields, ours, expected, strict=True):
            assert torch.equal(part.cpu(), theirs), (name, batch, topk, widths, num_tokens, kind)
    assert launches(fused, "build_tree") == len(TREES) >= 20


@compares
def test_misuse_is_refused_before_a_launch(fused):
    case = cases.layer(torch.Generator().manual_seed(0), 2, 2, 3, "random")
    with pytest.raises(ValueError, match="probs must be 2-d"):
        fused.grow_layer(case.parent_scores, case.probs.double(), case.tokens, 3)
    with pytest.raises(ValueError, match="num_nodes must be in 1..4, got 5"):
        fused.rank_nodes(torch.zeros(1, 4), 5)
    assert sum(launches(fused, op) for op in ("grow_layer", "rank_nodes")) == 0


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU or IS_INTERPRETED, reason="the tests above run in this process")
def test_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # Only this test is left out there.
    summary = r"\d\d passed, 1 skipped(, \d+ warnings?)? in"
    assert re.search(summary, done.stdout), done.stdout[-2000:]
