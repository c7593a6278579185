"""Sampling in a verify pass, as plain decoding samples.

SGLang's verify knows temperature, top-k and top-p, and cuts by top-k before top-p. Here it cuts as
the sampler of plain decoding does, min-p included, at every node of a tree; and a request that the
tree cannot serve exactly gets its one token from that sampler itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.kernels.ops.sampling.renorm import top_k_renorm_prob, top_p_renorm_prob
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

if TYPE_CHECKING:
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from cast_sglang.serving.requests import SamplingNeeds

__all__ = ["sample_as_plain", "sampling_as_plain"]

# Of the verify pass that runs: what its requests need, and the sampler of plain decoding.
_needs: SamplingNeeds | None = None
_sampler: Sampler | None = None

Sampled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@contextlib.contextmanager
def sampling_as_plain(needs: SamplingNeeds | None, sampler: Sampler) -> Iterator[None]:
    """Let `sample_as_plain` know what the requests of a verify pass need."""
    global _needs, _sampler
    _needs, _sampler = needs, sampler
    try:
        yield
    finally:
        _needs = _sampler = None


def sample_as_plain(
    original: Callable[..., Sampled],
    verify_input: Any,
    batch: ScheduleBatch,
    logits_output: Any,
    grammar_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Sampled:
    """Sample along the trees of a batch; around SGLang's `eagle_sample`.

    Returns:
        [B * N] int32 tokens that follow the nodes, [B] accepted nodes with the root, [B, S] int32
        indices of the accepted nodes.
    """
    if _needs is None or batch.forward_mode.is_idle():
        return original(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    info, rows = batch.sampling_info, verify_input.draft_token_num
    logits = logits_output.next_token_logits
    _bias(logits, info, rows, grammar_mask)
    changed: dict[str, Any] = {
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "logit_bias": None,
    }
    sampled_output = logits_output
    if _needs.truncates and not info.is_all_greedy:
        # The answer's log probabilities are read from the logits, so those stay whole.
        sampled_output = copy.copy(logits_output)
        sampled_output.next_token_logits = _truncated(logits, info, rows).log()
        changed |= {
            "temperatures": torch.ones_like(info.temperatures),
            "need_top_k_sampling": False,
            "need_top_p_sampling": False,
        }
    batch.sampling_info = dataclasses.replace(info, **changed)
    try:
        found = original(verify_input, batch, sampled_output, None, *args, **kwargs)
    finally:
        batch.sampling_info = info
    if _needs.is_plain is None:
        return found
    return _with_plain_tokens(found, _needs.is_plain, logits, batch, verify_input, rows)


def _bias(logits: torch.Tensor, info: SamplingBatchInfo, rows: int, grammar_mask: Any) -> None:
    """Add to logits [B * N, V] what plain decoding adds, the same at all nodes of a request."""
    if info.acc_additive_penalties is not None:
        logits.add_(info.acc_additive_penalties.repeat_interleave(rows, dim=0))
    if info.acc_scaling_penalties is not None:
        apply_scaling_penalties(logits, info.acc_scaling_penalties.repeat_interleave(rows, dim=0))
    if grammar_mask is not None:
        grammar_mask.apply(logits)
    if info.logit_bias is not None:
        logits.add_(info.logit_bias.repeat_interleave(rows, dim=0))


def _truncated(logits: torch.Tensor, info: SamplingBatchInfo, rows: int) -> torch.Tensor:
    """Return the probabilities [B * N, V] that plain decoding samples from, up to their sum.

    Its backends cut by top-k and top-p at once; with min-p, FlashInfer cuts by top-k first. Min-p
    compares with the likeliest token, so it does not depend on the sum.

    Source: SGLang 0.5.23 `Sampler._sample_from_probs`.
    """
    temperatures, top_ks, top_ps, min_ps = (
        values.repeat_interleave(rows, dim=0)
        for values in (info.temperatures, info.top_ks, info.top_ps, info.min_ps)
    )
    probs = torch.softmax(logits.float() / temperatures, dim=-1)
    # Neither kernel promises to leave its input as it is.
    kept = top_k_renorm_prob(probs.clone(), top_ks) if info.need_top_k_sampling else probs
    if info.need_top_p_sampling:
        is_pytorch = get_exec().kernel.sampling_backend == "pytorch"
        if info.need_min_p_sampling and not is_pytorch:
            kept = top_p_renorm_prob(kept.clone(), top_ps)
        else:
            kept = kept.masked_fill(top_p_renorm_prob(probs.clone(), top_ps) <= 0.0, 0.0)
    if info.need_min_p_sampling:
        least = kept.amax(dim=-1, keepdim=True) * min_ps[:, None]
        kept = kept.masked_fill(kept < least, 0.0)
    return kept


def _with_plain_tokens(
    found: Sampled,
    is_plain: np.ndarray,
    logits: torch.Tensor,
    batch: ScheduleBatch,
    verify_input: Any,
    rows: int,
) -> Sampled:
    """Give some requests the token that the sampler of plain decoding draws behind their root.

    Args:
        is_plain: [B] bool.
        logits: [B * N, V], biased.
    """
    predict, accept_lens, accept_index = found
    assert _sampler is not None
    roots = torch.arange(len(is_plain), device=logits.device) * rows
    mask = torch.from_numpy(is_plain).to(logits.device, non_blocking=True)
    info, root_logits = batch.sampling_info, logits[roots]
    if info.has_custom_logit_processor:
        # Into the logits as well, from which log probabilities are read.
        apply_custom_logit_processor(root_logits, info)
        logits[roots] = torch.where(mask[:, None], root_logits, logits[roots])
        info = dataclasses.replace(info, has_custom_logit_processor=False)
    tokens = _sampler(
        LogitsProcessorOutput(next_token_logits=root_logits),
        info,
        False,
        [],
        [],
        verify_input.positions[roots],
    )
    if get_parallel().tp_size > 1:
        get_tp_group().broadcast(tokens, src=0)
    predict[roots] = torch.where(mask, tokens.to(predict.dtype), predict[roots])
    accept_lens.masked_fill_(mask, 1)
    accept_index[:, 1:].masked_fill_(mask[:, None], -1)
    return predict, accept_lens, accept_index
