"""What a command puts into the environment of its engine is gone afterwards."""

import os

import pytest

from cast_sglang.serving.launch.engine import environment


def test_variables_are_put_back(monkeypatch):
    monkeypatch.setenv("CAST_PROFILE", "mine")
    monkeypatch.setenv("CAST_POLICY", "auto")
    monkeypatch.delenv("CAST_C1", raising=False)
    with (
        pytest.raises(RuntimeError),
        environment(CAST_PROFILE="theirs", CAST_POLICY=None, CAST_C1=None),
    ):
        assert (os.environ["CAST_PROFILE"], os.environ["CAST_POLICY"]) == ("theirs", "auto")
        os.environ["CAST_POLICY"] = "eagle"
        os.environ["CAST_C1"] = "2"  # as flags do that are parsed meanwhile
        raise RuntimeError
    assert (os.environ["CAST_PROFILE"], os.environ["CAST_POLICY"]) == ("mine", "auto")
    assert "CAST_C1" not in os.environ
