"""The dependency rule: which package may import which, and that only the edges know SGLang."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cast_sglang"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# What each package may import, `errors` besides. A package comes after all that it may import.
MAY_IMPORT = {
    "errors": "",
    "__init__": "",
    "tree": "",
    "config": "",
    "ops": "tree",
    "costs": "config",
    "policy": "costs ops tree config",
    "profiling": "costs",
    "trace": "policy costs ops tree config",
    "report": "trace costs config",
    "cpu": "ops",
    "serving": "policy profiling trace cpu costs ops tree config",
    "cli": "__init__ serving report trace profiling policy costs ops tree config",
}
# Of the trace the server writes records, and nothing else.
SERVING_MAY_IMPORT_OF_TRACE = ("cast_sglang.trace.records", "cast_sglang.trace.file")
# Inside `serving`, from the top down: a floor imports those below it, not its own.
SERVING_FLOORS = (
    "plugin",
    "algorithm profiling",
    "worker",
    "drafting",
    "graphs trace_recorder calibration",
    "host_patches",
    "weight_updates",
    "launch step step_room requests pass_clock host_reads row_packing stats",
)
DRAFT_WORKER = "cast_sglang.serving.drafting.worker.CastDraftWorker"
WORKER = "cast_sglang.serving.worker.CastWorker"
# What a file of `serving` imports although it may not, and is to get handed in: all for types only.
# An entry whose import is gone fails too.
STILL_IMPORTED = {
    # The draft model's runner, attention and token map, which the worker could hand in.
    ("serving/drafting/captured_layers.py", DRAFT_WORKER),
    ("serving/drafting/grow.py", DRAFT_WORKER),
    ("serving/drafting/layers.py", DRAFT_WORKER),
    # Runner, device, batch sizes and limits.
    ("serving/graphs/passes.py", DRAFT_WORKER),
    ("serving/graphs/passes.py", WORKER),
    ("serving/graphs/plan.py", WORKER),
    # Limits, settings and identity at the start, a step's records later.
    ("serving/trace_recorder.py", DRAFT_WORKER),
    ("serving/trace_recorder.py", WORKER),
}
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


def imported_here(path: Path) -> list[str]:
    """Return the names that a file imports of this package, wherever in it."""
    return [name for name, _ in imports(parse(path)) if name.split(".")[0] == "cast_sglang"]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_packages_have_an_order():
    known: set[str] = set()
    for package, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= known, f"{package} comes before what it may import"
        known.add(package)
    assert known == {layer(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_import_what_they_may(path):
    allowed = {layer(path), "errors", *MAY_IMPORT[layer(path)].split()}
    for name in imported_here(path):
        package = name.split(".")[1]
        package = package if package in MAY_IMPORT else "__init__"
        assert package in allowed, f"{layer(path)} may not import {name}"
        if (layer(path), package) == ("serving", "trace"):
            assert name.rpartition(".")[0] in SERVING_MAY_IMPORT_OF_TRACE, name


def test_serving_imports_from_the_top_down():
    floors = {unit: n for n, units in enumerate(SERVING_FLOORS) for unit in units.split()}
    found = set()
    for path in FILES:
        folder, unit, *inner = path.relative_to(PACKAGE).with_suffix("").parts + ("",)
        if folder != "serving" or unit == "__init__":
            continue
        for name in imported_here(path):
            if not name.startswith("cast_sglang.serving."):
                continue
            imported = name.split(".")[2]
            is_below = floors[imported] > floors[unit]
            # In `drafting` the worker builds the others, and none of them needs to know it.
            names_worker = unit == "drafting" and inner[0] != "worker" and name == DRAFT_WORKER
            if names_worker or not (is_below or imported == unit):
                found.add((path.relative_to(PACKAGE).as_posix(), name))
    assert found == STILL_IMPORTED


def test_the_command_line_imports_what_starts_servers_late():
    tree = parse(PACKAGE / "cli.py")
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for name, node in imports(tree):
        assert id(node) in late or not name.startswith("cast_sglang.serving")


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
        (
            "cast_sglang.costs.profiles, cast_sglang.policy.request_modes",
            ["sglang", "triton", "torch"],
        ),
        ("cast_sglang.trace.records", ["sglang", "triton", "torch"]),
        (
            "cast_sglang.trace.replay, cast_sglang.trace.tuning, cast_sglang.report.trace_page",
            ["sglang", "triton"],
        ),
        ("cast_sglang.serving.stats", ["sglang", "triton", "torch", "prometheus_client"]),
        (
            "cast_sglang.profiling.run, cast_sglang.policy.fixed, cast_sglang.tree",
            ["sglang", "triton"],
        ),
    ],
)
def test_importing_loads_little(modules, absent):
    script = f"import sys, {modules}; print([m for m in {absent} if m in sys.modules])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
