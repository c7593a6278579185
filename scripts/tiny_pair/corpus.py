"""The text of the pair: the Python installation's own library."""

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
SYSTEM = "<|system|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END, SYSTEM)

MAX_DOCUMENT_BYTES = 200_000
HELD_OUT_PERCENT = 3
MAX_FUNCTION_CHARS = 1200
CHAT_PERCENT = 35  # of the functions that could become a turn; about 8 % of all tokens

# Character tables and the like: long, and nothing in them that a language model could learn.
TABLE_FOLDERS = ("encodings/", "lib2to3/tests/data/", "test/cjkencodings/")
SMOKE_MODULES = (
    "textwrap.py",
    "bisect.py",
    "heapq.py",
    "shlex.py",
    "queue.py",
    "sched.py",
    "stat.py",
    "abc.py",
)
SMOKE_HELD_OUT = "textwrap.py"


@dataclass(frozen=True)
class Document:
    """One text of the corpus; `module` is its path below the library folder."""

    module: str
    text: str
    is_held_out: bool
    is_chat: bool = False


def bucket(key: str) -> int:
    """Return a number in [0, 100) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100


def is_held_out(module: str) -> bool:
    """Say whether a module is kept away from training: a fixed 3 % of the paths."""
    return bucket(module) < HELD_OUT_PERCENT


def iter_documents(is_smoke: bool = False) -> Iterator[Document]:
    """Yield modules, reference topics, the licence and chat turns, in a fixed order.

    Args:
        is_smoke: read eight small modules only, one of them held out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for path in _module_paths(library, is_smoke):
        module = path.relative_to(library).as_posix()
        held_out = module == SMOKE_HELD_OUT if is_smoke else is_held_out(module)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the tests hold files in other encodings on purpose
        if module == "pydoc_data/topics.py":
            yield from _topics(module, text, held_out)
            continue
        if len(text) > MAX_DOCUMENT_BYTES or not text.strip():
            continue
        yield Document(module, text, held_out)
        if not module.startswith("test/"):
            yield from _chat_turns(module, text, held_out)
    licence = library / "LICENSE.txt"
    if licence.exists():
        yield Document("LICENSE.txt", licence.read_text(encoding="utf-8"), is_held_out=False)


def format_turn(request: str, answer: str) -> str:
    """Lay one exchange out as the chat template does."""
    return f"{USER}\n{request}{END}\n{ASSISTANT}\n{answer}{END}\n"


def _module_paths(library: Path, is_smoke: bool) -> list[Path]:
    if is_smoke:
        return [library / name for name in SMOKE_MODULES]
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if "site-packages" not in path.parts
        and not path.relative_to(library).as_posix().startswith(TABLE_FOLDERS)
    ]


def _topics(module: str, text: str, held_out: bool) -> Iterator[Document]:
    """Yield the language reference that `help()` prints, one document a topic."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Dict):
            for value in node.values:
                topic = ast.literal_eval(value)
                if isinstance(topic, str):
                    yield Document(module, topic, held_out)


def _chat_turns(module: str, text: str, held_out: bool) -> Iterator[Document]:
    """Yield functions of a module as a request for them and their source."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return  # the library carries broken modules as fixtures
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.FunctionDef)
            or bucket(f"{module}:{node.lineno}") >= CHAT_PERCENT
        ):
            continue
        source = ast.get_source_segment(text, node, padded=True)
        if source is None or len(source) > MAX_FUNCTION_CHARS:
            continue
        request = f"Write the Python function `{node.name}({ast.unparse(node.args)})`."
        docstring = ast.get_docstring(node)
        if docstring:
            request += " " + " ".join(docstring.split("\n\n")[0].split())
        yield Document(
            module, format_turn(request, textwrap.dedent(source)), held_out, is_chat=True
        )
