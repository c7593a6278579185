"""The one place where a policy is made by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cast_sglang.config import REPLAYED_POLICIES, CastConfig
from cast_sglang.errors import ConfigError
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.fixed import EaglePolicy, FixedPolicy
from cast_sglang.policy.full_width import FullWidthPolicy

__all__ = ["PolicySettings", "build_policy"]


_DEFAULTS = CastConfig()


class PolicySettings(NamedTuple):
    """What a policy may be made from."""

    verify_sizes: tuple[int, ...]  # ascending sizes that verify may have, root included
    max_layers: int  # D, layers a tree may grow to
    max_verify_rows: int  # N, the most rows verified per request, root included
    extends_by_accepted: bool  # draft extend runs the accepted rows, not as many as layers
    c1: float = _DEFAULTS.c1  # these four of `fixed`
    c2: float = _DEFAULTS.c2
    c3: float = _DEFAULTS.c3
    r: int = _DEFAULTS.r


_BUILDERS: dict[str, Callable[[PolicySettings], TreePolicy]] = {
    "auto": lambda s: AutoPolicy(s.verify_sizes, s.max_layers, s.extends_by_accepted),
    "fixed": lambda s: FixedPolicy(s.c1, s.c2, s.c3, s.r, s.verify_sizes),
    "eagle": lambda s: EaglePolicy(s.max_verify_rows),
    "full-width": lambda s: FullWidthPolicy(s.verify_sizes, s.max_layers, s.extends_by_accepted),
}
assert tuple(_BUILDERS) == REPLAYED_POLICIES, "every policy is made here and named in config.py"


def build_policy(name: str, settings: PolicySettings) -> TreePolicy:
    """Build a policy.

    Args:
        name: one of `REPLAYED_POLICIES`.

    Raises:
        ConfigError: there is no such policy.
    """
    if name not in _BUILDERS:
        raise ConfigError(f"policy {name}: expected {' | '.join(_BUILDERS)}")
    return _BUILDERS[name](settings)
