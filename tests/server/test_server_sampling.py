"""Every sampling parameter has the effect that it has without speculation; `laws` has more."""

from collections import Counter

import numpy as np
import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from benchmarks.harness.servers import Server
from tests.server.client import answers_of, generate, in_parallel, post_generate

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_TOKENS = 48
PROCESSOR = DisallowedTokensLogitsProcessor.to_str()

# Greedy requests, whose answers are equal token for token.
GREEDY = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    # Not with repetition_penalty: SGLang applies it before or after these, as a process happens to
    # order its classes.
    "frequency_penalty, presence_penalty": {"frequency_penalty": 0.4, "presence_penalty": 0.6},
    "logit_bias": {"logit_bias": {"65": -100.0, "221": 3.0}},
    "stop": {"stop": ["return"], "ignore_eos": False},
    "stop_token_ids": {"stop_token_ids": [201, 221], "ignore_eos": False},
    "stop_regex": {"stop_regex": r"[a-z]+\(", "ignore_eos": False},
    # Of these, one step holds several.
    "stop, stop_token_ids, stop_regex": {
        "stop": ["self", "e", "("],
        "stop_token_ids": list(range(200, 230)),
        "stop_regex": r"[a-z] \w",
        "ignore_eos": False,
    },
    "min_new_tokens": {
        "min_new_tokens": 24,
        "stop_token_ids": [201, 221],
        "ignore_eos": False,
    },
    "regex": {"regex": r"[a-z ]{10,40}\n", "ignore_eos": False},
    "min_p and top_k": {"min_p": 0.5, "top_k": 3},
    "no_stop_trim": {"stop": ["return"], "no_stop_trim": True, "ignore_eos": False},
    # The bias puts special tokens, which a text has only where they are asked for, among others.
    "special tokens": {
        **{"logit_bias": {"2": 12.0}, "skip_special_tokens": False},
        "spaces_between_special_tokens": False,
    },
    "no special tokens": {"logit_bias": {"2": 12.0}},
    "n": {"n": 2},
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_answer_is_that_of_plain_decoding(plain, cast, prompts, name):
    expected = answers_of(plain, prompts[:6], NUM_TOKENS, **GREEDY[name])
    assert answers_of(cast, prompts[:6], NUM_TOKENS, **GREEDY[name]) == expected
    first = len(expected) // 6
    assert answers_of(cast, prompts[:1], NUM_TOKENS, **GREEDY[name]) == expected[:first]


def test_special_tokens_are_in_a_text_where_they_are_asked_for(cast, prompts):
    [shown], [hidden] = (
        answers_of(cast, prompts[:1], NUM_TOKENS, **GREEDY[name])
        for name in ("special tokens", "no special tokens")
    )
    assert shown[0] == hidden[0]
    assert "<|assistant|>" in shown[1] and "<|assistant|>" not in hidden[1]


def test_requests_of_one_batch_keep_their_own_parameters(plain, cast, prompts):
    """Each request of a mixed batch gets what it gets alone from plain decoding."""
    asked = list(zip(prompts, GREEDY.values(), strict=False)) + [(prompts[20], {})] * 3

    def ask(server: Server, item: tuple[str, dict]) -> list[tuple]:
        return answers_of(server, [item[0]], NUM_TOKENS, **item[1])

    expected = [ask(plain, item) for item in asked]
    assert in_parallel(lambda item: ask(cast, item), asked, workers=len(asked)) == expected


def test_requests_that_need_it_are_decoded_plainly_and_counted(cast, prompts):
    def counted() -> int:
        return cast.get("/server_info")["internal_states"][0]["cast"]["plain_requests"]

    before = counted()
    answer = generate(cast, prompts[0], max_new_tokens=NUM_TOKENS, frequency_penalty=1.0)
    assert answer["meta_info"]["spec_verify_ct"] == NUM_TOKENS - 1
    assert counted() == before + 1
    generate(cast, prompts[0], max_new_tokens=NUM_TOKENS, min_p=0.2, temperature=1.0)
    assert counted() == before + 1
    log = cast.log_path.read_text()
    assert log.count("decoded without drafts, because of a penalty") == 1


def test_a_custom_logit_processor_sees_every_token(plain, cast, prompts):
    usual = Counter(
        token for ids, *_ in answers_of(plain, prompts[:6], NUM_TOKENS) for token in ids
    )
    banned = [token for token, _ in usual.most_common(5)]
    fields = {"custom_params": {"token_ids": banned}, "custom_logit_processor": PROCESSOR}
    theirs, ours = (
        answers_of(server, prompts[:6], NUM_TOKENS, **fields) for server in (plain, cast)
    )
    assert not set(banned) & {token for ids, *_ in ours for token in ids}
    assert ours == theirs


@pytest.mark.parametrize("fields", [{}, {"stop": ["self", "("], "ignore_eos": False}], ids=str)
def test_hidden_states_are_those_of_plain_decoding(plain, cast, prompts, fields):
    fields = {"max_new_tokens": 20, "return_hidden_states": True, **fields}
    asked = [f"{len(fields)} {prompt}" for prompt in prompts[:3]]
    theirs, ours = (generate(server, asked, **fields) for server in (plain, cast))
    for one, other in zip(ours, theirs, strict=True):
        assert one["output_ids"] == other["output_ids"]
        # Of the prompt, those of what the cache did not hold, in one block for each chunk.
        found, expected = (
            np.vstack([np.atleast_2d(states) for states in answer["meta_info"]["hidden_states"]])
            for answer in (one, other)
        )
        count = min(len(found), len(expected))
        assert count > len(one["output_ids"])
        np.testing.assert_allclose(found[-count:], expected[-count:], atol=1e-4)
    if "stop" not in fields:
        assert ours[0]["meta_info"]["spec_verify_ct"] < len(ours[0]["output_ids"]) - 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"return_sampling_mask": True}, "not supported with speculative decoding"),
        ({"beam_width": 2}, "not supported with speculative decoding"),
        ({"watermark": {"key": "2a"}}, "--enable-watermark"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_speculation_cannot_give_is_refused(cast, prompts, fields, says):
    response = post_generate(cast, prompts[0], max_new_tokens=4, **fields)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
