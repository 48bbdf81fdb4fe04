"""`millhand config`: show, validate and describe the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from millhand.cli.output import Output, json_option, plural, silence_registry


@click.group("config")
def command() -> None:
    """Show, validate and describe the configuration."""


@command.command("show")
@json_option
@click.pass_context
def show(ctx: click.Context) -> None:
    """Show every key with the value that holds, from file, environment and defaults."""
    output: Output = ctx.obj
    data = mask(output.config().model_dump(mode="json"))
    output.emit(data, _toml_lines("", data))


@command.command("validate")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@json_option
@click.pass_context
def validate(ctx: click.Context, path: Path | None) -> None:
    """Check the configuration (or the file PATH), its plugins' tables, its assets' options and its models."""
    from millhand.assets import faulty_assets
    from millhand.config import load_config
    from millhand.errors import ConfigError
    from millhand.registry import Registry
    from millhand.serving.repository import Repository

    output: Output = ctx.obj
    config = load_config(path or output.config_path)
    silence_registry()
    registry = Registry()
    registry.load(config.plugin_tables())
    failed = [plugin for plugin in registry.plugins.values() if plugin.state == "failed"]
    faults = [(f"plugin '{plugin.name}': {plugin.error}", plugin.hint) for plugin in failed]
    faults += [(error.message, error.hint) for error in faulty_assets(config, registry)]
    shipped = [Path(folder) for _, folder in registry.collect("millhand_models")]
    repository = Repository.from_config(config, shipped)
    # A root that is not there may well be there on the node that the file is for.
    faults += [(bad.message, bad.hint) for bad in repository.bad if bad.path not in repository.roots]
    if faults:
        hints = dict.fromkeys(hint for _, hint in faults if hint)
        raise ConfigError("\n".join(message for message, _ in faults), hint="\n".join(hints))
    output.emit(
        {"valid": True, "assets": len(config.assets)},
        f"The configuration is valid: {plural(len(config.assets), 'asset')}.",
    )


@command.command("schema")
@click.pass_obj
def schema(output: Output) -> None:
    """Print the JSON schema of the configuration (for editors)."""
    from millhand.config import Config

    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@command.command("reference")
@click.pass_obj
def reference(output: Output) -> None:
    """Print every key with type, default and meaning, as Markdown."""
    from millhand.reference import markdown

    click.echo(markdown(), nl=False)


def mask(value: Any, key: str = "") -> Any:
    """Hide the values of keys that hold secrets."""
    if isinstance(value, dict):
        return {name: mask(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [mask(item, key) for item in value]
    from millhand.validation import SECRET_SHOWN, is_secret

    return SECRET_SHOWN if value and is_secret(key) else value


def _toml_lines(prefix: str, table: dict[str, Any]) -> list[str]:
    """Write `table` as TOML text; None, which TOML lacks, becomes a comment."""
    plain = {k: v for k, v in table.items() if not isinstance(v, dict) and not _is_tables(v)}
    lines = [f"[{prefix}]"] if prefix and plain else []
    lines += [f"# {key} =" if value is None else f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            lines += ["", *_toml_lines(name, value)] if value else []
        elif _is_tables(value):
            for item in value:
                lines += ["", f"[[{name}]]", *[line for line in _toml_lines(name, item) if line != f"[{name}]"]]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return json.dumps(value)
