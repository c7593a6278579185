"""Where an answer ends: at the token where plain decoding ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cast_sglang.serving.host_patches.hooks import is_cast

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

__all__ = ["drop_unsaid_logprob", "end_as_plain", "forget_unsaid"]


def end_as_plain(original: Callable[..., None], req: Req, new_accepted_len: int = 1) -> None:
    """Look for the end of an answer token by token; around SGLang's `Req.update_finish_state`.

    SGLang looks at all tokens of a step at once, and at stop strings before stop tokens. Where one
    step holds two reasons to end, it may take the later one. It also looks further back for a stop
    string the more tokens a step brings, and counts all of them as reasoning.
    """
    if not is_cast():
        original(req, new_accepted_len)
        return
    _find_end(original, req, new_accepted_len)
    if req.finished_len is not None:
        req.reasoning_tokens = min(req.reasoning_tokens, req.finished_len)


def _find_end(original: Callable[..., None], req: Req, new_accepted_len: int) -> None:
    params = req.sampling_params
    is_at_once = new_accepted_len <= 1 or not (params.stop_strs or params.stop_regex_strs)
    if is_at_once or req.finished():
        original(req, new_accepted_len)
        return
    tokens = req.output_ids[-new_accepted_len:]
    del req.output_ids[-new_accepted_len:]
    # A grammar has taken in all of the tokens, of which only the last can be its end.
    grammar, req.grammar = req.grammar, None
    for place, token in enumerate(tokens, 1):
        req.output_ids.append(token)
        if place == new_accepted_len:
            req.grammar = grammar
        original(req, 1)
        if req.finished():
            # SGLang leaves it open where the step is one token.
            req.finished_len = req.finished_len or len(req.output_ids)
            req.output_ids.extend(tokens[place:])
            break
    req.grammar = grammar


def forget_unsaid(session: Any, *args: Any, **kwargs: Any) -> None:
    """Drop what a step brought behind the ends of a session's answers.

    Before SGLang's `Session.create_req`, which goes on from the tokens of the last request.
    """
    if is_cast():
        for node in session.req_nodes.values():
            if node.req.finished_len is not None:
                del node.req.output_ids[node.req.finished_len :]


def drop_unsaid_logprob(result: Any, processor: Any, i: int, req: Req, *args: Any) -> None:
    """Keep no log probability of the token that an answer of no tokens does not have.

    After SGLang's `SchedulerLogprobResultProcessor.add_logprob_return_values`: with speculation a
    prefill samples one.
    """
    if is_cast() and req.sampling_params.max_new_tokens == 0:
        req.logprob.output_token_logprobs_val.clear()
        req.logprob.output_token_logprobs_idx.clear()
