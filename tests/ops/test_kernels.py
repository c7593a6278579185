"""The kernels compile for sm_90 without a GPU, and to the code that `fused` promises.

What only the interpreter accepts fails here. The arguments are those of real launches, recorded.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ops import cases

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

MAX_SHARED_BYTES = 227 * 1024
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


class Recorder:
    """A kernel that is not launched; keeps the arguments of its last launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **keywords):
        self.options = {k: keywords.pop(k) for k in LAUNCH_OPTIONS if k in keywords}
        self.arguments = dict(zip(self.kernel.arg_names, arguments, strict=False)) | keywords

    def compile(self):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants = {}, {}
        assert list(self.arguments) == self.kernel.arg_names
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=self.options)


def generator():
    return torch.Generator().manual_seed(0)


def grow_layer(fused, batch=2, width=10, topk=10, is_calibrated=True):
    curve = cases.curve_at(cases.learned(0), 0, batch) if is_calibrated else None
    fused.grow_layer(*cases.layer(generator(), batch, width, topk, "random"), curve)


def rank_nodes(fused, num_candidates=710, num_nodes=63):
    fused.rank_nodes(torch.zeros(2, num_candidates), num_nodes)


def select_nodes(fused, is_ragged=True, num_nodes=63):
    index, tokens = torch.arange(num_nodes).expand(2, -1), torch.zeros(2, 710, dtype=torch.int64)
    parents = cases.parents(generator(), 2, 710)
    num_rows = torch.tensor([2, 3]) if is_ragged else None
    fused.select_nodes(index, tokens, parents, num_nodes + 1, num_rows)


def build_tree(fused, num_tokens=64, widths=(10,) * 7, seq_len=torch.int64):
    case = cases.tree(generator(), 1, 10, list(widths), num_tokens)
    links = cases.poisoned_links(1, num_tokens)
    fused.build_tree(case.parent_rows, case.seq_lens.to(seq_len), *links, case.num_steps)


def list_slots(fused, slot=torch.int32):
    fused.list_slots(*cases.slots(generator(), [700, 3], 10, 8, 5, slot)[:7])


# The step of batch 64, K = 10, depth 8, N = 64, and the corners of each kernel.
LAUNCHES = {
    "grow_layer": [
        {},
        {"is_calibrated": False},
        {"width": 1, "topk": 1},
        {"width": 16, "topk": 16},
    ],
    "rank_nodes": [{}, {"num_candidates": 5, "num_nodes": 1}, {"num_nodes": 710}],
    "select_nodes": [{}, {"is_ragged": False}, {"num_nodes": 1}, {"num_nodes": 130}],
    "list_slots": [{}, {"slot": torch.int64}],
    "build_tree": [
        {},
        {"num_tokens": 2, "widths": ()},
        {"num_tokens": 130, "seq_len": torch.int32},
    ],
}


@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op, shapes in LAUNCHES.items() for case in range(len(shapes))]
)
def test_kernels_compile_for_sm_90(op, case, monkeypatch):
    from cast_sglang.ops import fused, kernels

    name = f"{op}_kernel"
    recorder = Recorder(getattr(kernels, name))
    monkeypatch.setattr(kernels, name, recorder)
    globals()[op](fused, **LAUNCHES[op][case])
    compiled = recorder.compile()
    ptx = compiled.asm["ptx"]
    assert ".ftz" not in ptx  # denormals stay
    assert not re.search(r"\b(atom|red)\.", ptx)  # nothing depends on a race
    if op == "grow_layer":
        assert "fma.rn.f32" not in ptx  # products are rounded before they are summed
    assert compiled.metadata.shared <= MAX_SHARED_BYTES
    assert spilled_bytes(compiled.asm["cubin"]) == 0


def spilled_bytes(cubin):
    """Return the bytes of stack a thread uses, which is where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("Triton brings no cuobjdump")
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", usage))


def test_every_kernel_is_compiled():
    from cast_sglang.ops import fused, kernels, reference

    assert {f"{op}_kernel" for op in LAUNCHES} == set(kernels.__all__)
    assert sorted(LAUNCHES) == sorted(fused.__all__) == sorted(reference.__all__)
