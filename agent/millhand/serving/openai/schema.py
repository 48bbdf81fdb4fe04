"""Looks at a JSON schema before a language server compiles it: wrong ones are named, those that explode are refused.

Servers turn a schema into a grammar (llama.cpp) or an automaton (xgrammar in vLLM), whose size and time grow with the
schema's nodes and with its repetitions. Schemas of real answers stay far below these limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

DEPTH_CAP = 32
NODES_CAP = 1000
ENUM_CAP = 1000
REPEAT_CAP = 2000
"""llama.cpp refuses more repetitions of one rule than this (`MAX_REPETITION_THRESHOLD`)."""
PATTERN_CAP = 512
TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_MAPS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


class SchemaFault(ValueError):
    """What is wrong with a schema, and where."""


def check_schema(schema: Any) -> None:
    """Raises SchemaFault naming the place, such as `properties.steps.items: type 'text' is not known`."""
    waiting: list[tuple[str, Any, int]] = [("", schema, 1)]
    nodes = 0
    while waiting:
        place, node, depth = waiting.pop()
        nodes += 1
        if nodes > NODES_CAP:
            raise SchemaFault(f"it has more than {NODES_CAP} parts")
        if depth > DEPTH_CAP:
            raise SchemaFault(f"it is nested deeper than {DEPTH_CAP}")
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            raise SchemaFault(f"{place or 'it'}: a schema is an object, not {_kind(node)}")
        for fault in _faults(node, schema):
            raise SchemaFault(f"{place}: {fault}" if place else fault)
        waiting += [(f"{place}.{name}".lstrip("."), inner, depth + 1) for name, inner in _inner(node)]


def _inner(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one."""
    for key in _MAPS:
        for name, inner in node.get(key, {}).items():
            yield f"{key}.{name}", inner
    for key in _LISTS:
        for number, inner in enumerate(node.get(key, ())):
            yield f"{key}.{number}", inner
    for key in _SINGLES:
        if key in node:
            if isinstance(node[key], list):  # the form of `items` before draft 2020-12
                yield from ((f"{key}.{number}", inner) for number, inner in enumerate(node[key]))
            else:
                yield key, node[key]


def _faults(node: Mapping[str, Any], root: Any) -> Iterator[str]:
    types = node.get("type", [])
    for kind in types if isinstance(types, list) else [types]:
        if kind not in TYPES:
            yield f"type {kind!r} is not known"
    for key in _MAPS:
        if not isinstance(node.get(key, {}), dict):
            yield f"{key} is an object, not {_kind(node[key])}"
    for key in (*_LISTS, "required", "enum"):
        if not isinstance(node.get(key, []), list):
            yield f"{key} is a list, not {_kind(node[key])}"
    if "enum" in node and not 1 <= len(node["enum"]) <= ENUM_CAP:
        yield f"enum has {len(node['enum'])} values; 1 to {ENUM_CAP} can be"
    if not all(isinstance(name, str) for name in node.get("required", ())):
        yield "required is a list of names"
    yield from _count_faults(node)
    yield from _text_faults(node, root)


def _count_faults(node: Mapping[str, Any]) -> Iterator[str]:
    for key in _REPEATS:
        count = node.get(key, 0)
        if type(count) is not int or count < 0:
            yield f"{key} is a whole number from 0 on"
        elif count > REPEAT_CAP:
            yield f"{key} = {count} is more than {REPEAT_CAP}"


def _text_faults(node: Mapping[str, Any], root: Any) -> Iterator[str]:
    pattern, reference = node.get("pattern", ""), node.get("$ref", "#")
    if not isinstance(pattern, str) or len(pattern) > PATTERN_CAP:
        yield f"pattern is a text of at most {PATTERN_CAP} characters"
    else:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            yield "pattern is no regular expression"
    if not isinstance(reference, str) or not reference.startswith("#"):
        yield "$ref may only point into the schema itself, as '#/$defs/name'"
    elif not _found(reference, root):
        yield f"$ref '{reference}' points at nothing"


def _found(reference: str, root: Any) -> bool:
    node = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _kind(value: Any) -> str:
    kinds = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        type(None): "null",
    }
    return kinds.get(type(value), "an object")
