"""What a client says of speculation in its request, with custom parameters.

`cast_pool` names the requests that a request may copy text of, and `cast` a mode:

off         the server verifies no drafts for the request
latency     a token of the request counts `LATENCY_WEIGHT` times when the requests of the batch
            compete for verified nodes
throughput  a token counts once (the default)
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
    "POOL_PARAMETER",
    "THROUGHPUT",
    "mode_weights",
    "parse_mode",
    "parse_pool",
]

MODE_PARAMETER = "cast"
POOL_PARAMETER = "cast_pool"
OFF = "off"
LATENCY = "latency"
THROUGHPUT = "throughput"
MODES = (OFF, LATENCY, THROUGHPUT)

LATENCY_WEIGHT = 4.0

_WEIGHTS = {OFF: 0.0, LATENCY: LATENCY_WEIGHT, THROUGHPUT: 1.0}


def parse_mode(custom_params: Any) -> str:
    """Return the mode in a request's custom parameters.

    Args:
        custom_params: the client's object, of any type. None, no `cast` and a `cast` of None mean
            throughput. Other parameters are ignored.

    Raises:
        ConfigError: the mode is not allowed; the message names the parameter, its value and the
            allowed values.
    """
    mode = _given(custom_params, MODE_PARAMETER)
    if mode is None:
        return THROUGHPUT
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(
            f"custom_params.{MODE_PARAMETER}={_shown(mode)}: must be {' | '.join(MODES)}"
        )
    return mode


def parse_pool(custom_params: Any) -> str | None:
    """Return the pool that a request's custom parameters name, None for none.

    Args:
        custom_params: as of `parse_mode`.

    Raises:
        ConfigError: it is no string, or an empty one.
    """
    name = _given(custom_params, POOL_PARAMETER)
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigError(
            f"custom_params.{POOL_PARAMETER}={_shown(name)}: must be a string that is not empty"
        )
    return name


def mode_weights(modes: Sequence[str]) -> list[float]:
    """Return how much a token of each request counts, [B].

    The mean weight of the requests with drafts is 1, so if all have the same mode, all weigh 1.
    Modes thus move rows between requests but do not change the price of a row.

    Args:
        modes: [B], as `parse_mode` returns them.
    """
    weights = [_WEIGHTS[mode] for mode in modes]
    mean = sum(weights) / max(1, sum(weight > 0.0 for weight in weights))
    return [weight / mean if mean else weight for weight in weights]


def _given(custom_params: Any, name: str) -> Any:
    """Return a custom parameter, None where it is not given."""
    if custom_params is None:
        return None
    if not isinstance(custom_params, Mapping):
        raise ConfigError(
            f"custom_params={_shown(custom_params)}: must be an object such as "
            f'{{"{MODE_PARAMETER}": "{OFF}"}}'
        )
    return custom_params.get(name)


def _shown(value: Any) -> str:
    # A client may send a deeply nested object, on which repr would exhaust the stack.
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
