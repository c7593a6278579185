"""A trace and a profile together: which profiles may replay a trace, and what is said of them."""

import json

import msgspec
import pytest
from rich.console import Console

from cast_sglang.costs.profiles import save_profile
from cast_sglang.errors import ConfigError, MissingProfileError, TraceError
from cast_sglang.trace.replay import make_policy
from cast_sglang.trace.session import open_session
from tests.support.builders import make_table
from tests.support.traces import (
    SETTINGS,
    Recorder,
    default_policy,
    make_header,
    make_tables,
    write,
)


@pytest.fixture(scope="module")
def tables():
    return make_tables()


@pytest.fixture(scope="module")
def files(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    save_profile(tables, folder / "p.json")
    return write(Recorder(default_policy(), tables).run(30), folder / "t.jsonl"), folder / "p.json"


def opened(files, **changes):
    options = {"allow_foreign": False, "corrects": True, "seed": 0, **changes}
    return open_session(files[0], str(files[1]), **options)


def test_the_recorded_policy_is_a_prediction(files):
    result = opened(files).replay(None, {})
    assert result.policy == "auto" and result.is_prediction
    assert not opened(files).replay("eagle", {}).is_prediction


def test_another_device_is_told(files, tables, tmp_path, capsys):
    provenance = msgspec.structs.replace(tables.provenance, device_name="B200")
    target = msgspec.structs.replace(tables.target, contexts=[128, 2048])
    save_profile(
        msgspec.structs.replace(tables, provenance=provenance, target=target),
        tmp_path / "b200.json",
    )
    session = opened((files[0], tmp_path / "b200.json"))
    assert not session.corrects
    result = session.replay(None, {})
    assert not result.is_prediction
    result.print(Console())
    out = capsys.readouterr().out
    assert "All predicted times are those of B200" in out and "off the measured one" not in out


def test_another_pair_needs_a_word(files, tables, tmp_path):
    other = msgspec.structs.replace(tables.provenance.draft, config_hash="c" * 64)
    provenance = msgspec.structs.replace(tables.provenance, draft=other)
    profile = msgspec.structs.replace(
        tables, provenance=provenance, step_overhead_us=[1.0, 1.0, 1.0]
    )
    save_profile(profile, tmp_path / "other.json")
    with pytest.raises(TraceError, match="draft model is .* --allow-foreign"):
        opened((files[0], tmp_path / "other.json"))
    assert opened((files[0], tmp_path / "other.json"), allow_foreign=True).notes


def test_a_grid_that_is_too_small_is_refused(files, tables, tmp_path):
    small = msgspec.structs.replace(tables, target=make_table(token_counts=(1, 2, 4)))
    save_profile(msgspec.structs.replace(small, step_overhead_us=None), tmp_path / "s.json")
    with pytest.raises(TraceError, match="target.token_counts ends at 4.*goes to 32"):
        opened((files[0], tmp_path / "s.json"))


def test_a_grid_that_ends_a_little_early_is_noted(files, tables, tmp_path):
    small = make_table(100.0, batch_sizes=(1, 4), token_counts=(1, 2, 4))
    save_profile(msgspec.structs.replace(tables, draft=small), tmp_path / "s.json")
    [note] = opened((files[0], tmp_path / "s.json")).notes
    assert note == "the profile's grid draft.token_counts ends at 4; beyond it is continued"


def test_thresholds(files):
    session = opened(files)
    high = session.replay("fixed", {"c1": 20.0, "c2": 20.0, "c3": 20.0})
    low = session.replay("fixed", {"c1": 0.5, "c2": 0.5, "c3": 0.5})
    assert high.rows[0].replayed.rows < low.rows[0].replayed.rows
    with pytest.raises(ConfigError, match="--c1: policy auto has no thresholds"):
        session.replay("auto", {"c1": 1.0})
    with pytest.raises(ConfigError, match="c2=-1.0: must be"):
        session.replay("fixed", {"c2": -1.0})


def test_thresholds_of_the_recording_are_a_prediction(tables, tmp_path):
    header = make_header(tables, settings={**SETTINGS, "policy": "fixed"})
    trace = Recorder(make_policy("fixed", header), tables).run(10)._replace(header=header)
    save_profile(tables, tmp_path / "p.json")
    session = opened((write(trace, tmp_path / "t.jsonl"), tmp_path / "p.json"))
    for given, same in (({}, True), ({"c1": SETTINGS["c1"]}, True), ({"c1": 9.0}, False)):
        assert session.replay(None, given).is_prediction == same


def test_the_result_is_plain_data_with_its_origin(files):
    session = opened(files)._replace(notes=["a note"])
    result = session.replay("fixed", {"r": 3})
    found = json.loads(json.dumps(result.as_dict()))
    assert found["recorded"]["policy"] == "auto" and found["policy"] == "fixed"
    assert found["thresholds"] == {"r": 3} and found["notes"] == ["a note"]
    assert found["tables"] == {"device_name": "made up", "estimated": False}
    assert found["corrected"] and not found["is_prediction"]
    assert found["rows"][0]["replayed"]["rows"] == pytest.approx(result.rows[0].replayed.rows)


def test_no_profile_of_this_host(files, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingProfileError, match="name one with --profile, or measure"):
        opened((files[0], "auto"))
