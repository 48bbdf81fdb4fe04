"""docs/configuration.md, made from the tables themselves, so that page and code cannot drift apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from millhand.config import DEFAULT_PATH, Config
from millhand.config_changes import FIXED_SECTIONS

INTRODUCTION = f"""\
# Configuration

One TOML file: `{DEFAULT_PATH}`, or what `--config` or `MILLHAND_CONFIG` names. Every key has a default, unknown keys
are refused. A key can also come from the environment as `MILLHAND_<SECTION>__<KEY>`, for example
`MILLHAND_NODE__ID=press-7`; the environment wins. `MODEL_PATH` adds folders of models (separated by `:`), and
`CUDA_VISIBLE_DEVICES` narrows the GPUs.

`millhand config validate` checks a file, `config show` prints what holds, `config schema` prints a JSON schema for
editors, and `config reference` prints this page.

SIGHUP reads the file again. Assets, telemetry, orders, the language model, the daemon's logs and plugins that are new
change at once.
{", ".join(f"`[{name}]`" for name in FIXED_SECTIONS)},
the logs of other processes and the tables of plugins that are loaded change at the next start. Each build reads
`[workshop]` itself. `millhand check` tells what a running agent does not go by yet.
"""
LISTS = {"assets": "[[assets]]", "plugins": "[plugins.<name>]"}


def markdown() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section, field in Config.model_fields.items():
        title = LISTS.get(section, f"[{section}]")
        model = _table_of(field.annotation)
        parts.append(f"## {title}\n")
        if field.description:
            parts.append(field.description + "\n")
        if model is not None:
            parts.append("\n".join(_rows(model)) + "\n")
    return "\n".join(parts)


def _rows(model: type[BaseModel]) -> Iterator[str]:
    schema = model.model_json_schema()
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in model.model_fields.items():
        kind = _kind(schema["properties"][name], schema.get("$defs", {}))
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{name}` | {kind} | {_default(field)} | {meaning} |"


class Key(NamedTuple):
    """One key of a table, nested ones dotted: `window.length`, `registers[].address`, `rules.<name>.raise_above`."""

    name: str
    kind: str
    default: str
    """As the page writes it; `required` where there is none."""
    meaning: str


def keys(model: type[BaseModel], prefix: str = "", above: tuple[type[BaseModel], ...] = ()) -> Iterator[Key]:
    """Every key of a table and of the tables inside it. A table within itself is named, not entered again."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        kind = _kind(schema["properties"][name], schema.get("$defs", {}))
        meaning = " ".join((field.description or "").split())
        inner = _table_of(field.annotation)
        default = "see below" if isinstance(field.default, BaseModel) else _default(field)
        yield Key(prefix + name, kind.replace("`", ""), default.replace("`", ""), meaning)
        if inner is not None and inner not in (*above, model):
            yield from keys(inner, f"{prefix}{name}{_step(field.annotation)}", (*above, model))


def _step(annotation: Any) -> str:
    """What leads from a key to the keys of its table: `.`, or through a list or a mapping of tables."""
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return ".<name>."
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "[]."
    steps = [_step(argument) for argument in get_args(annotation)]
    return next((step for step in steps if step != "."), ".")


def _kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _kind(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "enum" in schema:
        return " or ".join(f"`{value}`" if value else '`""`' for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        kinds = [_kind(part, definitions) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    names = {"array": "list", "object": "table", "integer": "integer", "number": "number", "boolean": "true or false"}
    kind = str(schema.get("type", "any"))
    return names.get(kind, kind)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return "computed"
    value = field.default
    if value is None:
        return "none"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple | list | dict):
        return "empty" if not value else f"`{json.dumps(value, default=str)}`"
    if isinstance(value, float) and math.isinf(value):
        return "`inf`" if value > 0 else "`-inf`"
    return f"`{json.dumps(value, default=str)}`"


def _table_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _table_of(argument)
        if found is not None:
            return found
    return None
