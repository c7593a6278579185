"""The list of SGLang's symbols is what the package uses now; another SGLang is seen to differ."""

import os
import subprocess

import pytest

from benchmarks.harness.pairs import ROOT
from cast_sglang.serving.launch.host_contract import HostSource, host_source, read_contract
from scripts import host_contract

CONTRACT = host_contract.CONTRACT


def test_the_list_is_complete():
    """When this fails, write it anew: python -m scripts.host_contract --write."""
    assert host_contract.collect(host_source()) == read_contract()


def test_a_symbol_that_is_not_there_is_named(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="is not in this SGLang"):
        host_contract.collect(HostSource(tmp_path))


def test_it_checks_and_writes(tmp_path, monkeypatch, capsys):
    assert host_contract.main([]) == 0
    count = len(read_contract())
    assert f"{count} of {count} symbols as expected" in capsys.readouterr().out
    written = tmp_path / "contract.txt"
    monkeypatch.setattr(host_contract, "CONTRACT", written)
    assert host_contract.main(["--write"]) == 0
    assert written.read_bytes() == CONTRACT.read_bytes()
    monkeypatch.setattr(host_contract, "read_contract", lambda: {"sglang.no.such.thing": "()"})
    assert host_contract.main([]) == 1
    captured = capsys.readouterr()
    assert "sglang.no.such.thing is not there" in captured.err
    assert "0 of 1 symbols" in captured.out


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_check_host_says_how_it_is_used(arguments):
    done = subprocess.run(
        [str(ROOT / "scripts" / "check_host"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and "scripts/check_host VERSION" in done.stderr


def test_check_host_installs_beside_this_environment(tmp_path):
    """With stand-ins for uv and Python: what is installed comes first on the path."""
    for name in ("python", "uv"):
        (tmp_path / name).write_text(
            '#!/bin/bash\necho "$@ PATH=$PYTHONPATH" >> "$(dirname "$0")/calls"\n'
            '[[ "$*" != *scripts.host_contract* ]]\n'
        )
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "scripts" / "check_host"), "9.9.9", str(tmp_path / "host")],
        env={"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and "sglang==9.9.9" in calls[0] and "--no-deps" in calls[0]
    assert all(f"PATH={tmp_path / 'host'}:" in call for call in calls[1:])
    assert "tests/server/test_server_lossless.py" in calls[2]
    assert done.returncode == 1  # a broken contract fails, though the servers' tests are run
