"""Policies are made in one place, by their names."""

import pytest

from cast_sglang.config import POLICIES, CastConfig
from cast_sglang.errors import ConfigError
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.build import PolicySettings, build_policy
from cast_sglang.policy.fixed import EaglePolicy, FixedPolicy

SETTINGS = PolicySettings((2, 5, 9), max_layers=4, num_draft_tokens=9, extends_by_accepted=False)


def test_every_name_has_a_policy():
    made = {name: type(build_policy(name, SETTINGS)) for name in POLICIES}
    assert made == {"auto": AutoPolicy, "fixed": FixedPolicy, "eagle": EaglePolicy}


def test_the_thresholds_are_those_of_the_settings():
    default = build_policy("fixed", SETTINGS)
    config = CastConfig()
    assert (default.c1, default.c2, default.c3) == (config.c1, config.c2, config.c3)
    chosen = build_policy("fixed", SETTINGS._replace(c1=1.5, c2=0.5, c3=7.0, r=3))
    assert (chosen.c1, chosen.c2, chosen.c3) == (1.5, 0.5, 7.0)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="best.*auto.*eagle"):
        build_policy("best", SETTINGS)
