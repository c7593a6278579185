"""Sampling in a verify pass, as plain decoding samples.

SGLang's verify knows temperature, top-k and top-p, and cuts by top-k before top-p. Here it cuts as
the sampler of plain decoding does, min-p included, at every node of a tree; drafts that were drawn
at random are accepted by rejection; and a request that the tree cannot serve exactly, or that has
no tree, gets its one token from that sampler itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.sampling.renorm import top_k_renorm_prob, top_p_renorm_prob
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties
from sglang.srt.utils.async_probe import sanitize_nan_logits

from cast_sglang.ops.copies import to_device
from cast_sglang.ops.sampled import sampled_ops_for

if TYPE_CHECKING:
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from cast_sglang.serving.requests import SamplingNeeds
    from cast_sglang.serving.step import Drawn

__all__ = ["guarded", "lift_bans", "sample_as_plain", "sampling_as_plain"]

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
    info, drawn = batch.sampling_info, getattr(verify_input, "drawn", None)
    rows, logits = verify_input.draft_token_num, logits_output.next_token_logits
    is_root_alone = rows == 1
    if kwargs.get("watermark_state") is not None and info.has_watermark_candidates:
        # SGLang's verify, which marks the text, is exact for any drafts.
        drawn, is_root_alone = None, False
    suffices = _needs is None and drawn is None and not is_root_alone
    if suffices or batch.forward_mode.is_idle():
        return original(verify_input, batch, logits_output, grammar_mask, *args, **kwargs)
    if drawn is not None:
        sanitize_nan_logits(logits, "verify: target model logits")
    _bias(logits, info, rows, grammar_mask)
    if is_root_alone:
        return _plain_step(logits, batch, verify_input)
    if drawn is not None:
        found = _accept_drawn(drawn, logits, batch, verify_input)
        return _with_plain_tokens(found, logits, batch, verify_input, rows)
    changed: dict[str, Any] = {
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "logit_bias": None,
    }
    sampled_output = logits_output
    if _needs is not None and _needs.truncates and not info.is_all_greedy:
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
    return _with_plain_tokens(found, logits, batch, verify_input, rows)


def _accept_drawn(
    drawn: Drawn, logits: torch.Tensor, batch: ScheduleBatch, verify_input: Any
) -> Sampled:
    """Sample along the trees of a batch of which some drafts were drawn at random.

    Args:
        logits: [B * N, V], biased.
    """
    info, device = batch.sampling_info, logits.device
    batch_size, rows = verify_input.retrieve_next_token.shape
    probs = _truncated(logits, info, rows)
    if info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling:
        probs /= probs.sum(dim=-1, keepdim=True)
    candidates = verify_input.draft_token.view(batch_size, rows)
    found = sampled_ops_for(device).accept_draws(
        probs.view(batch_size, rows, -1),
        candidates,
        verify_input.retrieve_next_token,
        verify_input.retrieve_next_sibling,
        drawn.proposers,
        drawn.proposals,
        drawn.tokens,
        drawn.is_drawn,
        torch.rand((batch_size, rows), device=device),
        torch.rand(batch_size, device=device),
        verify_input.max_tree_depth,
    )
    nodes, is_end = found.nodes, found.num_drafts.unsqueeze(1)
    places = torch.arange(nodes.shape[1], device=device)
    # What follows a node of the path is its successor there, and the drawn token at its end.
    successors = torch.nn.functional.pad(nodes[:, 1:], (0, 1), value=-1).clamp(min=0)
    follows = candidates.gather(1, successors).to(torch.int32)
    follows = torch.where(places == is_end, found.tokens.unsqueeze(1).to(torch.int32), follows)
    first_rows = torch.arange(0, batch_size * rows, rows, device=device).unsqueeze(1)
    accept_index = torch.where(nodes >= 0, nodes + first_rows, -1)
    # The last entry takes what belongs to no node.
    predict = torch.zeros(batch_size * rows + 1, dtype=torch.int32, device=device)
    predict.scatter_(0, accept_index.flatten() % len(predict), follows.flatten())
    sampled = predict[:-1], found.num_drafts.to(torch.int32) + 1, accept_index.to(torch.int32)
    if get_parallel().tp_size > 1:
        for part in sampled:
            get_tp_group().broadcast(part, src=0)
    return sampled


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
    if grammar_mask is not None and info.acc_additive_penalties is not None:
        lift_bans(logits)


def lift_bans(logits: torch.Tensor) -> None:
    """Allow token 0 in rows of logits [R, V] where every token is banned.

    That is so where a grammar allows only the end, and `min_new_tokens` forbids it. Sampling from
    nothing would end the server; greedy decoding takes token 0. Unless that is an end itself, the
    grammar refuses it, and SGLang aborts the request.
    """
    logits[:, 0].masked_fill_(logits.amax(dim=-1) == -torch.inf, 0.0)


def guarded(info: SamplingBatchInfo) -> SamplingBatchInfo:
    """Return `info` with custom logit processors that end their request alone when they fail.

    As on parameters that they do not understand. SGLang's example of one also fails where the
    requests of a batch name different tokens; each then gets its own call.
    """
    entries = {
        key: dataclasses.replace(entry, processor=functools.partial(_processed, entry.processor))
        for key, entry in (info.custom_logit_processor or {}).items()
    }
    return dataclasses.replace(info, custom_logit_processor=entries)


def _processed(
    processor: Callable[..., torch.Tensor], logits: torch.Tensor, params: list[Any]
) -> torch.Tensor:
    """Return logits [R, V] as the processor of these requests changes them."""
    try:
        result = processor(logits.clone(), params)
        if result.shape != logits.shape:
            raise ValueError(f"it returned logits of shape {tuple(result.shape)}")
        return result
    except Exception as error:  # noqa: BLE001 - a client's code may raise anything
        if len(params) > 1:
            rows = zip(logits.split(1), params, strict=True)
            return torch.cat([_processed(processor, row, [own]) for row, own in rows])
        request = (params[0] or {}).get("__req__")  # SGLang's reference for processors
        if request is not None:
            message = f"custom_logit_processor failed: {error!r}"
            request.to_finish = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
        return logits


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
    logits: torch.Tensor,
    batch: ScheduleBatch,
    verify_input: Any,
    rows: int,
) -> Sampled:
    """Give requests that need it the token that the sampler of plain decoding draws at their root.

    Args:
        logits: [B * N, V], biased.
    """
    if _needs is None or (is_plain := _needs.is_plain) is None:
        return found
    predict, accept_lens, accept_index = found
    roots = torch.arange(len(is_plain), device=logits.device) * rows
    mask = to_device(is_plain, logits.device)
    root_logits = logits[roots]
    tokens = _plain_tokens(root_logits, batch.sampling_info, verify_input.positions[roots])
    if batch.sampling_info.has_custom_logit_processor:
        logits[roots] = torch.where(mask[:, None], root_logits, logits[roots])
    predict[roots] = torch.where(mask, tokens.to(predict.dtype), predict[roots])
    accept_lens.masked_fill_(mask, 1)
    accept_index[:, 1:].masked_fill_(mask[:, None], -1)
    return predict, accept_lens, accept_index


def _plain_step(logits: torch.Tensor, batch: ScheduleBatch, verify_input: Any) -> Sampled:
    """Sample where the root alone is verified: one token of each request, as plain decoding does.

    Args:
        logits: [B, V], biased.
    """
    batch_size, device = len(logits), logits.device
    tokens = _plain_tokens(logits, batch.sampling_info, verify_input.positions)
    shape = batch_size, verify_input.max_tree_depth
    accept_index = torch.full(shape, -1, dtype=torch.int32, device=device)
    accept_index[:, 0] = torch.arange(batch_size, dtype=torch.int32, device=device)
    return tokens.to(torch.int32), torch.ones_like(accept_index[:, 0]), accept_index


def _plain_tokens(
    logits: torch.Tensor, info: SamplingBatchInfo, positions: torch.Tensor
) -> torch.Tensor:
    """Return [B], the token of each request that the sampler of plain decoding draws.

    Args:
        logits: [B, V], biased; what custom logit processors change is written into them, since log
            probabilities are read from them.
    """
    assert _sampler is not None
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(logits, info)
        info = dataclasses.replace(info, has_custom_logit_processor=False)
    # The sampler writes probabilities over what it is given.
    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    tokens: torch.Tensor = _sampler(output, info, False, [], [], positions)
    if get_parallel().tp_size > 1:
        get_tp_group().broadcast(tokens, src=0)
    return tokens
