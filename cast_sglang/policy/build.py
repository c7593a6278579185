"""The one place where a policy is made by its name."""

from __future__ import annotations

from typing import NamedTuple

from cast_sglang.config import CastConfig
from cast_sglang.errors import ConfigError
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.fixed import EaglePolicy, FixedPolicy
from cast_sglang.policy.full_width import FullWidthPolicy

__all__ = ["POLICY_NAMES", "Thresholds", "build_policy"]

# Those of `CastConfig`, and one that is for replay alone.
POLICY_NAMES = ("auto", "fixed", "eagle", "full-width")


class Thresholds(NamedTuple):
    """Prices and memory of policy `fixed`."""

    c1: float = CastConfig.c1
    c2: float = CastConfig.c2
    c3: float = CastConfig.c3
    r: int = CastConfig.r


def build_policy(
    name: str,
    *,
    verify_sizes: tuple[int, ...],
    max_layers: int,
    max_verify_rows: int,
    extends_by_accepted: bool,
    thresholds: Thresholds | None = None,
) -> TreePolicy:
    """Build a policy.

    Args:
        verify_sizes: ascending sizes that verify may have, root included.
        max_layers: D, layers a tree may grow to.
        max_verify_rows: N, the most rows verified per request, root included.
        extends_by_accepted: draft extend runs the accepted rows of each request, not as many as
            the tree is deep.
        thresholds: of `fixed`; None for the defaults.

    Raises:
        ConfigError: there is no such policy.
    """
    if name == "eagle":
        return EaglePolicy(max_verify_rows)
    if name == "fixed":
        values = thresholds or Thresholds()
        return FixedPolicy(values.c1, values.c2, values.c3, values.r, verify_sizes)
    if name == "auto":
        return AutoPolicy(verify_sizes, max_layers, extends_by_accepted)
    if name == "full-width":
        return FullWidthPolicy(verify_sizes, max_layers, extends_by_accepted)
    raise ConfigError(f"policy {name}: expected {' | '.join(POLICY_NAMES)}")
