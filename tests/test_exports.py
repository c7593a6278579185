"""Public names: `__all__` says what a module offers, and nothing else pretends to."""

import ast
from importlib import metadata
from pathlib import Path

import pytest

import cast_sglang
from cast_sglang import errors

PACKAGE = Path(cast_sglang.__file__).parent
# Read, not imported: the edges need SGLang, and the kernels Triton.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
# Modules that only SGLang and their own package import may go without a list.
EDGES = ("cpu", "serving")
# One contract, kept three times.
OPS = ("reference", "fused", "loops")


def definitions(tree: ast.Module) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Return the classes and functions that a module defines without an underscore."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {n.name: n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}


def assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Return the names that a module gives a value, with what stands on the right."""
    return {
        name.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }


def exported(tree: ast.Module) -> list[str] | None:
    """Return `__all__`; None where there is none."""
    listed = assigned(tree).get("__all__")
    return None if listed is None else ast.literal_eval(listed)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete_and_documented(name):
    tree = MODULES[name]
    defined = definitions(tree)
    assert ast.get_docstring(tree)
    for entry, node in defined.items():
        assert ast.get_docstring(node), f"{name}.{entry} has no docstring"
    listed = exported(tree)
    if listed is None:
        assert name.split(".")[0] in EDGES or not defined
        return
    imported = {alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert len(listed) == len(set(listed))
    assert set(defined) <= set(listed) <= {*defined, *assigned(tree), *imported}


def is_same_op(home: str, name: str) -> bool:
    """Return whether these are two of the modules that define the same ops."""
    (package, _, kind), (other, _, other_kind) = home.rpartition("."), name.rpartition(".")
    return package == other and {kind, other_kind} <= {*OPS}


def test_each_name_has_one_home():
    homes: dict[str, str] = {}
    for name, tree in MODULES.items():
        for entry in exported(tree) or ():
            home = homes.setdefault(entry, name)
            assert home == name or is_same_op(home, name), f"{entry}: {home} and {name}"


def test_every_package_says_its_job():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


def test_package_names():
    assert set(cast_sglang.__all__) == {*errors.__all__, "__version__"}
    assert all(hasattr(cast_sglang, name) for name in cast_sglang.__all__)
    assert cast_sglang.__version__ == metadata.version("cast-sglang")


def test_entry_points_exist():
    for group, name in [("console_scripts", "cast-sglang"), ("sglang.srt.plugins", "cast")]:
        [entry] = [e for e in metadata.entry_points(group=group) if e.name == name]
        assert entry.value.startswith("cast_sglang.")
