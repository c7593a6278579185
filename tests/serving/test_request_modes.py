"""Request modes: what is understood, what is refused and how, what they weigh."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cast_sglang.errors import ConfigError
from cast_sglang.serving.request_modes import (
    LATENCY,
    LATENCY_WEIGHT,
    MODES,
    OFF,
    THROUGHPUT,
    mode_weights,
    parse_mode,
    parse_pool,
)
from tests.support.request_modes import BAD_CUSTOM_PARAMS, BAD_MODES

NO_MODES = [None, {}, {"cast": None}, {"thinking_budget": 7}]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_read(mode):
    assert parse_mode({"cast": mode}) == mode
    assert parse_mode({"thinking_budget": 7, "cast": mode}) == mode


@pytest.mark.parametrize("custom_params", NO_MODES, ids=repr)
def test_no_mode_means_throughput(custom_params):
    assert parse_mode(custom_params) == THROUGHPUT


@pytest.mark.parametrize("value", BAD_MODES, ids=repr)
def test_a_bad_mode_is_refused_by_name(value):
    with pytest.raises(ConfigError) as caught:
        parse_mode({"cast": value})
    assert str(caught.value) == f"custom_params.cast={value!r}: must be off | latency | throughput"


@pytest.mark.parametrize("custom_params", BAD_CUSTOM_PARAMS, ids=repr)
def test_custom_parameters_of_another_type_are_refused(custom_params):
    with pytest.raises(ConfigError, match=r"^custom_params=.*: must be an object"):
        parse_mode(custom_params)


@pytest.mark.parametrize("name", ["a", "x" * 100_000, "\ud800", "\n", "0"], ids=len)
def test_a_pool_has_any_name(name):
    assert parse_pool({"cast_pool": name, "cast": "off"}) == name
    assert (
        parse_pool({"cast": "off"}) is parse_pool(None) is parse_pool({"cast_pool": None}) is None
    )


@pytest.mark.parametrize("value", [1, 0, True, "", [], ["a"], {"id": "a"}, 1.5, b"a"], ids=repr)
def test_a_pool_of_another_type_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^custom_params\.cast_pool=.*: must be a string"):
        parse_pool({"cast_pool": value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON | st.dictionaries(st.sampled_from(["cast", "cast_pool"]), JSON))
def test_anything_is_a_mode_or_one_short_line(custom_params):
    for parse in (parse_mode, parse_pool):
        try:
            found = parse(custom_params)
            assert (
                found in MODES if parse is parse_mode else found is None or isinstance(found, str)
            )
        except ConfigError as error:
            assert len(str(error)) < 160 and len(str(error).splitlines()) == 1


def test_a_mode_of_any_depth_is_refused():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ConfigError):
        parse_mode({"cast": nested})
    while nested:  # freed level by level
        nested = nested.pop()


def test_weights():
    off, throughput, latency = mode_weights([OFF, THROUGHPUT, LATENCY])
    assert off == 0.0 and latency == LATENCY_WEIGHT * throughput
    assert throughput + latency == 2.0  # one each in the mean of those that want drafts
    for mode in (THROUGHPUT, LATENCY):
        assert mode_weights([mode, OFF, mode]) == [1.0, 0.0, 1.0]
    assert mode_weights([OFF]) == [0.0] and mode_weights([]) == []
    assert LATENCY_WEIGHT == 4.0
