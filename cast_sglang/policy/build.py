"""The one place where a policy is made by its name."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import NamedTuple

from cast_sglang.config import POLICIES, CastConfig
from cast_sglang.errors import ConfigError
from cast_sglang.policy.base import TreePolicy

__all__ = ["PolicySettings", "build_policy"]

_DEFAULTS = CastConfig()


class PolicySettings(NamedTuple):
    """What a policy may be made from; its constructor takes what it needs by these names."""

    verify_sizes: tuple[int, ...]  # ascending sizes that verify may have, root included
    max_layers: int  # D, layers a tree may grow to
    num_draft_tokens: int  # N, the most nodes verified per request, root included
    extends_by_accepted: bool  # draft extend runs the accepted rows, not as many as layers
    c1: float = _DEFAULTS.c1  # these four of `fixed`
    c2: float = _DEFAULTS.c2
    c3: float = _DEFAULTS.c3
    r: int = _DEFAULTS.r


def build_policy(name: str, settings: PolicySettings) -> TreePolicy:
    """Build a policy.

    Args:
        name: one of `POLICIES`.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy {name}: expected {' | '.join(POLICIES)}")
    module, _, class_name = POLICIES[name].partition(".")
    policy = getattr(import_module(f"cast_sglang.policy.{module}"), class_name)
    taken = inspect.signature(policy).parameters
    return policy(**{key: value for key, value in settings._asdict().items() if key in taken})
