"""Files of packages are fetched by name, checked, and made once however many ask for them."""

import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.harness import published
from benchmarks.harness.published import FetchError, PackageFile, cached, made_once
from cast_sglang.config import user_cache_dir

CONTENT = b'{"turns": ["one", "two"]}\n'
FILE = PackageFile("toy-prompts==1.0", "toy/data/x.jsonl", hashlib.sha256(CONTENT).hexdigest())


def write_wheel(folder: Path, requirement: str, files: dict[str, bytes]) -> None:
    """Write a wheel of a package that depends on one that nobody has."""
    name, _, version = requirement.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {
        f"{stem}.dist-info/METADATA": metadata.encode(),
        f"{stem}.dist-info/WHEEL": tags.encode(),
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{stem}.dist-info/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, content in (files | {f"{stem}.dist-info/RECORD": record.encode()}).items():
            wheel.writestr(path, content)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the package index; the user's cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for installer in ("UV", "PIP"):
        monkeypatch.setenv(f"{installer}_NO_INDEX", "1")
        monkeypatch.setenv(f"{installer}_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_file_is_fetched_once_and_nothing_else_is_kept(wheels):
    write_wheel(wheels, FILE.requirement, {FILE.path: CONTENT, "toy/__init__.py": b"1 / 0"})
    found = cached(FILE)
    assert found.read_bytes() == CONTENT
    assert found == user_cache_dir() / "packages" / "toy-prompts-1.0" / "x.jsonl"
    assert list(found.parent.iterdir()) == [found]
    assert [path.name for path in found.parent.parent.glob("[!.]*")] == ["toy-prompts-1.0"]
    next(wheels.iterdir()).unlink()
    assert cached(FILE) == found


def test_what_cannot_be_had_is_said_with_what_to_do(wheels):
    with pytest.raises(FetchError) as error:
        cached(FILE)
    text = str(error.value)
    assert text.startswith("toy-prompts==1.0 could not be fetched. It comes from the package index")
    assert "UV_FIND_LINKS" in text and f"copy {FILE.kept} from" in text
    assert not FILE.kept.exists()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({FILE.path: b"other"}, r"has the SHA-256 \w{64}, and \w{64} was published.*toy-prompts\)"),
        ({"toy/__init__.py": b""}, "toy-prompts==1.0 has no toy/data/x.jsonl"),
    ],
)
def test_another_file_than_the_published_one_is_refused(files, text, wheels):
    write_wheel(wheels, FILE.requirement, files)
    with pytest.raises(FetchError, match=text):
        cached(FILE)
    assert not list(FILE.kept.parent.glob("[!.]*"))


def test_uv_is_looked_for_as_the_install_script_does_then_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "ROOT", tmp_path)
    here: dict[str, str] = {"pip3": "/bin/pip3"}
    monkeypatch.setattr(published.shutil, "which", here.get)
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    assert published._installer()[:2] == ["/bin/pip3", "install"]
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: object())
    assert published._installer()[:4] == [sys.executable, "-m", "pip", "install"]
    own = tmp_path / ".cache" / "uv" / "bin" / "uv"
    own.parent.mkdir(parents=True)
    own.touch()
    assert published._installer()[:3] == [str(own), "pip", "install"]
    here["uv"] = "/bin/uv"
    assert published._installer()[:3] == ["/bin/uv", "pip", "install"]


def test_without_uv_and_pip_the_install_script_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "ROOT", tmp_path)
    monkeypatch.setattr(published.shutil, "which", lambda name: None)
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match="scripts/install"):
        published._installer()


def test_of_many_callers_one_makes_the_folder(tmp_path):
    makers: list[Path] = []

    def make(folder: Path) -> None:
        makers.append(folder)
        assert not (tmp_path / "made").exists()
        (folder / "x").write_text("whole")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: made_once(tmp_path / "made", make), range(8)))
    assert set(folders) == {tmp_path / "made"} and len(makers) == 1
    assert (tmp_path / "made" / "x").read_text() == "whole"


def test_what_was_cut_short_is_made_anew(tmp_path):
    kill = (
        "import os, pathlib, sys; from benchmarks.harness.published import made_once\n"
        "def make(folder):\n    (folder / 'half').touch()\n    os.kill(os.getpid(), 9)\n"
        "made_once(pathlib.Path(sys.argv[1]), make)"
    )
    done = subprocess.run([sys.executable, "-c", kill, str(tmp_path / "made")], env=os.environ)
    assert done.returncode == -9 and (tmp_path / "made.partial" / "half").exists()

    def fail(folder: Path) -> None:
        assert not list(folder.iterdir())
        raise FetchError("no")

    with pytest.raises(FetchError):
        made_once(tmp_path / "made", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]
    made_once(tmp_path / "made", lambda folder: (folder / "x").touch())
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["x"]
