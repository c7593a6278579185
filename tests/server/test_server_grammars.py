"""Grammars hold at every node of a tree: answers are plain decoding's, or valid if sampled."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.server.client import answers_of, generate, in_parallel

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_TOKENS = 64


class Grammar(NamedTuple):
    """What a request says, and what holds for the text of every answer."""

    fields: dict[str, Any]
    is_valid: Callable[[str], bool]
    ends: bool = True  # by itself; else the answer goes on to its last token


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "values": {"type": "array", "items": {"enum": [1, 20, 300]}, "minItems": 2, "maxItems": 4},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "values", "ok"],
    "additionalProperties": False,
}


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    name, values = value["name"], value["values"]
    return (
        list(value) == ["name", "values", "ok"]
        and isinstance(name, str)
        and len(name) <= 8
        and 2 <= len(values) <= 4
        and set(values) <= {1, 20, 300}
        and isinstance(value["ok"], bool)
    )


def calls_are_closed(text: str) -> bool:
    """Return whether each parenthesis opens one word and closes, unless the answer ends there."""
    return re.fullmatch(r"([^(]|\([a-z]{1,8}\))*(\([a-z]{0,8})?", text) is not None


CALLS = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["("],
        "tags": [
            {"begin": "(", "content": {"type": "regex", "pattern": "[a-z]{1,8}"}, "end": ")"},
        ],
    },
}
TAGS = {
    "type": "structural_tag",
    "format": {
        "type": "sequence",
        "elements": [
            {
                "type": "tag",
                "begin": "<f>",
                "content": {"type": "json_schema", "json_schema": {"enum": ["yes", "no", 7]}},
                "end": "</f>",
            },
            {"type": "regex", "pattern": "[a-z ]{4,30}\\n"},
        ],
    },
}
EBNF = 'root ::= "x = " [0-9]{1,3} "\\n" ("y = " [a-z]{2,8} "\\n"){1,3}'
GRAMMARS = {
    "regex": Grammar(
        {"regex": r"[a-z ]{10,40}\n"}, lambda text: bool(re.fullmatch(r"[a-z ]{10,40}\n", text))
    ),
    "json_schema": Grammar({"json_schema": json.dumps(SCHEMA)}, fits_schema),
    "ebnf": Grammar(
        {"ebnf": EBNF},
        lambda text: bool(re.fullmatch(r"x = [0-9]{1,3}\n(y = [a-z]{2,8}\n){1,3}", text)),
    ),
    "structural_tag": Grammar(
        {"structural_tag": json.dumps(TAGS)},
        lambda text: bool(re.fullmatch(r'<f>("yes"|"no"|7)</f>[a-z ]{4,30}\n', text)),
    ),
    "structural_tag in free text": Grammar(
        {"structural_tag": json.dumps(CALLS)}, calls_are_closed, ends=False
    ),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_greedy_answer_is_that_of_plain_decoding(plain, cast, prompts, name):
    fields = {**GRAMMARS[name].fields, "ignore_eos": False}
    expected = answers_of(plain, prompts[:6], NUM_TOKENS, **fields)
    assert answers_of(cast, prompts[:6], NUM_TOKENS, **fields) == expected
    assert answers_of(cast, prompts[:1], NUM_TOKENS, **fields) == expected[:1]
    for _, text, reason in expected:
        assert GRAMMARS[name].is_valid(text), text
        assert reason["type"] == "stop" or not GRAMMARS[name].ends


@pytest.mark.parametrize("name", GRAMMARS)
def test_sampled_answers_are_valid(cast, prompts, name):
    grammar = GRAMMARS[name]
    fields = {**grammar.fields, "ignore_eos": False, "temperature": 1.0}
    found = answers_of(cast, prompts[:8], NUM_TOKENS, **fields)
    for _, text, reason in found:
        assert grammar.is_valid(text), text
        assert reason["type"] == "stop" or not grammar.ends
    assert len({text for _, text, _ in found}) > 1


def test_grammars_of_one_batch_keep_apart(plain, cast, prompts):
    """Also beside requests without one, and those that are decoded plainly."""
    free = [{}, {"frequency_penalty": 1.0}, {"temperature": 1.0}]
    asked = [{**grammar.fields, "ignore_eos": False} for grammar in GRAMMARS.values()]
    asked += [{**fields, "frequency_penalty": 0.3} for fields in asked] + free

    def ask(server, index: int) -> list[tuple]:
        return answers_of(server, [prompts[index]], NUM_TOKENS, **asked[index])

    greedy = range(len(asked) - 1)
    expected = [ask(plain, index) for index in greedy]
    found = in_parallel(lambda index: ask(cast, index), range(len(asked)), workers=len(asked))
    assert found[:-1] == expected


def test_drafts_are_accepted_under_a_grammar(cast, prompts):
    meta = generate(cast, prompts[0], max_new_tokens=NUM_TOKENS, ebnf=EBNF)["meta_info"]
    assert meta["spec_verify_ct"] < meta["completion_tokens"] - 1


def test_a_grammar_begins_where_reasoning_ends(plain, cast):
    """SGLang leaves the tokens before `</think>` free, which may lie in the midst of a tree."""
    # The model repeats what it reads, the end of reasoning too.
    prompts = ["<think>" + "x</think>\n<think>" * 10, "x</think>" * 10, "</think>" * 10]
    fields = {"regex": r"(x = [0-9]{1,2}\n){2,4}", "ignore_eos": False, "require_reasoning": True}
    expected = answers_of(plain, prompts, NUM_TOKENS, **fields)
    for _, text, _ in expected:
        assert re.fullmatch(r"[^=]*</think>(x = [0-9]{1,2}\n){2,4}", text), text
    assert answers_of(cast, prompts, NUM_TOKENS, **fields) == expected
    for prompt, answer in zip(prompts, expected, strict=True):
        assert answers_of(cast, [prompt], NUM_TOKENS, **fields) == [answer]
