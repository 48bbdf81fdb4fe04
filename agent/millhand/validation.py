"""One way to check an owner's, a profile's or a plugin's table: unknown keys are refused, errors name key and value."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from millhand.errors import ConfigError, suggestion

Table = TypeVar("Table", bound=BaseModel)

SECRET_WORDS = ("password", "secret", "token", "passphrase")
NO_SECRETS = ("_file", "_env", "_s", "_per_minute", "context_tokens", "max_tokens")
"""Ends of names that hold such a word and no secret."""
SECRET_SHOWN = "(not shown)"  # noqa: S105 - a placeholder, not a secret


class StrictTable(BaseModel):
    """Base of every table: unknown keys are refused, values are frozen, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError naming file, line and remedy."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"'{path}' does not exist", hint="give the path of an existing file") from error
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}", hint="check its permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}", hint="mend the named line") from error


def validate(
    model: type[Table], data: Any, source: str, variables: Mapping[tuple[str, ...], str] | None = None
) -> Table:
    """Check `data` against `model`. Raises ConfigError that lists every fault as `source: key 'a.b' ...`.

    variables: where keys of `data` come from the environment, key path -> variable, to be named beside the key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        items = error.errors(include_url=False)
        lines = [_describe(model, item, source) + _set_by(item["loc"], variables or {}) for item in items]
        raise ConfigError("\n".join(lines), hint="mend the keys named above") from error


def is_secret(key: str) -> bool:
    """Whether the value of a key of this name must not be shown; where a secret lies may be, and what a language model
    measures in tokens.
    """
    return any(word in key.lower() for word in SECRET_WORDS) and not key.endswith(NO_SECRETS)


def _set_by(key: tuple[int | str, ...], variables: Mapping[tuple[str, ...], str]) -> str:
    """The variables that set the faulty key, or something in the faulty table."""
    names = [name for path, name in variables.items() if path[: len(key)] == key[: len(path)]]
    return f" (set by {', '.join(names)})" if key and names else ""


def _describe(model: type[BaseModel], item: Any, source: str) -> str:
    parts = item["loc"]
    key = ".".join(str(part) for part in parts)
    if item["type"] == "extra_forbidden":
        return f"{source}: key '{key}' is not known{suggestion(str(parts[-1]), _fields(model, parts[:-1]))}"
    if item["type"] == "missing":
        return f"{source}: key '{key}' is missing"
    value = item.get("input")
    message = item["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    if not parts:
        return f"{source}: {message}"
    if isinstance(value, dict) and item["type"] == "value_error":
        return f"{source}: table '{key}': {message}"
    if item["type"] in _EXAMPLES:
        message = f"{message}; {_EXAMPLES[item['type']]}"
    shown = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    if is_secret(str(parts[-1])):
        shown = SECRET_SHOWN
    return f"{source}: key '{key}' = {shown[:80]}: {message}"


_EXAMPLES = {
    "int_parsing": "give a whole number without a unit, such as 1_000_000",
    "int_type": "give a whole number without a unit, such as 1_000_000",
    "int_from_float": "give a whole number, such as 1_000_000",
    "float_parsing": "give a number without a unit, such as 2.5",
    "float_type": "give a number without a unit, such as 2.5",
    "bool_parsing": "give true or false",
    "bool_type": "give true or false",
}
"""pydantic's types of errors that say what is wrong, and not how it would be right."""


def _fields(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The field names of the table at `path` inside `model`."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        current = _inner_model(field.annotation) or current
    return list(getattr(current, "model_fields", {}))


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None
