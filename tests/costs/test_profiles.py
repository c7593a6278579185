"""Profiles on disk: round trip, search, "measured elsewhere?", and every kind of damage."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cast_sglang.costs import profiles
from cast_sglang.costs.profiles import (
    config_hash,
    describe_error,
    find_profile,
    load_profile,
    profile_filename,
    save_profile,
    user_profile_path,
)
from cast_sglang.costs.schema import (
    NO_DRAFT,
    Heldout,
    ModelIdentity,
    ServingRecord,
    validate_profile,
)
from cast_sglang.errors import MissingProfileError, ProfileError
from tests.support.builders import (
    make_draftless_profile,
    make_identity,
    make_profile,
    make_table,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(make_profile(), path)
    return path


def fails_with_one_line(path, *expected):
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for text in expected:
        assert text in message


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_round_trip(saved):
    assert load_profile(saved) == make_profile()
    # What a person looks for comes first, and a row of numbers is one line.
    text = saved.read_text()
    assert text.startswith('{\n "schema_version": 1,\n "provenance"')
    assert '"token_counts": [1, 2, 4, 8],' in text
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_save_is_atomic(saved, monkeypatch):
    before = saved.read_bytes()

    def no_replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(ProfileError, match="No space left"):
        save_profile(make_profile(step_overhead_us=None), saved)
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


WRITER = """
import os, sys
from pathlib import Path
from cast_sglang.costs.profiles import write_atomically
os.getpid = lambda: 1
for _ in range(300):
    write_atomically(Path(sys.argv[1]), sys.argv[2].encode() * 100_000, sync=False)
