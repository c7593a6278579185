"""What is read from requests: their modes, and how long contexts are.

Modes are checked where a request arrives and read where it is served. SGLang carries custom
parameters from the client to the scheduler whether or not a custom logit processor uses them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.runtime_context import get_spec

from cast_sglang.errors import ConfigError
from cast_sglang.policy.request_modes import THROUGHPUT, mode_weights, parse_mode

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_params import SamplingParams

__all__ = ["check_mode", "mean_context", "modes_of", "request_weights"]


def mean_context(batch: ScheduleBatch) -> float:
    """Return the mean committed length of the batch's requests, in tokens."""
    if batch.seq_lens_cpu is not None:
        return int(batch.seq_lens_cpu.sum()) / len(batch.reqs)
    lengths = (len(req.origin_input_ids) + len(req.output_ids) for req in batch.reqs)
    return sum(lengths) / len(batch.reqs)


def check_mode(result: None, params: SamplingParams, *args: Any, **kwargs: Any) -> None:
    """Refuse a request whose mode does not exist; runs after SGLang's check of its parameters.

    That is in the tokenizer process, where a ValueError is answered to its request alone, as HTTP
    400. A server of another algorithm leaves custom parameters alone.

    Raises:
        ConfigError: names the parameter, its value and what is allowed.
    """
    if params.custom_params is not None and get_spec().speculative_algorithm == "CAST":
        parse_mode(params.custom_params)


def modes_of(reqs: Iterable[Req]) -> tuple[str, ...]:
    """Return the mode of each request of a batch.

    A mode that never passed `check_mode`, because another front end than SGLang's Python server
    took the request in, counts as throughput: a bad request must not end the scheduler.
    """
    return tuple([_mode_of(req.sampling_params.custom_params) for req in reqs])


def request_weights(reqs: Iterable[Req]) -> np.ndarray | None:
    """Return [B], what the tokens of each request are worth: `mode_weights`.

    0 for one that wants no drafts; None where all are worth the same.
    """
    modes = modes_of(reqs)
    differ = any(mode != THROUGHPUT for mode in modes)
    return np.array(mode_weights(modes)) if differ else None


def _mode_of(custom_params: Any) -> str:
    if custom_params is None:  # as in most requests
        return THROUGHPUT
    try:
        return parse_mode(custom_params)
    except ConfigError:
        return THROUGHPUT
