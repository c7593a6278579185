"""Tool calls and reasoning of chats, streamed or not: as from a plain server."""

import json
from typing import Any

import pytest
from openai import OpenAI

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a function.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 10},
                "depth": {"enum": [1, 20, 300]},
            },
            "required": ["name", "depth"],
            "additionalProperties": False,
        },
    },
}
OPTIONS = {
    "model": "default",
    "messages": [{"role": "user", "content": "Write a function that adds two numbers."}],
    "temperature": 0.0,
    "max_tokens": 80,
}
# A model that knows no such formats writes them where a grammar leaves it nothing else.
THOUGHT = "<think>[a-z =]{4,12}</think>[a-z ]{4,12}\n"
CALL = r'<tool_call>\n\{"name": "find", "arguments": \{"depth": [0-9]{1,3}\}\}\n</tool_call>'
CHATS: dict[str, dict[str, Any]] = {
    "tool required": {"tools": [TOOL], "tool_choice": "required"},
    "tool by itself": {"tools": [TOOL], "extra_body": {"regex": CALL}},
    "tool not used": {"tools": [TOOL]},
    "reasoning": {"extra_body": {"regex": THOUGHT}},
    "reasoning and tool": {"tools": [TOOL], "extra_body": {"regex": THOUGHT + CALL}},
    "reasoning without end": {"extra_body": {"chat_template_kwargs": {"thinking": True}}},
}


def client_of(server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300.0)


def chat(client: OpenAI, **options: Any) -> dict[str, Any]:
    """Return what a chat answers: its content, its reasoning, its calls, and why it ended."""
    choice = client.chat.completions.create(**{**OPTIONS, **options}).choices[0]
    message = choice.message
    return {
        "content": (message.content or "").strip(),
        "reasoning": (getattr(message, "reasoning_content", None) or "").strip(),
        "calls": [(c.function.name, c.function.arguments) for c in message.tool_calls or []],
        "reason": choice.finish_reason,
    }


def streamed_chat(client: OpenAI, **options: Any) -> dict[str, Any]:
    """Put together what a streamed chat answers, as `chat`, which drops space at the ends."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "reason": None}
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**{**OPTIONS, **options}, stream=True):
        for choice in chunk.choices:
            found["content"] += choice.delta.content or ""
            found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                pieces = calls.setdefault(call.index, ["", ""])
                pieces[0] += call.function.name or ""
                pieces[1] += call.function.arguments or ""
            found["reason"] = choice.finish_reason or found["reason"]
    found |= {key: found[key].strip() for key in ("content", "reasoning")}
    return {**found, "calls": [tuple(calls[index]) for index in sorted(calls)]}


def finds_what_was_asked_for(name: str, found: dict[str, Any]) -> bool:
    """Return whether the parsers found in an answer what its grammar made the model write."""
    calls = [(tool, json.loads(arguments)) for tool, arguments in found["calls"]]
    depths = [list(arguments) for _, arguments in calls]
    return {
        # Of the arguments SGLang asks for no more than JSON.
        "tool required": [tool for tool, _ in calls] == ["find"],
        "tool by itself": depths == [["depth"]] and found["reason"] == "tool_calls",
        "tool not used": not calls and bool(found["content"]),
        "reasoning": bool(found["reasoning"] and found["content"]) and not calls,
        "reasoning and tool": bool(found["reasoning"]) and depths == [["depth"]],
        "reasoning without end": bool(found["reasoning"]) and not found["content"],
    }[name]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_that_of_plain_decoding(plain, cast, name):
    ours = chat(client_of(cast), **CHATS[name])
    assert finds_what_was_asked_for(name, ours), ours
    assert ours == chat(client_of(plain), **CHATS[name])
    # Chunks of several tokens are parsed as those of one are.
    assert streamed_chat(client_of(cast), **CHATS[name]) == ours
    assert streamed_chat(client_of(plain), **CHATS[name]) == ours