"""


def test_servers_in_two_containers_may_write_one_file(tmp_path):
    """Their process ids are often the same."""
    path = tmp_path / "shared" / "learned.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {b"a" * 100_000, b"b" * 100_000} and seen
    assert list(path.parent.iterdir()) == [path]


def test_save_refuses_what_load_would(tmp_path):
    bad = make_profile(step_overhead_us=[1.0])
    with pytest.raises(ProfileError, match="step_overhead_us"):
        save_profile(bad, tmp_path / "bad.json")
    assert not (tmp_path / "bad.json").exists()


def test_profiles_of_earlier_releases_hold_one_more_table(saved):
    """Their table of plain decoding is kept, as their digest covers it, and not asked for."""
    assert "plain" not in json.loads(saved.read_text())
    old = make_profile(plain=make_table(base_us=900.0, token_counts=(1,)))
    save_profile(old, saved)
    assert load_profile(saved) == old
    damaged = old.plain.time_us[0].pop()
    assert len(damaged) == 1
    with pytest.raises(ProfileError, match="plain.time_us"):
        save_profile(old, saved)


def test_repository_profiles_are_valid():
    for path in (REPOSITORY / "profiles").glob("*.json"):
        load_profile(path)


# Damage


def test_truncation_at_every_byte(saved):
    tiny = make_table(batch_sizes=(1,), contexts=(128,), token_counts=(1,))
    tables = {"target": tiny, "draft": tiny, "draft_extend": tiny}
    save_profile(make_profile(**tables, step_overhead_us=None), saved)
    data = saved.read_bytes()
    for length in range(len(data.rstrip())):
        saved.write_bytes(data[:length])
        fails_with_one_line(saved)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_is_valid_or_a_profile_error(saved, data):
    original = msgspec.json.encode(make_profile())
    position = data.draw(st.integers(0, len(original) - 1))
    replacement = data.draw(st.binary(max_size=3))
    saved.write_bytes(original[:position] + replacement + original[position + 1 :])
    try:
        load_profile(saved)
    except ProfileError as error:
        assert "\n" not in str(error)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_replaced_value_is_valid_or_a_profile_error(saved, data):
    content = msgspec.to_builtins(make_profile())
    parent, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        keys = sorted(parent) if isinstance(parent, dict) else range(len(parent))
        key = data.draw(st.sampled_from(list(keys)))
    parent[key] = data.draw(junk)
    saved.write_text(json.dumps(content))
    try:
        profile = load_profile(saved)
    except ProfileError as error:
        assert "\n" not in str(error)
    else:
        validate_profile(profile)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1.0", "0", "1e10"])
def test_impossible_times(saved, value):
    first = repr(make_profile().target.time_us[0][0][0])
    saved.write_text(saved.read_text().replace(first, value, 1))
    fails_with_one_line(saved)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["target"].update(token_counts=[2, 1, 4, 8]), "target.token_counts"),
        (lambda c: c["target"].update(token_counts=[1, 2, 4, 8.5]), "target.token_counts"),
        (lambda c: c["target"].update(contexts=[128, 10**30]), ""),
        (lambda c: c["draft"]["time_us"][0].pop(), "draft.time_us"),
        (lambda c: c["draft"]["time_us"][0][0].__setitem__(0, "1"), "draft.time_us"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c["target"].update(extra=1), "extra"),
        (lambda c: c.pop("target"), "target"),
        (lambda c: c.pop("schema_version"), "schema_version"),
        (lambda c: c.update(schema_version=0), "schema_version 0 is unknown; this release reads 1"),
        (lambda c: c.update(schema_version=2), "schema_version 2 is unknown; this release reads 1"),
        (lambda c: c.update(schema_version="1"), "schema_version"),
    ],
)
def test_bad_content_is_named(saved, change, expected):
    rewrite(saved, change)
    fails_with_one_line(saved, expected)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 99])
def test_not_a_profile(saved, data):
    saved.write_bytes(data)
    fails_with_one_line(saved)


def test_not_a_file(tmp_path):
    fails_with_one_line(tmp_path / "missing.json", "no such file")
    fails_with_one_line(tmp_path, "not a file")


def test_too_large(tmp_path):
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(profiles.MAX_FILE_BYTES + 1)
    fails_with_one_line(path, "64 MiB")


# Identity


def warnings_on(here, path, **options):
    return find_profile(here, str(path), **options).warnings


def test_same_host_has_no_warnings(saved):
    assert warnings_on(make_identity(), saved) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device_name": "NVIDIA A800"}, "device_name NVIDIA H200, here NVIDIA A800"),
        ({"dtype": "float16"}, "dtype bfloat16, here float16"),
        ({"tp_size": 2}, "tp_size 1, here 2"),
        ({"quantization": "fp8"}, "quantization None, here fp8"),
        (
            {"draft": ModelIdentity(name="o/Other", config_hash="c" * 64, architectures=[])},
            "draft model org/Draft (bbbbbbbbbbbb), here o/Other (cccccccccccc)",
        ),
    ],
)
def test_foreign_profile_is_refused_with_the_command_to_run(saved, change, expected):
    here = make_identity(**change)
    with pytest.raises(ProfileError) as caught:
        warnings_on(here, saved)
    message = str(caught.value)
    assert expected in message and "\n" not in message
    assert "measure this host with: cast-sglang profile, with the flags" in message
    assert "CAST_ALLOW_FOREIGN_PROFILE=1" in message
    with pytest.raises(ProfileError, match="this host with: COMMAND "):
        warnings_on(here, saved, command="COMMAND")
    [warning] = warnings_on(here, saved, allow_foreign=True)
    assert expected in warning


@pytest.mark.parametrize(
    "change",
    [
        {"device_memory_bytes": 1 << 30},
        {"clock_mhz": 1755},
        {"attention_backend": "fa3"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"cuda_graph": False},
        {"page_size": 16},
        {"overlap": False},
        {"versions": {"sglang": "0.5.24", "torch": "2.11.0"}},
    ],
)
def test_lesser_differences_warn(saved, change):
    [warning] = warnings_on(make_identity(**change), saved)
    assert "another" in warning and "\n" not in warning


def test_irrelevant_differences_are_silent(saved):
    here = make_identity(
        driver="1", runtime="2", overlap=None, versions={"python": "3.11", "new": "1"}
    )
    assert warnings_on(here, saved) == []


def test_a_renamed_model_is_the_same_model(saved):
    target = ModelIdentity(name="local-copy", config_hash="a" * 64, architectures=["Llama"])
    assert warnings_on(make_identity(target=target), saved) == []


def test_config_hash_keeps_the_architecture_only():
    config = {"hidden_size": 64, "rope": {"theta": 1e4, "_note": 1}, "architectures": ["A"]}
    noise = {"_name_or_path": "x", "transformers_version": "5", "torch_dtype": "float16"}
    same = {"architectures": ["A"], "rope": {"theta": 1e4}, **noise, "hidden_size": 64}
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash({**config, "hidden_size": 65})
    assert config_hash(config) != config_hash({**config, "rope": {"theta": 1e5}})
    # Objects that JSON does not know must not make it fail.
    assert len(config_hash({"path": Path("x"), "nan": math.nan})) == 64


def test_filename():
    here = make_identity(target=ModelIdentity(name="/m/A B/", config_hash="", architectures=[]))
    assert profile_filename(here) == "nvidia-h200__a-b__draft__tp1__bfloat16.json"
    quantized = make_identity(quantization="fp8", tp_size=4)
    assert profile_filename(quantized) == "nvidia-h200__target-8b__draft__tp4__bfloat16-fp8.json"
    hostile = make_identity(device_name="../../etc")
    assert "/" not in profile_filename(hostile) and not profile_filename(hostile).startswith(".")


# Search


def test_explicit_path(saved):
    found = find_profile(make_identity(), str(saved), command="COMMAND")
    assert found == (make_profile(), saved, [], "COMMAND")
    with pytest.raises(ProfileError, match="measured elsewhere"):
        find_profile(make_identity(dtype="float16"), str(saved))
    assert len(find_profile(make_identity(dtype="f16"), str(saved), allow_foreign=True)[2]) == 1


def test_search_prefers_the_best_match_in_the_first_directory(tmp_path):
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    save_profile(make_profile(), shipped / "exact.json")
    save_profile(make_profile(make_identity(page_size=16)), own / "similar.json")
    save_profile(make_profile(make_identity(tp_size=2)), own / "foreign.json")
    directories = [own, tmp_path / "missing", shipped]

    assert find_profile(make_identity(), directories=directories).path.name == "exact.json"
    found = find_profile(make_identity(), directories=[own])
    assert found.path.name == "similar.json" and "page_size" in found.warnings[0]

    here = make_identity(device_name="B200")
    with pytest.raises(MissingProfileError, match=r"nearest, .*measured elsewhere: device_name"):
        find_profile(here, directories=directories)
    found = find_profile(here, allow_foreign=True, directories=directories)
    assert found.path.name == "exact.json" and len(found.warnings) == 1


def test_search_reports_damaged_files(tmp_path):
    (tmp_path / profile_filename(make_identity())).write_text("{")
    with pytest.raises(ProfileError, match="no cost profile for NVIDIA H200.*skipped profile"):
        find_profile(make_identity(), directories=[tmp_path])
    save_profile(make_profile(), tmp_path / "good.json")
    found = find_profile(make_identity(), directories=[tmp_path])
    assert found.path.name == "good.json" and "skipped" in found.warnings[0]


@pytest.mark.parametrize("name", ["exact", "similar"])
def test_what_is_found_carries_the_command_that_measures(tmp_path, name):
    here = make_identity() if name == "exact" else make_identity(page_size=16)
    save_profile(make_profile(), tmp_path / "p.json")
    found = find_profile(here, directories=[tmp_path], command="COMMAND")
    assert found.command == "COMMAND"
    assert find_profile(here, directories=[tmp_path]).command.startswith("cast-sglang profile,")


def test_default_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = make_identity(device_name="a device of the tests")
    save_profile(make_profile(here), user_profile_path(here))
    assert find_profile(here).path.is_relative_to(tmp_path)
    assert REPOSITORY / "profiles" in profiles.profile_directories()


def test_the_error_while_serving_is_told_first():
    profile = make_profile()
    assert describe_error(profile) == "error unknown: nothing was served or held out"
    heldout = Heldout(points=9, median_error=0.0123, p95_error=0.3)
    provenance = msgspec.structs.replace(profile.provenance, heldout=heldout)
    serving = ServingRecord(steps=320, median_ratio=1.5, median_error=0.33, p95_error=0.5)
    profile = msgspec.structs.replace(profile, provenance=provenance, serving=serving)
    assert describe_error(profile) == (
        "served steps took 1.50 times what they say, error median 33.0%, p95 50.0% (320 steps); "
        "single passes: error median 1.2%, p95 30.0% (9 held-out points)"
    )


def test_what_a_short_run_showed_is_kept(tmp_path):
    serving = ServingRecord(
        steps=3, median_ratio=1.5, median_error=0.3, p95_error=0.5, learned={"prices": [{"a": 1}]}
    )
    profile = msgspec.structs.replace(make_profile(), serving=serving)
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    save_profile(make_profile(), tmp_path / "q.json")
    assert "serving" not in json.loads((tmp_path / "q.json").read_text())


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"median_ratio": 0.0}, {"p95_error": -0.1}, {"median_error": math.nan}]
)
def test_what_no_run_shows_is_refused(tmp_path, bad):
    facts = {"steps": 3, "median_ratio": 1.5, "median_error": 0.3, "p95_error": 0.5, **bad}
    profile = msgspec.structs.replace(make_profile(), serving=ServingRecord(**facts))
    with pytest.raises(ProfileError, match="serving"):
        save_profile(profile, tmp_path / "p.json")


def test_a_profile_without_a_draft(tmp_path):
    """It comes back as it was, serves a server without a draft, and no other one, however asked."""
    path, bare = tmp_path / "bare.json", make_draftless_profile()
    save_profile(bare, path)
    assert "draft_extend" not in json.loads(path.read_text()) and load_profile(path) == bare
    draftless, pair = make_identity(draft=NO_DRAFT), make_identity()
    assert find_profile(draftless, directories=[tmp_path]).profile == bare
    for source in ("auto", str(path)):
        with pytest.raises(ProfileError, match="has no tables of a draft model"):
            find_profile(pair, source, allow_foreign=True, directories=[tmp_path])
    # The tables of a pair tell a server without the draft what verify takes, if it is let.
    save_profile(make_profile(), path)
    assert find_profile(draftless, str(path), allow_foreign=True).profile == make_profile()
    with pytest.raises(ProfileError, match="draft model org/Draft .*, here no draft"):
        find_profile(draftless, str(path))
