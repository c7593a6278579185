"""The dependency rule: imports point left, and only the edges know SGLang."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cast_sglang"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# A module may import those to its left. The edges, serving and cpu, come last.
ORDER = (
    "errors __init__ compiled config wish profile_schema profiles tree graph_sizes journal cost "
    "evidence whole_steps residuals policy ops acceptance cuts lookahead price optimal stats "
    "metering grid roofline smoothing tabulating profiler trace reward recorded replay "
    "comparison tuning offline plots drawing gallery report diagnosis cli cpu serving"
).split()
EDGES = ("serving", "cpu")


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield every imported module, and each name of `from package import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    assert layer(path) in ORDER, f"give {layer(path)} its place in ORDER"
    tree = parse(path)
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for name, node in imports(tree):
        parts = name.split(".")
        if parts[0] != "cast_sglang":
            continue
        imported = parts[1] if parts[1] in ORDER else "__init__"
        # The command line starts a server, but only when it is told to.
        if layer(path) == "cli" and imported == "serving" and id(node) in late:
            continue
        left = ORDER.index(imported) < ORDER.index(layer(path))
        assert left or imported == layer(path), f"{name} is not left of {layer(path)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_edges_import_sglang(path):
    outside = {name.split(".")[0] for name, _ in imports(parse(path))}
    if layer(path) not in EDGES:
        assert "sglang" not in outside and "sgl_kernel" not in outside
    if layer(path) not in (*EDGES, "ops"):
        assert "triton" not in outside


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_config_reads_the_environment(path):
    tree = parse(path)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr not in ("environ", "getenv"):
            continue
        parent = parents[node]
        stores = isinstance(parent, ast.Subscript) and not isinstance(parent.ctx, ast.Load)
        stores |= isinstance(parent, ast.Attribute) and parent.attr in ("update", "setdefault")
        reader = layer(path) == "config" or path.relative_to(PACKAGE) == Path("cpu/platform.py")
        assert stores or reader, f"line {node.lineno} reads the environment"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("cast_sglang", ["sglang", "triton", "torch", "numpy", "msgspec"]),
        ("cast_sglang.cli", ["sglang", "triton", "torch"]),
        ("cast_sglang.config", ["sglang", "triton", "torch"]),
        ("cast_sglang.profiles, cast_sglang.wish", ["sglang", "triton", "torch"]),
        ("cast_sglang.trace", ["sglang", "triton", "torch"]),
        ("cast_sglang.replay, cast_sglang.tuning, cast_sglang.gallery", ["sglang", "triton"]),
        ("cast_sglang.stats", ["sglang", "triton", "torch", "prometheus_client"]),
        ("cast_sglang.profiler, cast_sglang.policy, cast_sglang.tree", ["sglang", "triton"]),
    ],
)
def test_importing_loads_little(modules, absent):
    script = f"import sys, {modules}; print([m for m in {absent} if m in sys.modules])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
