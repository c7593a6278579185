"""Write the list of SGLang's symbols that the plugin uses or replaces, with their signatures.

    python -m scripts.host_contract             # check the installed release against the list
    python -m scripts.host_contract --write     # list anew, after the plugin uses something else

The list is cast_sglang/serving/launch/host_contract.txt. Collected are what the package imports of
SGLang, the methods of SGLang's classes that it overrides, and the functions that it hooks.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from unittest import mock

from cast_sglang.serving.launch.host_contract import (
    HostSource,
    broken_promises,
    host_source,
    read_contract,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cast_sglang"
CONTRACT = PACKAGE / "serving" / "launch" / "host_contract.txt"
HEADER = """\
# What the plugin uses and replaces of SGLang {version}, with signatures; a default is only marked.
# Written by `python -m scripts.host_contract --write`.
"""


class _Registry:
    """Stands in for SGLang's registry of hooks and collects their targets."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def register(self, target: str, *args: object) -> None:
        self.targets.append(target)


def collect(source: HostSource) -> dict[str, str]:
    """Return the signatures of all symbols that the package uses or replaces, sorted by name.

    Raises:
        ValueError: a symbol is not there.
    """
    names = {name for path in sorted(PACKAGE.rglob("*.py")) for name in _used_by(path, source)}
    names |= set(_hooked())
    contract = {}
    for name in sorted(names):
        signature = source.signature(name)
        if signature is None:
            raise ValueError(f"{name} is not in this SGLang")
        contract[name] = signature
    return contract


def _used_by(path: Path, source: HostSource) -> Iterator[str]:
    """Yield what a file imports of SGLang, and the methods that its classes override."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    imported: dict[str, str] = {}  # by the name in this file
    for node in ast.walk(tree):
        if node in for_types or not isinstance(node, ast.ImportFrom):
            continue
        if (node.module or "").split(".")[0] == "sglang":
            imported |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    yield from imported.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of = imported.get(node.value.id)
            if of is not None and source.signature(of) == "module":
                yield f"{of}.{node.attr}"
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                of = imported.get(ast.unparse(base))
                for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
                    if of is not None and source.signature(f"{of}.{method.name}") is not None:
                        yield f"{of}.{method.name}"


def _hooked() -> list[str]:
    """Return what the plugin and the CPU platform hook or fill in."""
    from cast_sglang.cpu.adapters import UNPINNED
    from cast_sglang.cpu.install import FILLED, REPLACED
    from cast_sglang.serving import plugin
    from cast_sglang.serving.host_patches import hooks

    registry = _Registry()
    with (
        mock.patch.object(plugin, "HookRegistry", registry),
        mock.patch.object(hooks, "HookRegistry", registry),
        mock.patch("cast_sglang.serving.algorithm.register"),
        mock.patch.object(plugin, "_print_errors_as_one_line"),
    ):
        plugin.register()
    filled = [f"{home}.{name}" for name, (home, _) in FILLED.items()]
    return [*registry.targets, *REPLACED, *UNPINNED, *filled]


def main(argv: Sequence[str] | None = None) -> int:
    """Check or write the list; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="host_contract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="list anew")
    args = parser.parse_args(argv)
    source, version = host_source(), metadata.version("sglang")
    if args.write:
        lines = [f"{name} {signature}" for name, signature in collect(source).items()]
        CONTRACT.write_text(HEADER.format(version=version) + "\n".join(lines) + "\n")
        print(f"{CONTRACT}: {len(lines)} symbols of SGLang {version}")
        return 0
    contract = read_contract()
    broken = broken_promises(source, contract)
    print("\n".join(broken), file=sys.stderr)
    print(f"SGLang {version}: {len(contract) - len(broken)} of {len(contract)} symbols as expected")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
