"""Public names: `__all__` says what a module offers, and nothing else pretends to."""

import ast
import importlib
from importlib import metadata
from pathlib import Path

import pytest

import cast_sglang
from cast_sglang import errors

PACKAGE = Path(cast_sglang.__file__).parent
# The edges import SGLang and are covered where they are run.
CORE = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def public_definitions(path: Path) -> set[str]:
    """Return the classes and functions that a module defines without an underscore."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")}


@pytest.mark.parametrize("name", CORE)
def test_all_is_complete_sorted_and_documented(name):
    module = importlib.import_module(f"cast_sglang.{name}")
    exported = list(module.__all__)
    assert len(exported) == len(set(exported))
    assert all(hasattr(module, entry) for entry in exported)
    assert public_definitions(PACKAGE / f"{name}.py") <= set(exported)
    assert module.__doc__
    for entry in public_definitions(PACKAGE / f"{name}.py"):
        assert getattr(module, entry).__doc__, f"{name}.{entry} has no docstring"


def test_each_name_has_one_home():
    homes: dict[str, str] = {}
    for name in CORE:
        for entry in importlib.import_module(f"cast_sglang.{name}").__all__:
            assert homes.setdefault(entry, name) == name, f"{entry}: {homes[entry]} and {name}"


def test_package_names():
    assert set(cast_sglang.__all__) == {*errors.__all__, "__version__"}
    assert all(hasattr(cast_sglang, name) for name in cast_sglang.__all__)
    assert cast_sglang.__version__ == metadata.version("cast-sglang")


def test_every_error_is_a_cast_error():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.CastError)


def test_entry_points_exist():
    for group, name in [("console_scripts", "cast-sglang"), ("sglang.srt.plugins", "cast")]:
        [entry] = [e for e in metadata.entry_points(group=group) if e.name == name]
        assert entry.value.startswith("cast_sglang.")
