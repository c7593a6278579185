"""What servers find of the user's cache. Real ones are started by the tests in tests/server."""

from pathlib import Path

import pytest

from benchmarks.harness import servers
from benchmarks.harness.arms import Arm
from benchmarks.harness.servers import own_cache, serving
from cast_sglang.config import user_cache_dir


@pytest.fixture
def users(tmp_path, monkeypatch) -> Path:
    """The user's cache: a profile, something learned, and what another package keeps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    users = user_cache_dir()
    for name in ("profiles/p.json", "calibration/c.json", "../huggingface/model"):
        (users / name).parent.mkdir(parents=True, exist_ok=True)
        (users / name).write_text(name)
    return users


def test_a_server_finds_profiles_and_nothing_that_was_learned(users, tmp_path):
    with own_cache() as env:
        found = user_cache_dir(env)
        assert (found / "profiles/p.json").read_text() == "profiles/p.json"
        assert [path.name for path in found.iterdir()] == ["profiles"]
        assert (found.parent / "huggingface/model").is_file()
        (found / "learned").write_text("x")
    assert not found.parent.exists() and not (users / "learned").exists()
    # What was linked is still there.
    assert (users / "profiles/p.json").is_file() and (users / "../huggingface/model").is_file()

    with own_cache(tmp_path / "others") as env:
        found = user_cache_dir(env) / "profiles"
        assert list(found.iterdir()) == []
        (found / "q.json").write_text("measured")
    assert (tmp_path / "others/q.json").is_file() and not (users / "profiles/q.json").exists()


def test_a_user_without_a_cache_has_one_that_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with own_cache() as env:
        assert list(user_cache_dir(env).iterdir()) == []
    assert not (tmp_path / "cache").exists()


def test_every_server_has_a_cache_of_its_own(users, tmp_path, monkeypatch):
    made: list[dict[str, str]] = []

    class FakeServer:
        def __init__(self, name, flags, log_dir, env):
            made.append(env)

        def launch(self): ...
        def wait_until_ready(self): ...
        def stop(self):
            assert Path(made[0]["XDG_CACHE_HOME"]).is_dir()

    monkeypatch.setattr(servers, "Server", FakeServer)
    with serving([Arm("a", "cast"), Arm("b", "cast")], "model", tmp_path):
        caches = [Path(env["XDG_CACHE_HOME"]) for env in made]
        assert len(set(caches)) == 2 and all(cache.is_dir() for cache in caches)
    assert not any(cache.exists() for cache in caches)
