"""The dependency rule: which package may import which, and that only the edges know SGLang."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
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
    "costs": "ops config",
    "policy": "costs ops tree config",
    "copying": "policy ops",
    "profiling": "costs",
    "trace": "copying policy costs ops tree config",
    "report": "trace costs tree config",
    "cpu": "ops",
    "serving": "copying policy profiling trace cpu costs ops tree config",
    "cli": "__init__ serving report trace profiling policy costs ops tree config",
}
# Of the trace the server writes records, and nothing else.
SERVING_MAY_IMPORT_OF_TRACE = ("cast_sglang.trace.records", "cast_sglang.trace.file")
# Inside `serving`, from the top down: a floor imports those below it, not its own.
SERVING_FLOORS = (
    "plugin",
    "algorithm profiling",
    "draftless",
    "worker",
    "drafting",
    "learned",
    "graphs served_costs request_checks",
    "host_patches trace_recorder calibration copies",
    "weight_updates",
    "step",
    "launch requests pass_clock host_reads row_packing stats",
    "step_room texts heads drift request_modes",
)
DRAFT_WORKER = "cast_sglang.serving.drafting.worker"
EDGES = ("serving", "cpu")
# Of the environment, besides `config`: the platform runs before flags are parsed, and commands set
# what an engine's processes read and put the caller's values back.
READERS = (Path("cpu/platform.py"), Path("serving/launch/engine.py"))


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
    return parsed(path.read_text(encoding="utf-8"))


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


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
    for path in FILES:
        folder, unit, *_ = path.relative_to(PACKAGE).with_suffix("").parts + ("",)
        if folder != "serving" or unit == "__init__":
            continue
        for name in imported_here(path):
            if name.startswith("cast_sglang.serving."):
                imported = name.split(".")[2]
                is_below = floors[imported] > floors[unit]
                assert is_below or imported == unit, f"{path.name} may not import {name}"


def test_nothing_in_drafting_knows_its_worker():
    """The worker builds the others and hands them what they need."""
    for path in (PACKAGE / "serving" / "drafting").glob("*.py"):
        assert not any(name.startswith(DRAFT_WORKER) for name in imported_here(path)), path


def test_no_module_imports_itself_by_way_of_others():
    """Imports for types and in functions count too: each file can be read after those it names."""
    graph = import_graph(PACKAGE)
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(graph)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return, for each module of a package, the modules of the package that it imports."""
    modules = {module_name(package, path): path for path in package.rglob("*.py")}
    return {
        module: {
            # A name is a module, or defined in one.
            name if name in modules else name.rpartition(".")[0]
            for name in imported_here(path)
        }
        for module, path in modules.items()
    }


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(
    "import_of_b",
    [
        "from cast_sglang import b",
        "import cast_sglang.b",
        "def f(): from cast_sglang.b import X",
        "if TYPE_CHECKING: from cast_sglang.b import X",
    ],
)
def test_circles_are_found(tmp_path, import_of_b):
    package = tmp_path / "cast_sglang"
    package.mkdir()
    (package / "b.py").write_text("import cast_sglang.c")
    (package / "c.py").write_text("from cast_sglang.a import X")
    (package / "a.py").write_text("")
    list(graphlib.TopologicalSorter(import_graph(package)).static_order())
    (package / "a.py").write_text(import_of_b)
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(import_graph(package)).static_order())


def test_the_command_line_imports_what_starts_servers_late():
    for tree in map(parse, sorted((PACKAGE / "cli").glob("*.py"))):
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
        reader = layer(path) == "config" or path.relative_to(PACKAGE) in READERS
        assert stores or reader, f"line {node.lineno} reads the environment"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


# What importing must not load. Each line is imported after those above it, in one process, so a
# line lists no more than those above it.
HOSTS = {"sglang", "triton"}
LOADS_NONE_OF = (
    ("cast_sglang", HOSTS | {"torch", "prometheus_client", "numpy", "msgspec"}),
    ("cast_sglang.cli", HOSTS | {"torch", "prometheus_client"}),
    ("cast_sglang.config", HOSTS | {"torch", "prometheus_client"}),
    ("cast_sglang.costs.profiles", HOSTS | {"torch", "prometheus_client"}),
    ("cast_sglang.serving.request_modes", HOSTS | {"torch", "prometheus_client"}),
    ("cast_sglang.serving.stats", HOSTS | {"torch", "prometheus_client"}),
    ("cast_sglang.trace.records", HOSTS),
    ("cast_sglang.trace.replay", HOSTS),
    ("cast_sglang.trace.tuning", HOSTS),
    ("cast_sglang.report.trace_page", HOSTS),
    ("cast_sglang.profiling.run", HOSTS),
    ("cast_sglang.policy.fixed", HOSTS),
    ("cast_sglang.tree", HOSTS),
)


def test_importing_loads_little():
    for (_, above), (_, below) in pairwise(LOADS_NONE_OF):
        assert below <= above
    script = "import importlib, sys\n"
    script += f"for module, absent in {LOADS_NONE_OF!r}:\n"
    script += "    importlib.import_module(module)\n"
    script += "    print(module, *sorted(absent & set(sys.modules)))\n"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [module for module, _ in LOADS_NONE_OF]
