"""Log probabilities are those of plain decoding, in whatever way they are asked for."""

from typing import Any

import pytest

from tests.server.client import generate

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_TOKENS = 24
TOLERANCE = 1e-4  # in float32
KINDS = [
    *("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"),
    *("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"),
]
ALL = {
    "return_logprob": True,
    "logprob_start_len": 0,
    "top_logprobs_num": 5,
    "token_ids_logprob": [65, 221, 300],
}
# How requests are decoded, in the tree or plainly.
DECODED = {
    "in the tree": {},
    "logit_bias": {"logit_bias": {"65": -100.0, "221": 3.0}},
    "regex": {"regex": r"[a-z ]{10,40}\n", "ignore_eos": False},
    "min_p and top_k": {"min_p": 0.5, "top_k": 3},
    # Without a repetition penalty, for the reason that test_server_sampling.py gives.
    "penalties": {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    "mode off": {"custom_params": {"cast": "off"}},
}
SAMPLED = {
    "hot": {"temperature": 1.5},
    "top_p": {"temperature": 0.7, "top_p": 0.8},
    "all cuts": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "penalty": {"temperature": 0.7, "frequency_penalty": 0.5},
}


def logprobs_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the log probabilities of an answer, by kind; those that it lacks are None."""
    return {kind: answer["meta_info"].get(kind) for kind in KINDS}


def check_equal(ours: Any, theirs: Any) -> None:
    """Compare nested lists: numbers up to rounding, all else exactly."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            check_equal(ours[key], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            check_equal(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", DECODED)
def test_every_kind_is_that_of_plain_decoding(plain, cast, prompts, name):
    fields = {**ALL, **DECODED[name], "max_new_tokens": NUM_TOKENS}
    theirs, ours = (generate(server, prompts[:3], **fields) for server in (plain, cast))
    for one, other in zip(ours, theirs, strict=True):
        assert one["output_ids"] == other["output_ids"]
        found = logprobs_of(one)
        assert all(found.values())
        assert [token for _, token, *_ in found["output_token_logprobs"]] == one["output_ids"]
        assert len(found["input_token_logprobs"]) == one["meta_info"]["prompt_tokens"]
        check_equal(found, logprobs_of(other))


@pytest.mark.parametrize("start", [-1, 0, 5, 40])
def test_those_of_the_prompt_begin_where_they_are_asked_for(plain, cast, prompts, start):
    fields = {"return_logprob": True, "logprob_start_len": start, "max_new_tokens": 8}
    theirs, ours = (generate(server, prompts[0], **fields) for server in (plain, cast))
    check_equal(logprobs_of(ours), logprobs_of(theirs))
    length = 0 if start < 0 else ours["meta_info"]["prompt_tokens"] - start
    assert len(ours["meta_info"]["input_token_logprobs"]) == length


@pytest.mark.parametrize("length", [0, 1])
def test_short_answers_have_no_more_than_their_tokens(plain, cast, prompts, length):
    fields = {**ALL, "max_new_tokens": length}
    theirs, ours = (generate(server, prompts[:2], **fields) for server in (plain, cast))
    for one, other in zip(ours, theirs, strict=True):
        assert len(one["output_ids"]) == len(other["output_ids"]) == length
        check_equal(logprobs_of(one), logprobs_of(other))
        assert len(one["meta_info"]["output_token_logprobs"]) == length


def test_requests_of_one_batch_get_their_own(plain, cast, prompts):
    fields = {
        "return_logprob": [True, False, True, True],
        "top_logprobs_num": [2, 0, 0, 4],
        "token_ids_logprob": [[], [], [1, 2], [3]],
        "logprob_start_len": [-1, -1, 3, 0],
    }
    theirs, ours = (
        generate(server, prompts[:4], max_new_tokens=NUM_TOKENS, **fields)
        for server in (plain, cast)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one["output_ids"] == other["output_ids"]
        check_equal(logprobs_of(one), logprobs_of(other))
    assert not any(logprobs_of(ours[1]).values())


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_token_has_the_one_of_plain_decoding(plain, cast, prompts, name):
    """Compared where both servers happened to sample the same tokens."""
    found = []
    for server in (plain, cast):
        answers = generate(
            server,
            prompts[0],
            **SAMPLED[name],
            n=48,
            max_new_tokens=3,
            return_logprob=True,
            top_logprobs_num=2,
        )
        of_prefix = {}
        for answer in answers:
            rows = logprobs_of(answer)
            for last, tokens in enumerate(rows["output_token_logprobs"]):
                prefix = tuple(answer["output_ids"][: last + 1])
                of_prefix[prefix] = [
                    tokens[0],
                    *(row[0] for row in rows["output_top_logprobs"][last]),
                ]
        found.append(of_prefix)
    theirs, ours = found
    both = theirs.keys() & ours.keys()
    assert any(len(prefix) > 1 for prefix in both)
    for prefix in both:
        check_equal(ours[prefix], theirs[prefix])
