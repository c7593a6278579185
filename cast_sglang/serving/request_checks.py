"""What a request may not ask for: it is refused where it arrives, because it would end the server.

SGLang's tokenizer process answers a ValueError to its request alone, as HTTP 400. In the scheduler
the same request would end the server for everyone, without speculation as well. What has a meaning
that plain decoding would give it is put so that the scheduler can serve it. Servers of other
algorithms are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, msgpack_encode
from sglang.srt.managers.utils import MsgpackDecodeError, msgpack_decode_explained
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams

from cast_sglang.errors import ConfigError
from cast_sglang.serving.host_patches.hooks import is_cast
from cast_sglang.serving.request_modes import parse_mode, parse_pool

__all__ = ["check_count", "check_request", "check_sampling"]

# Logits are divided by temperatures, which are at least 1e-6 (SGLang takes less for greedy), and
# must stay finite in float32, which ends at 3.4e38. SGLang's `sanitize_nan_logits` has this bound.
_MOST_BIAS = 1e30
# Logits, which stay far below 1e6, are divided by it too: 1e6 / 1e-20 / 1e-6 is 1e32.
_LEAST_REPETITION_PENALTY = 1e-20
_MOST_TEMPERATURE = float(np.finfo(np.float32).max)
# SGLang makes a request of each of the n answers before it serves any of them. Chosen, not
# measured: more than clients ask for, and too few to fill the memory of a small machine.
_MOST_ANSWERS = 1 << 16


def check_count(request: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse more answers than SGLang could make requests of, and none of several prompts.

    Runs before it makes them.

    Raises:
        ConfigError: names the parameter, its value and what is allowed.
    """
    params = request.sampling_params
    first = params[0] if isinstance(params, list) and params else params
    n = first.get("n") if isinstance(first, dict) else None
    if not is_cast() or not isinstance(n, int):
        return
    prompts = request.input_ids if request.text is None else request.text
    is_single = isinstance(prompts, str) or not prompts or isinstance(prompts[0], int)
    # SGLang takes less than 1 for 1 where there is one prompt.
    if n > _MOST_ANSWERS or (n < 1 and not is_single):
        raise ConfigError(f"n={n}: must be in [1, {_MOST_ANSWERS}]")


def check_sampling(
    result: None, params: SamplingParams, vocab_size: int, *args: Any, **kwargs: Any
) -> None:
    """Check what SGLang's own check of sampling parameters lets pass; runs after it.

    Effects: a number beyond what SGLang's tensors hold becomes the largest that means the same, and
    stop tokens that no model can say are dropped: SGLang's penalty of `min_new_tokens` would write
    beyond the vocabulary.

    Args:
        vocab_size: of the target.

    Raises:
        ConfigError: names the parameter, its value and what is allowed.
    """
    if not is_cast():
        return
    parse_mode(params.custom_params)
    parse_pool(params.custom_params)
    if params.temperature > _MOST_TEMPERATURE:
        raise ConfigError(f"temperature={params.temperature}: must be at most {_MOST_TEMPERATURE}")
    if params.repetition_penalty < _LEAST_REPETITION_PENALTY:
        raise ConfigError(
            f"repetition_penalty={params.repetition_penalty}: must be at least "
            f"{_LEAST_REPETITION_PENALTY}"
        )
    for token, bias in (params.logit_bias or {}).items():
        if not (isinstance(bias, (int, float)) and abs(bias) <= _MOST_BIAS):  # nan included
            raise ConfigError(
                f"logit_bias[{token}]={bias!r}: must be a number in [{-_MOST_BIAS}, {_MOST_BIAS}]"
            )
    params.top_k = min(params.top_k, TOP_K_ALL)
    params.min_new_tokens = min(params.min_new_tokens, TOP_K_ALL)  # beyond any context
    if params.stop_token_ids:
        known = {token for token in params.stop_token_ids if 0 <= token < vocab_size}
        params.stop_token_ids = known or None


def check_request(tokenized: Any, manager: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """Check a request with its tokens, as it goes to the scheduler; runs after SGLang's checks.

    Args:
        tokenized: what goes to the scheduler.
        manager: SGLang's tokenizer manager.
        request: what the client asked for.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    if not is_cast() or not isinstance(tokenized, TokenizedGenerateReqInput):
        return
    _check_types(tokenized)
    vocab_size, num_tokens = manager.model_config.vocab_size, len(tokenized.input_ids or ())
    if tokenized.mm_inputs is None:  # else some tokens stand for media, and SGLang puts them right
        _check_range("input_ids", tokenized.input_ids, vocab_size, "the vocabulary")
        has_more = tokenized.input_embeds is not None or tokenized.session_params is not None
        if not num_tokens and not has_more:
            raise ConfigError("text: the prompt has no token")
    if tokenized.top_logprobs_num > vocab_size:
        raise ConfigError(
            f"top_logprobs_num={tokenized.top_logprobs_num}: the vocabulary has {vocab_size} tokens"
        )
    if tokenized.return_logprob and tokenized.logprob_start_len < -1:
        raise ConfigError(f"logprob_start_len={tokenized.logprob_start_len}: must be -1 or more")
    if tokenized.lora_id is not None and request.lora_path is None:
        raise ConfigError("lora_id: is the server's; name the adapter as lora_path")
    if manager.enable_metrics and request.custom_labels:
        known = manager.metrics_collector.labels
        if unknown := sorted(request.custom_labels.keys() - known.keys()):
            raise ConfigError(f"custom_labels.{unknown[0]}: must be one of {', '.join(known)}")
    for name in ("token_indices_to_pool", "multi_item_delimiter_indices"):
        _check_range(name, getattr(tokenized, name), num_tokens, "the prompt")
    if tokenized.custom_logit_processor is not None:
        try:
            CustomLogitProcessor.from_str(tokenized.custom_logit_processor)
        except Exception as error:  # whatever a client's code does
            raise ConfigError(f"custom_logit_processor: cannot be loaded: {error!r}") from error
        params = tokenized.sampling_params
        if params.custom_params is None:  # SGLang puts a reference to the request among them
            params.custom_params = {}


def _check_types(tokenized: TokenizedGenerateReqInput) -> None:
    """Refuse values that SGLang's own declaration of the message does not allow."""
    params = tokenized.sampling_params
    light = msgspec.structs.replace(
        tokenized,
        # Made by SGLang itself, and large.
        input_text=None,
        input_ids=None,
        mm_inputs=None,
        time_stats=None,
        # What they may be is for their processor to say.
        sampling_params=msgspec.structs.replace(params, custom_params=None),
    )
    try:
        msgpack_decode_explained(msgpack_encode(light))
    except (MsgpackDecodeError, TypeError, ValueError, OverflowError) as error:
        names = SamplingParams.__struct_fields__
        message = re.sub(
            r"\$\.sampling_params\[(\d+)\]", lambda found: names[int(found[1])], str(error)
        )
        raise ConfigError(message) from error


def _check_range(name: str, values: Sequence[int] | None, end: int, of: str) -> None:
    """Raise ConfigError unless all values are in 0..end - 1."""
    numbers = np.asarray([] if values is None else values, np.int64)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= end):
        place = int(np.argmax((numbers < 0) | (numbers >= end)))
        raise ConfigError(
            f"{name}[{place}]={numbers[place]}: {of} has {end} tokens, so it must be in "
            f"[0, {end - 1}]"
        )
