"""`millhand plugin`: list, show and test plugins."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from millhand.cli.output import LINE_CHARACTERS, Output, json_option, labelled, silence_registry, table, wrapped
from millhand.errors import PluginError, suggestion

if TYPE_CHECKING:
    from millhand.reference import Key
    from millhand.registry import PluginState, Registry


@click.group("plugin")
def command() -> None:
    """List, show and test plugins."""


@command.command("list")
@json_option
@click.pass_context
def list_(ctx: click.Context) -> None:
    """List every installed plugin and its state under this configuration."""
    output: Output = ctx.obj
    plugins = [plugin.to_dict() for plugin in _registry(output).listing()]
    rows = [
        (p["name"], p["state"], p["distribution"], p["version"], p["error"].splitlines()[0] if p["error"] else "")
        for p in plugins
    ]
    output.emit(plugins, table(["name", "state", "package", "version", "error"], rows, LINE_CHARACTERS))


@command.command("show")
@click.argument("name")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show one plugin: its hooks, its options with their defaults, its last error."""
    from millhand.reference import keys

    output: Output = ctx.obj
    registry = _registry(output)
    plugin = _find(registry, name)
    tables: dict[str, Any] = {}
    try:
        tables = registry.tables(name)
        plugin.hooks = plugin.hooks or registry.hooks(name)
    except PluginError as error:
        plugin.error, plugin.hint = plugin.error or error.message, plugin.hint or error.hint
    options = {title: list(keys(model)) for title, model in tables.items()}
    lines = [
        *labelled("Plugin", f"{plugin.name} ({plugin.distribution} {plugin.version}), {plugin.state}"),
        *labelled("Module", plugin.module),
        *labelled("Hooks", ", ".join(plugin.hooks) or "none"),
        *labelled("Error", plugin.error),
        *labelled("Try", plugin.hint if plugin.error else ""),
    ]
    for title, found in options.items():
        lines += ["", f"Options of {title}", *(line for key in found for line in _key_lines(key))]
    data = {title: [key._asdict() for key in found] for title, found in options.items()}
    output.emit({**plugin.to_dict(), "options": data}, lines)


@command.command("test")
@click.argument("name")
@click.option("--asset", help="Which of the configured assets to read, where the plugin has adapters.")
@click.option("--timeout", "timeout_s", default=10.0, show_default=True, help="Give up after so many seconds.")
@json_option
@click.pass_context
def test(ctx: click.Context, name: str, asset: str | None, timeout_s: float) -> None:
    """Load one plugin, call its hooks, and read one batch from each of its configured assets; nothing is stored."""
    from millhand.assets import adapter_kinds, create_adapter

    output: Output = ctx.obj
    config = output.config()
    registry = _registry(output, {name: {**config.plugins.get(name, {}), "required": True}})
    plugin = _find(registry, name)
    results: dict[str, Any] = {"plugin": plugin.name, "hooks": {}, "assets": {}}
    for hook in plugin.hooks:
        if hook != "millhand_config":
            results["hooks"][hook] = [_label(item) for owner, item in registry.collect(hook) if owner == name]
    if plugin.state == "degraded":
        raise PluginError(f"plugin '{name}': {plugin.error}", hint=plugin.hint)
    kinds = adapter_kinds(registry)
    for settings in config.assets:
        if settings.adapter.split(".")[0] == name and asset in (None, settings.name):
            adapter = create_adapter(settings, kinds)
            results["assets"][settings.name] = asyncio.run(_read_once(adapter, timeout_s))
    lines = [f"{hook}: {', '.join(items) or 'nothing'}" for hook, items in results["hooks"].items()]
    for asset_name, batch in results["assets"].items():
        lines.append(f"{asset_name}: {batch['readings']} readings, {batch['waveforms']} waveforms")
        lines += [f"  {key} = {value}" for key, value in batch["values"].items()]
    output.emit(results, [*lines, f"Plugin {name} works."])


async def _read_once(adapter: Any, timeout_s: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout_s):
            await adapter.open(None)
            async for batch in adapter.batches():
                values = {reading.name: f"{reading.value} {reading.unit}" for reading in batch.readings}
                return {"readings": len(batch.readings), "waveforms": len(batch.waveforms), "values": values}
    except TimeoutError as error:
        raise PluginError(f"no batch came within {timeout_s:g} s", hint="check the asset, or give --timeout") from error
    finally:
        await adapter.close()
    return {"readings": 0, "waveforms": 0, "values": {}}


def _registry(output: Output, extra: dict[str, dict[str, Any]] | None = None) -> Registry:
    from millhand.registry import Registry

    silence_registry()  # the command itself shows what failed
    registry = Registry()
    registry.load({**output.config().plugin_tables(), **(extra or {})})
    return registry


def _find(registry: Registry, name: str) -> PluginState:
    plugins = {plugin.name: plugin for plugin in registry.listing()}
    if name not in plugins:
        raise PluginError(f"plugin '{name}' is not installed{suggestion(name, plugins)}", hint="millhand plugin list")
    return plugins[name]


def _key_lines(key: Key) -> list[str]:
    default = key.default if key.default in ("required", "computed") else f"default {key.default}"
    head = wrapped(f"{key.name}: {key.kind}, {default}", "  ", " " * 6)
    return head + wrapped(key.meaning, " " * 6, " " * 6)


def _label(item: Any) -> str:
    return str(getattr(item, "name", item))
