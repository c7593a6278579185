"""Every knob: defaults, precedence of sources, and one-line errors that name the source."""

import argparse
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.config import POLICIES, CastConfig, add_flags, given_flags, user_cache_dir
from cast_sglang.errors import ConfigError

FIELDS = [field.name for field in dataclasses.fields(CastConfig)]


def load(overrides=None, **environ):
    return CastConfig.load(overrides, environ)


def test_defaults():
    config = load()
    assert config == CastConfig()
    assert (config.c1, config.c2, config.c3, config.r) == (4.0, 3.0, 2.5, 16)
    assert config.verify_sizes is None and config.policy in POLICIES


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CastConfig().c1 = 1.0  # type: ignore[misc]


def test_text_of_the_environment_is_parsed():
    config = load(
        CAST_C1=" 1.5 ",
        CAST_R="3",
        CAST_VERIFY_SIZES="1, 2,8",
        CAST_LOOKUP="nearest",
        CAST_ALLOW_FOREIGN_PROFILE="1",
        CAST_PROFILE="some/file.json",
        CAST_CPU_THREADS="left to the CPU platform",
        PATH="/bin",
    )
    assert config == CastConfig(
        c1=1.5,
        r=3,
        verify_sizes=(1, 2, 8),
        lookup="nearest",
        allow_foreign_profile=True,
        profile="some/file.json",
    )


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_flag_beats_environment_beats_file_beats_default(tmp_path, suffix):
    settings = {"c1": 1, "c2": 1.5, "c3": 2, "verify_sizes": [2, 4]}
    file = tmp_path / f"cast.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(settings))
    else:
        file.write_text("\n".join(f"{key} = {value}" for key, value in settings.items()))
    config = load({"c1": "9", "c2": None}, CAST_CONFIG=str(file), CAST_C1="8", CAST_C2="7")
    assert (config.c1, config.c2, config.c3, config.r) == (9.0, 7.0, 2.0, 16)
    assert config.verify_sizes == (2, 4)
    # The flag also decides which file is read.
    assert load({"config": str(file)}, CAST_CONFIG="/nowhere.toml").c3 == 2.0


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("CAST_C1", "nan", "[0, 1e+06]"),
        ("CAST_C1", "inf", "finite"),
        ("CAST_C2", "-0.1", "[0, 1e+06]"),
        ("CAST_C3", "1000001", "[0, 1e+06]"),
        ("CAST_C3", "", "[0, 1e+06]"),
        ("CAST_R", "0", "[1, 4096]"),
        ("CAST_R", "4097", "[1, 4096]"),
        ("CAST_R", "2.5", "integer"),
        ("CAST_POLICY", "eagel", "fixed | eagle"),
        ("CAST_POLICY", "full-width", "replay --policy full-width"),
        ("CAST_POLICY", "optimal", "auto | fixed | eagle (full-width, once named optimal, "),
        ("CAST_LOOKUP", "cubic", "linear | nearest"),
        ("CAST_VERIFY_SIZES", "4,2", "ascending"),
        ("CAST_VERIFY_SIZES", "2,2", "ascending"),
        ("CAST_VERIFY_SIZES", "0,2", "ascending"),
        ("CAST_VERIFY_SIZES", ",", "ascending"),
        ("CAST_LOG_INTERVAL", "-1", "[0, 1e+09]"),
        ("CAST_ALLOW_FOREIGN_PROFILE", "maybe", "true"),
        ("CAST_TRACE_MB", "0", "[1, 1e+06]"),
        ("CAST_TRACE_TOKENS", "maybe", "true"),
        ("CAST_PROFILE", "", "non-empty"),
    ],
)
def test_bad_value_names_source_value_and_range(variable, value, expected):
    key = variable.removeprefix("CAST_").lower()
    flag = f"--cast-{key.replace('_', '-')}"
    for sources, name in [((None, {variable: value}), variable), (({key: value}, {}), flag)]:
        with pytest.raises(ConfigError) as caught:
            CastConfig.load(*sources)
        message = str(caught.value)
        assert name in message and repr(value) in message and expected in message
        assert "\n" not in message


def test_a_full_trace_needs_a_file():
    with pytest.raises(ConfigError, match="--cast-trace FILE"):
        load(CAST_TRACE_FULL="1")
    assert load(CAST_TRACE_FULL="1", CAST_TRACE="t.jsonl").trace_full


def test_constructor_checks_too():
    for bad in ({"c1": float("nan")}, {"r": True}, {"c2": "x"}, {"verify_sizes": (3, 1)}):
        with pytest.raises(ConfigError):
            CastConfig(**bad)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (
            (None, {"CAST_PROFIL": "x"}),
            "environment CAST_PROFIL='x': unknown setting; did you mean CAST_PROFILE?",
        ),
        (
            ({"log_intervall": 1}, {}),
            "flag --cast-log-intervall=1: unknown setting; did you mean --cast-log-interval?",
        ),
    ],
)
def test_unknown_setting_suggests_the_nearest(sources, expected):
    with pytest.raises(ConfigError) as caught:
        CastConfig.load(*sources)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.toml", "c1 = [", "not valid TOML"),
        ("a.json", '{"c1": ', "not valid JSON"),
        ("a.json", "[1, 2]", "expected a table"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '{"c1": NaN}', "a.json:c1=nan"),
        ("a.json", '{"c1": true}', "a.json:c1=True"),
        ("a.json", '{"r": 1.0}', "a.json:r=1.0"),
        ("a.json", '{"profile": 5}', "a.json:profile=5"),
        ("a.toml", "verify_sizes = [2, 'x']", "a.toml:verify_sizes"),
        ("a.toml", "c9 = 1", "a.toml:c9=1: unknown setting"),
        ("a.toml", "[cast]\nc1 = 1", "a.toml:cast"),
        ("a.yaml", "c1: 1", ".toml or .json"),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, content, expected):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load(CAST_CONFIG=str(file))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.toml", tmp_path, binary, ""):
        with pytest.raises(ConfigError):
            load(CAST_CONFIG=str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.sampled_from(FIELDS), json_values)
def test_any_value_is_accepted_or_a_config_error(key, value):
    try:
        config = CastConfig.load({key: value}, {})
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        # What was accepted is a fixed point: checking it again changes nothing.
        assert CastConfig(**{key: getattr(config, key)}) == config


def test_every_setting_is_a_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parsed = parser.parse_args(["--cast-c1", "2", "--cast-allow-foreign-profile"])
    assert load(given_flags(parsed)) == CastConfig(c1=2.0, allow_foreign_profile=True)
    nothing = given_flags(parser.parse_args([]))
    assert list(nothing) == ["config", *FIELDS] and set(nothing.values()) == {None}
    parser.format_help()


def test_user_cache_dir(tmp_path):
    assert user_cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "cast_sglang"
    assert user_cache_dir({"XDG_CACHE_HOME": "relative"}).parent.name == ".cache"
