"""Request modes: what a request asks of speculation.

A client sets it as the custom parameter `cast` of its request:

    off         the request is decoded plainly; no drafts are verified for it
    latency     its tokens count as much as those of `LATENCY_WEIGHT` requests when the budget of
                the batch is shared out
    throughput  it gets the drafts that pay for the batch; the default
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from cast_sglang.errors import ConfigError

__all__ = [
    "LATENCY",
    "LATENCY_WEIGHT",
    "MODES",
    "MODE_PARAMETER",
    "OFF",
    "THROUGHPUT",
    "mode_weights",
    "parse_mode",
]

MODE_PARAMETER = "cast"
OFF = "off"
LATENCY = "latency"
THROUGHPUT = "throughput"
MODES = (OFF, LATENCY, THROUGHPUT)

LATENCY_WEIGHT = 4.0

_WEIGHTS = {OFF: 0.0, LATENCY: LATENCY_WEIGHT, THROUGHPUT: 1.0}


def parse_mode(custom_params: Any) -> str:
    """Return the mode in a request's custom parameters.

    Args:
        custom_params: what the client sent, of any type. Parameters other than `cast` are left to
            whom they concern; None, no `cast` and a `cast` of None mean throughput.

    Raises:
        ConfigError: names the parameter, its value and what is allowed.
    """
    if custom_params is None:
        return THROUGHPUT
    if not isinstance(custom_params, Mapping):
        raise ConfigError(
            f"custom_params={_shown(custom_params)}: must be an object such as "
            f'{{"{MODE_PARAMETER}": "{OFF}"}}'
        )
    mode = custom_params.get(MODE_PARAMETER)
    if mode is None:
        return THROUGHPUT
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(
            f"custom_params.{MODE_PARAMETER}={_shown(mode)}: must be {' | '.join(MODES)}"
        )
    return mode


def mode_weights(modes: Sequence[str]) -> list[float]:
    """Return how much a token of each request counts.

    Those that want drafts count 1 in the mean, so where all have the same mode, all count 1: a mode
    moves rows from one request to another and leaves the price of a row as it is.

    Args:
        modes: [B] members of `MODES`, as `parse_mode` returns them.
    """
    weights = [_WEIGHTS[mode] for mode in modes]
    mean = sum(weights) / max(1, sum(weight > 0.0 for weight in weights))
    return [weight / mean if mean else weight for weight in weights]


def _shown(value: Any) -> str:
    # A client may send anything; reprlib stops at a depth where repr would run out of stack.
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
