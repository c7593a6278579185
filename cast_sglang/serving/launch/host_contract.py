"""The host contract: what the plugin uses and replaces of SGLang, and whether it is still there.

`host_contract.txt` lists each symbol with its signature, as it was in the release that is tested.
Another release is read as source, not imported, so a check takes a second and needs no device.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from cast_sglang.errors import HostError

__all__ = ["HostSource", "broken_promises", "host_source", "read_contract"]

_HOST = "sglang"


def read_contract() -> dict[str, str]:
    """Return the signature of each symbol, by its dotted name."""
    text = resources.files(__package__).joinpath("host_contract.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: signature for name, _, signature in (line.partition(" ") for line in lines)}


def broken_promises(source: HostSource, contract: Mapping[str, str]) -> list[str]:
    """Return what is not as the contract says, a sentence for each symbol."""
    found = []
    for name, signature in contract.items():
        now = source.signature(name)
        if now is None:
            found.append(f"{name} is not there")
        elif now != signature:
            found.append(f"{name} is {now}, not {signature}")
    return found


def host_source() -> HostSource:
    """Return the source of the SGLang that this process would import.

    Raises:
        HostError: there is none.
    """
    spec = importlib.util.find_spec(_HOST)
    if spec is None or not spec.submodule_search_locations:
        raise HostError("sglang is not installed here")
    return HostSource(Path(next(iter(spec.submodule_search_locations))))


class HostSource:
    """The source files of a package.

    Args:
        root: directory of the package.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._module = functools.cache(self._parse)

    def signature(self, name: str) -> str | None:
        """Return the signature of a symbol; None if it is not there.

        That is `(a, b=, *, c=)` of a function, `class` and the same of a class, with its fields
        where it has no constructor of its own, `module`, or `value`.

        Args:
            name: dotted, such as sglang.srt.managers.scheduler.Scheduler.__init__.
        """
        found = self._find(name)
        if found is None:
            return None
        module, node = found
        if isinstance(node, ast.Module):
            return "module"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _arguments(node.args)
        if not isinstance(node, ast.ClassDef):
            return "value"
        init = self._member(module, node, "__init__")
        if init is not None and isinstance(init[1], ast.FunctionDef):
            return f"class{_arguments(init[1].args)}"
        fields = [f"{name}{'' if value is None else '='}" for name, value in _fields(node)]
        return f"class({', '.join(fields)})" if fields else "class"

    def _find(self, name: str) -> tuple[str, ast.AST] | None:
        """Return the module and the node of a definition."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            module = ".".join(parts[:end])
            tree = self._module(module)
            if tree is None:
                continue
            found: tuple[str, ast.AST] | None = (module, tree)
            for part in parts[end:]:
                if found is None:
                    return None
                found = self._member(*found, part)
            return found
        return None

    def _member(self, module: str, node: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        """Return what a name is in a module or a class, where it was defined."""
        if isinstance(node, ast.Module | ast.ClassDef):
            # A class that is decorated by an assignment is still that class.
            definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            binding = [s for s in _statements(node.body) if name in _defined(s)]
            binding.sort(key=lambda statement: not isinstance(statement, definitions))
            if binding:
                return self._definition(module, binding[0], name)
            for statement in _statements(node.body):
                if "*" in _defined(statement):
                    found = self._definition(module, statement, "*", name)
                    if found is not None:
                        return found
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                above = self._find(f"{module}.{ast.unparse(base)}")
                inherited = None if above is None else self._member(*above, name)
                if inherited is not None:
                    return inherited
        return None

    def _definition(
        self, module: str, statement: ast.stmt, name: str, wanted: str = ""
    ) -> tuple[str, ast.AST] | None:
        """Return where a statement that binds a name has it from.

        Args:
            wanted: the name, where the statement imports all of a module.
        """
        if not isinstance(statement, ast.ImportFrom):
            return module, statement
        original = next(a.name for a in statement.names if (a.asname or a.name) == name)
        home = statement.module or ""
        if statement.level:
            # A package is its own first level.
            is_package = self._path(module).name == "__init__.py"
            parts = module.split(".")[: None if is_package else -1]
            parts = parts[: len(parts) - (statement.level - 1)]
            home = ".".join([*parts, home] if home else parts)
        if home.split(".")[0] != _HOST:
            return None if wanted else (module, statement)  # of another package
        return self._find(f"{home}.{wanted or original}")

    def _path(self, module: str) -> Path:
        path = self._root.joinpath(*module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _parse(self, module: str) -> ast.Module | None:
        path = self._path(module)
        if module.split(".")[0] != _HOST or not path.is_file():
            return None
        return ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, also those under `if` and `try`; last ones first.

    The last definition of a name counts, but one in an `else` or a handler is only a fallback.
    """
    for statement in reversed(body):
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)
            yield from _statements(statement.orelse)
        else:
            yield statement


def _defined(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return {
        node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)
    }


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, statement.value


def _arguments(args: ast.arguments) -> str:
    """Return names and kinds of arguments, `=` behind those with a default."""
    positional = [*args.posonlyargs, *args.args]
    required = len(positional) - len(args.defaults)
    parts = [
        f"{argument.arg}{'=' if place >= required else ''}"
        for place, argument in enumerate(positional)
    ]
    if args.posonlyargs:
        parts.insert(len(args.posonlyargs), "/")
    if args.vararg is not None:
        parts.append(f"*{args.vararg.arg}")
    elif args.kwonlyargs:
        parts.append("*")
    parts += [
        f"{argument.arg}{'' if default is None else '='}"
        for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg is not None:
        parts.append(f"**{args.kwarg.arg}")
    return f"({', '.join(parts)})"
