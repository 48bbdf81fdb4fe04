"""The fields of OpenAI's requests: which there are, what may stand in them, and what a server must be able to do.

Servers differ in which fields they silently ignore. Here each is either understood and handed on, or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from millhand.language.launch import Ability
from millhand.serving.openai.schema import SchemaFault, check_schema

STOPS_CAP = 16
TOOLS_CAP = 128
TEXTS_CAP = 2048
"""Texts of one request for embeddings; OpenAI's own limit."""
NAME_CHARS_CAP = 64

Check = Callable[[Any], str]
"""Says what a value should be, empty where it is that."""


class Field(NamedTuple):
    """One field of a request."""

    check: Check
    ability: Ability | None = None
    """What the server must be able to do where the field asks for something."""


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> str:
        fits = type(value) in (int, float) and low <= value <= high
        return "" if fits else f"must be a number from {low:g} to {high:g}"

    return check


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str:
        fits = type(value) is int and low <= value <= high
        return "" if fits else f"must be a whole number from {low} to {high}"

    return check


def _is(kind: type, name: str) -> Check:
    return lambda value: "" if isinstance(value, kind) else f"must be {name}"


def _only(*values: Any) -> Check:
    """For what is only understood where it asks for nothing."""
    shown = " or ".join(repr(value) for value in values)
    return lambda value: "" if value in values else f"is not served here; leave it out (only {shown} can be)"


def _stop(value: Any) -> str:
    texts = [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and len(texts) <= STOPS_CAP and all(isinstance(text, str) for text in texts)
    return "" if fits else f"must be a text, or a list of at most {STOPS_CAP}"


def _stream_options(value: Any) -> str:
    fits = (
        isinstance(value, dict) and set(value) <= {"include_usage"} and type(value.get("include_usage", True)) is bool
    )
    return "" if fits else 'must be {"include_usage": true} or false'


def _response_format(value: Any) -> str:
    kinds = ("text", "json_object", "json_schema")
    if not isinstance(value, dict) or value.get("type") not in kinds:
        return f"must be an object with a type: {', '.join(kinds)}"
    if value["type"] != "json_schema":
        return ""
    wrapped = value.get("json_schema")
    if not isinstance(wrapped, dict) or "schema" not in wrapped:
        return 'of type json_schema must hold {"json_schema": {"name": …, "schema": …}}'
    return _schema_fault(wrapped["schema"])


def _tools(value: Any) -> str:
    if not isinstance(value, list) or len(value) > TOOLS_CAP:
        return f"must be a list of at most {TOOLS_CAP} tools"
    for number, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not 1 <= len(name) <= NAME_CHARS_CAP:
            return f'[{number}] must be {{"type": "function", "function": {{"name": …}}}}'
        if fault := _schema_fault(function.get("parameters") or {}):
            return f"[{number}] '{name}': parameters {fault}"
    return ""


def _tool_choice(value: Any) -> str:
    fits = value in ("none", "auto", "required") or (isinstance(value, dict) and value.get("type") == "function")
    return "" if fits else "must be 'none', 'auto', 'required', or name a function"


def _schema_fault(schema: Any) -> str:
    try:
        check_schema(schema)
    except SchemaFault as fault:
        return f"has a schema that cannot be: {fault}"
    return ""


_TEXT, _FLAG, _TABLE = _is(str, "a text"), _is(bool, "true or false"), _is(dict, "an object")
_INT32 = 2**31 - 1
_SAMPLING: Mapping[str, Field] = {
    "model": Field(_TEXT),
    "stream": Field(_FLAG),
    "stream_options": Field(_stream_options, "usage"),
    "max_tokens": Field(_whole(1, _INT32)),
    "temperature": Field(_number(0, 2)),
    "top_p": Field(_number(0, 1)),
    "frequency_penalty": Field(_number(-2, 2)),
    "presence_penalty": Field(_number(-2, 2)),
    "seed": Field(_whole(-(2**63), 2**63 - 1), "seed"),
    "stop": Field(_stop, "stop"),
    "logit_bias": Field(_TABLE),
    "n": Field(_only(1)),
    "user": Field(_TEXT),
    "response_format": Field(_response_format, "json_schema"),
    # Beyond OpenAI's own: what llama.cpp and vLLM both have, or one of them, and clients use.
    "top_k": Field(_whole(-1, _INT32)),
    "min_p": Field(_number(0, 1)),
    "typical_p": Field(_number(0, 1)),
    "repeat_penalty": Field(_number(0, 10)),
    "repetition_penalty": Field(_number(0, 10)),
    "ignore_eos": Field(_FLAG),
    "cache_prompt": Field(_FLAG),
    "min_tokens": Field(_whole(0, _INT32)),
    "millhand": Field(_TABLE),
}
CHAT: Mapping[str, Field] = {
    **_SAMPLING,
    "messages": Field(lambda value: ""),
    "max_completion_tokens": Field(_whole(1, _INT32)),
    "tools": Field(_tools, "tools"),
    "tool_choice": Field(_tool_choice, "tools"),
    "parallel_tool_calls": Field(_FLAG, "tools"),
    "logprobs": Field(_FLAG, "logprobs"),
    "top_logprobs": Field(_whole(0, 20), "logprobs"),
    "reasoning_effort": Field(_TEXT),
    "chat_template_kwargs": Field(_TABLE),
    "metadata": Field(_TABLE),
    "prompt_cache_key": Field(_TEXT),
    "safety_identifier": Field(_TEXT),
    "modalities": Field(_only(["text"])),
    "store": Field(_only(False)),
    "service_tier": Field(_only("auto", "default")),
    "verbosity": Field(_only("medium")),
}
COMPLETIONS: Mapping[str, Field] = {
    **_SAMPLING,
    "prompt": Field(lambda value: ""),
    "logprobs": Field(_whole(0, 20), "logprobs"),
    "echo": Field(_FLAG),
    "suffix": Field(_only("")),
    "best_of": Field(_only(1)),
}
EMBEDDINGS: Mapping[str, Field] = {
    "model": Field(_TEXT),
    "input": Field(lambda value: ""),
    "encoding_format": Field(_only("float", "base64")),
    "dimensions": Field(_whole(1, 1 << 20)),
    "user": Field(_TEXT),
}
ASKS_NOTHING: Mapping[str, Any] = {
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "logprobs": False,
    "parallel_tool_calls": True,
    "stream_options": {"include_usage": False},
    "stop": [],
}
"""Values of fields that ask a server for nothing, whatever it is able to do."""
