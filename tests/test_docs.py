"""What the documents say of the code is there: modules, links, commands, flags and settings."""

import argparse
import re
from pathlib import Path

import pytest

from cast_sglang import cli
from cast_sglang.config import add_flags, given_flags

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cast_sglang"
README = ROOT / "README.md"
STRUCTURE = ROOT / "docs" / "structure.md"
SETTINGS = ROOT / "docs" / "settings.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "profiles" / "README.md",
    ROOT / "scripts" / "draft_trainer" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MAX_README_BYTES = 9000

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


def code_in(document: Path) -> str:
    """Return the code of a document, a line for each span and each line of a block."""
    text = document.read_text(encoding="utf-8")
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the subcommands of a parser by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def test_the_readme_is_short():
    assert README.stat().st_size < MAX_README_BYTES


@each_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@each_document
def test_commands_exist(document):
    for words in re.findall(
        r"(?:^|[ /])cast-sglang((?: [a-z]+)+)", code_in(document), re.MULTILINE
    ):
        names, parser = words.split(), cli._parser()
        while names and (known := commands(parser)):
            assert names[0] in known, f"cast-sglang{words}"
            parser = known[names.pop(0)]


@each_document
def test_flags_exist(document):
    keys = given_flags(argparse.Namespace())
    known = {f"--cast-{key.replace('_', '-')}" for key in keys}
    named = set(re.findall(r"--cast-[a-z0-9]+(?:-[a-z0-9]+)*", document.read_text("utf-8")))
    assert named <= known


@each_document
def test_modules_that_are_run_exist(document):
    named = re.findall(r"python -m ((?:benchmarks|examples|scripts)[\w.]*)", code_in(document))
    for module in named:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_modules_in_the_structure_exist():
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", STRUCTURE.read_text(encoding="utf-8"))
    assert named
    outside = ("tests/",)
    for name in named:
        root = ROOT if name.startswith(outside) else PACKAGE
        assert (root / name).is_file(), name


def test_every_module_is_in_the_structure():
    text = STRUCTURE.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        assert path.name == "__init__.py" or f"`{name}`" in text, name


def test_every_package_is_in_the_structure():
    text = STRUCTURE.read_text(encoding="utf-8")
    packages = [path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")]
    for package in packages:
        assert package == Path(".") or f"`{package.as_posix()}/`" in text, package


def test_every_setting_is_described_with_its_default():
    text = SETTINGS.read_text(encoding="utf-8")
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    for action in parser._actions:
        [flag], key = action.option_strings, action.dest.removeprefix("cast_")
        if key == "config":
            assert f"`{flag}`" in text
            continue
        default = re.search(r"\(default: (.*)\)$", action.help)
        assert default
        row = f"| `{key}` | `{flag}` | `{default[1]}` | "
        assert row in text, row
