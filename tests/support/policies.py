"""Made-up costs, and policies that have found their price."""

from types import SimpleNamespace

import numpy as np

from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.lookahead import HALF_LIFE


def costs(verify=None, draft=None, extend=None) -> SimpleNamespace:
    return SimpleNamespace(
        verify=np.array(verify if verify else [1.0] * 8, np.float32),
        draft=np.array(draft if draft else [0.1] * 4, np.float32),
        draft_extend=np.array(extend if extend else [0.0], np.float32),
        overhead=0.0,
        plain_overhead=0.0,
        unit_us=1000.0,
    )


def priced(policy: AutoPolicy, price: float, batch_size: int = 1) -> AutoPolicy:
    """Let the policy see steps of this rate until nothing else counts."""
    for _ in range(40 * HALF_LIFE):
        policy.observe(batch_size, price - 1.0, 1.0)
    return policy
