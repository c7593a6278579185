"""Measured passes and steps, with noise, for tests of the correction of costs."""

import math

from cast_sglang.costs.correction import REFRESH_EVERY
from cast_sglang.costs.limits import Limits

LIMITS = Limits(max_batch_size=8, max_context=1024, max_verify_rows=32, max_width=8)
SIZES = (2, 4, 8, 16, 32)


def scale(residuals, tokens, operation="verify", batch_size=4):
    return float(residuals.scales(operation, batch_size, 32)[tokens - 1])


def record(residuals, ratio, *, times=200, operation="verify", batch_size=4, tokens=8):
    for _ in range(times):
        residuals.record(operation, batch_size, tokens, ratio)
    residuals.refresh()


def serve(residuals, rng, steps, ratio_of, *, sizes=SIZES, noise=0.15):
    """Run steps of two draft layers, a verify pass over one of the sizes and draft extend.

    Args:
        ratio_of: true ratio of a pass, of its name and number of tokens.
    """
    for step in range(steps):
        passes = ("draft", 4), ("draft", 4), ("verify", rng.choice(sizes)), ("draft_extend", 4)
        for name, tokens in passes:
            residuals.record(name, 4, tokens, ratio_of(name, tokens) * noisy(rng, noise))
        if step % REFRESH_EVERY == 0:
            residuals.refresh()
    residuals.refresh()


def noisy(rng, noise):
    return math.exp(rng.gauss(0.0, noise))
