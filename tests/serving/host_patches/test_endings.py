"""Answers end where plain decoding ends them, however many tokens a step brings."""

import random
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from cast_sglang.serving.host_patches import endings

PIECES = ["a", "b", "ab", "c", "ca", " "]


class Tokenizer:
    """Its tokens overlap: a stop string may come as other tokens than its own."""

    eos_token_id, additional_stop_token_ids = None, None

    def encode(self, text, **kwargs):
        ids = []
        while text:
            fits = [i for i, piece in enumerate(PIECES) if text.startswith(piece)]
            ids.append(max(fits, key=lambda i: len(PIECES[i])))
            text = text[len(PIECES[ids[-1]]) :]
        return ids

    def decode(self, ids):
        return "".join(PIECES[i] for i in ids)


@pytest.fixture(autouse=True)
def served_by(monkeypatch):
    monkeypatch.setattr(endings, "is_cast", lambda: True)


def request(grammar_ends_at=None, **fields):
    params = SamplingParams(**{"max_new_tokens": 12, **fields})
    params.normalize(Tokenizer())
    req = Req("a", "", array("q", [1, 2]), params, vocab_size=len(PIECES))
    req.tokenizer = Tokenizer()
    if grammar_ends_at is not None:
        req.grammar = SimpleNamespace(taken=0)
        req.grammar.is_terminated = lambda: req.grammar.taken >= grammar_ends_at
    return req


def ended(req, tokens, sizes, update):
    """Return answer and reason of the first of these steps that ends it."""
    for size in sizes:
        step, tokens = tokens[:size], tokens[size:]
        if req.grammar is not None:
            step = step[: max(0, 9 - req.grammar.taken)]
            req.grammar.taken += len(step)
        before = [*req.output_ids, *step]
        req.output_ids.extend(step)
        update(req, len(step))
        assert list(req.output_ids) == before  # SGLang reads the tokens of the step from its end
        if req.finished():
            return list(req.output_ids_through_stop), req.finished_reason.to_json()
    raise AssertionError("the length ends every answer")


def as_hooked(req, size):
    endings.end_as_plain(Req.update_finish_state, req, size)


CASES = {
    "two strings": {"stop": ["ca b", "bc"]},
    "string and token": {"stop": ["abc"], "stop_token_ids": [5]},
    "string of other tokens": {"stop": ["aba"]},
    "regex and string": {"stop": ["bb"], "stop_regex": r"a[bc]{2}"},
    "regex at the end": {"stop_regex": r"b +$"},
    "two regexes": {"stop_regex": ["cc", "ab?a"]},
    "tokens alone": {"stop_token_ids": [3, 5]},
}


@pytest.mark.parametrize("has_grammar", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("name", CASES)
def test_an_answer_ends_at_the_same_token(name, has_grammar):
    rng = random.Random(name)
    reasons = set()
    for _ in range(300):
        tokens = [rng.randrange(len(PIECES)) for _ in range(12)]
        sizes = [rng.randint(1, 6) for _ in range(12)]
        made = {**CASES[name], "grammar_ends_at": 9 if has_grammar else None}
        expected = ended(request(**made), tokens, [1] * 12, Req.update_finish_state)
        assert ended(request(**made), tokens, sizes, as_hooked) == expected
        reasons.add((expected[1]["type"], str(expected[1].get("matched"))))
    assert len(reasons) > 1


def test_sglang_alone_ends_some_elsewhere():
    """What this is for, in one step: a string after a stop token, and the later of two strings."""
    for fields, tokens, length in (
        ({"stop": ["bb"], "stop_token_ids": [5]}, [0, 5, 1, 1], 2),
        ({"stop": ["cc", "ab"]}, [2, 3, 3, 0], 1),
    ):
        answers = [
            ended(request(**fields), tokens, [4], how)
            for how in (Req.update_finish_state, as_hooked)
        ]
        assert len(answers[0][0]) > len(answers[1][0]) == length


@pytest.mark.parametrize("fields", [{"max_new_tokens": 3}, {"stop": ["c"]}], ids=str)
def test_no_more_tokens_are_reasoning_than_the_answer_has(fields):
    req = request(**fields)
    for step in ([0, 1], [3, 0, 1]):
        req.output_ids.extend(step)
        req.update_reasoning_tokens(step, [9])
        as_hooked(req, len(step))
    assert req.finished() and req.reasoning_tokens == 3


@pytest.mark.parametrize(("length", "left"), [(0, []), (1, [-0.5])])
def test_an_answer_of_no_tokens_has_no_log_probability(length, left):
    req = request(max_new_tokens=length)
    req.logprob = SimpleNamespace(output_token_logprobs_val=[-0.5], output_token_logprobs_idx=[3])
    endings.drop_unsaid_logprob(None, None, 0, req, 7, [3], 7, None)
    assert req.logprob.output_token_logprobs_val == left
    assert len(req.logprob.output_token_logprobs_idx) == len(left)


def test_a_session_goes_on_from_what_was_said():
    said = request(max_new_tokens=2)
    said.output_ids.extend([0, 1, 3, 4])
    as_hooked(said, 4)
    unfinished = request()
    unfinished.output_ids.extend([0, 1, 3])
    nodes = {str(i): SimpleNamespace(req=req) for i, req in enumerate((said, unfinished))}
    endings.forget_unsaid(SimpleNamespace(req_nodes=nodes))
    assert list(said.output_ids) == [0, 1] and list(unfinished.output_ids) == [0, 1, 3]


def test_servers_of_other_algorithms_are_left_alone(monkeypatch):
    monkeypatch.setattr(endings, "is_cast", lambda: False)
    calls = []
    req = request(stop=["ab"])
    req.output_ids.extend([0, 1, 1])
    endings.end_as_plain(lambda *args: calls.append(args), req, 3)
    assert calls == [(req, 3)]
