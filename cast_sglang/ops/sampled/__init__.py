"""Ops of requests that sample: draw a node's children, and accept them by rejection.

`reference` documents both in plain torch, `loops` has them for the CPU and `fused` for a GPU.

The children of a node are drawn without replacement from the draft's distribution q at the
request's own temperature and cuts. Verify goes through them in the order of the draws and accepts
each with the chance min(1, p / q), p being what the target's distribution has left. So a token that
the draft and the target both find possible is accepted, however unlikely it is; if the likeliest
tokens were proposed, it would be accepted only as often as the target draws it.
"""

from types import ModuleType

import torch

from cast_sglang.ops import implementation_for

__all__ = ["sampled_ops_for"]


def sampled_ops_for(device: torch.device | str) -> ModuleType:
    """Return the module whose ops run best on `device`."""
    return implementation_for(__name__, device)
