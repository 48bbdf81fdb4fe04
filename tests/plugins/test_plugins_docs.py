"""Keeps each plugin's sample.toml and README.md in step with its pydantic models."""

import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import millhand_plugins
from millhand.validation import validate

FOLDERS = sorted(
    folder for root in millhand_plugins.__path__ for folder in Path(root).iterdir() if (folder / "__init__.py").exists()
)
COMMENTED_KEY = re.compile(r"^# ?(?=[A-Za-z0-9_]+ = |\[)", re.MULTILINE)


def models(name: str) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Where in the owner's config which model of this plugin stands."""
    module = importlib.import_module(f"millhand_plugins.{name}")
    config = None
    if hasattr(module, "millhand_config"):
        model = module.millhand_config()
        yield ("plugins", name), model
        config = model() if not any(field.is_required() for field in model.model_fields.values()) else None
    if hasattr(module, "millhand_adapters"):
        arguments = {"config": config}
        wanted = module.millhand_adapters.__code__.co_varnames[: module.millhand_adapters.__code__.co_argcount]
        for kind in module.millhand_adapters(*(arguments[argument] for argument in wanted)):
            yield ("assets", kind.name), kind.options


def table(document: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    if path[0] == "plugins":
        return document.get("plugins", {}).get(path[1], {})
    return next(asset["options"] for asset in document["assets"] if asset["adapter"] == path[1])


def inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := inner_model(argument))), None)


def first_table(value: Any) -> dict[str, Any]:
    return value[0] if isinstance(value, list) else value


def key_of(model: type[BaseModel], name: str) -> str:
    """A key that several tables inherit needs to be shown in one of them only: it is named by the first owner."""
    owners = (base for base in reversed(model.__mro__) if issubclass(base, BaseModel))
    return next(f"{base.__name__}.{name}" for base in owners if name in base.model_fields)


def known_keys(model: type[BaseModel]) -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(key_of(model, name))
        if (inner := inner_model(field.annotation)) is not None:
            keys |= known_keys(inner)
    return keys


def shown_keys(model: type[BaseModel], document: dict[str, Any]) -> set[str]:
    keys = set()
    for name, value in document.items():
        keys.add(key_of(model, name))
        if (inner := inner_model(model.model_fields[name].annotation)) is not None:
            for item in value if isinstance(value, list) else [value]:
                keys |= shown_keys(inner, item)
    return keys


def without_examples(model: type[BaseModel], given: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """`whole` less the commented keys that are unset by default: TOML cannot say so, they show an example."""
    fields = model.model_fields
    return {
        name: value
        for name, value in whole.items()
        if name in given or name not in fields or fields[name].get_default(call_default_factory=True) is not None
    }


def wrong_defaults(shown: BaseModel, given: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys that stand in the sample as a comment, with a value that is not the default."""
    for name, field in type(shown).model_fields.items():
        value = getattr(shown, name)
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, BaseModel):
            yield from wrong_defaults(first, first_table(given.get(name, {})), f"{path}{name}.")
        elif name not in given and value != field.get_default(call_default_factory=True):
            yield f"{path}{name} = {value!r}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_sample_readme_and_model_agree(folder: Path) -> None:
    found = list(models(folder.name))
    if not found:
        pytest.skip("it takes no options")
    if not (folder / "README.md").exists():
        pytest.skip("it has no README.md yet: still being written")
    text = (folder / "sample.toml").read_text()
    given, whole = tomllib.loads(text), tomllib.loads(COMMENTED_KEY.sub("", text))
    readme = (folder / "README.md").read_text()
    for path, model in found:
        label = f"{folder.name}: {'.'.join(path)}"
        validate(model, table(given, path), label)
        shown = validate(model, without_examples(model, table(given, path), table(whole, path)), label)
        hidden = known_keys(model) - shown_keys(model, table(whole, path))
        assert not hidden, f"{label}: keys that sample.toml does not show"
        assert not list(wrong_defaults(shown, table(given, path))), f"{label}: commented, but not the default"
        names = {key.rpartition(".")[2] for key in known_keys(model)}
        absent = [name for name in names if f"`{name}`" not in readme]
        assert not absent, f"{label}: keys that README.md does not explain"
