"""The file of a trace: what is written is read back, and a bad file says what is wrong with it."""

import json
import logging
from pathlib import Path

import pytest

from cast_sglang.errors import TraceError
from cast_sglang.trace.file import TraceWriter, read_trace
from tests.support.traces import Recorder, default_policy, make_header, make_tables, write


@pytest.fixture(scope="module")
def trace():
    return Recorder(default_policy(), make_tables()).run(20)


def test_round_trip(trace, tmp_path):
    found = read_trace(write(trace, tmp_path / "deep" / "t.jsonl"))
    assert found.header == trace.header
    assert found.steps == trace.steps
    assert found.notes == []


def test_no_text_and_no_paths(trace, tmp_path):
    path = write(trace, tmp_path / "t.jsonl")
    header = json.loads(path.read_text().splitlines()[0])
    assert not {"profile", "trace", "calibration_file"} & header["settings"].keys()
    assert str(tmp_path) not in path.read_text()


def test_a_cut_last_line_is_left_out(trace, tmp_path):
    path = write(trace, tmp_path / "t.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    found = read_trace(path)
    assert found.steps == trace.steps[:-1]
    assert found.notes == ["line 21 was cut short and is left out"]


def test_damage_before_the_end_is_an_error(trace, tmp_path):
    path = write(trace, tmp_path / "t.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[5] = lines[5][:-40] + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(TraceError, match="line 6 is damaged"):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"probs": ""}, "expected .* candidates"),
        ({"follows": [100_000]}, "candidate that does not exist"),
        ({"accepted": [-1]}, "candidate that does not exist"),
        ({"target_probs": "AAAA"}, "target probabilities"),
        ({"probs": 3}, "Expected `bytes`"),
        ({"probs": "?"}, "base64"),
    ],
)
def test_records_that_do_not_fit_are_errors(trace, tmp_path, change, reason):
    path = write(trace, tmp_path / "t.jsonl")
    lines = path.read_text().splitlines()
    step = json.loads(lines[3])
    step["requests"][0].update(change)
    lines[3] = json.dumps(step)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=f"line 4 is damaged: .*{reason}") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no trace"),
        (b"\x00\xff\xfe\n", "no trace"),
        (b'{"a": 1}\n', "no trace: its first line is no header"),
        (b'{"format": "other", "version": 1}\n', "its format is 'other'"),
        (b'{"format": "cast-sglang trace", "version": 99}\n', "of version 99; .*reads version 1"),
        (b'{"format": "cast-sglang trace", "version": 1}\n', "header: .*required field"),
        (b"[" * 100_000, "no trace"),
    ],
)
def test_foreign_files(tmp_path, content, reason):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=reason):
        read_trace(path)


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(TraceError, match="cannot be read"):
            read_trace(path)


def test_the_file_stays_below_its_bound(trace, tmp_path, caplog):
    whole = write(trace, tmp_path / "whole.jsonl").stat().st_size
    with caplog.at_level(logging.INFO):
        path = write(trace, tmp_path / "t.jsonl", max_bytes=whole // 2)
    assert path.stat().st_size <= whole // 2
    found = read_trace(path)
    assert 0 < len(found.steps) < len(trace.steps)
    assert found.steps == trace.steps[: len(found.steps)]
    assert [r.message for r in caplog.records] == [
        f"CAST: --cast-trace {path}: --cast-trace-mb is reached"
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_once(trace, caplog):
    writer = TraceWriter(Path("/dev/full"), 1 << 20, trace.header)
    for step in trace.steps:
        writer.write(step)
    assert not writer.is_open
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_a_directory_that_cannot_be_made_is_said_once(trace, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    writer = TraceWriter(tmp_path / "file" / "t.jsonl", 1 << 20, trace.header)
    writer.write(trace.steps[0])
    assert not writer.is_open and len(caplog.records) == 1


def test_an_older_trace_is_kept(trace, tmp_path):
    path = write(trace, tmp_path / "t.jsonl")
    before = path.read_bytes()
    TraceWriter(path, 1 << 20, make_header(None)).close()
    assert (tmp_path / "t.jsonl.old").read_bytes() == before
    assert read_trace(path).steps == []
