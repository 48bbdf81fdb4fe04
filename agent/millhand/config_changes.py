"""What a configuration says otherwise than the one that a daemon runs by, and what it takes to go by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from millhand.config import Config

if TYPE_CHECKING:
    from millhand.registry import PluginState

# What only a restart can change: the daemon's own place, where it listens, what it opens at its start.
FIXED_SECTIONS = ("node", "store", "recording", "http", "grpc", "gateway", "tracing", "models", "pack", "knowledge")
READ_BY_EACH_BUILD = ("workshop",)


class ConfigChanges(NamedTuple):
    """Sections as the file writes them, `[http]` or `[plugins.opcua]`."""

    reload: list[str]
    """What the daemon takes up where it reads its configuration again (SIGHUP)."""
    restart: list[str]
    """What it takes up at its next start."""


def config_changes(old: Config, new: Config, loaded: Sequence[PluginState]) -> ConfigChanges:
    """Compare two configurations. `loaded`: the plugins at work, each of which keeps its table until a restart."""
    sections = [name for name in Config.model_fields if name not in ("plugins", *READ_BY_EACH_BUILD)]
    changed = [name for name in sections if getattr(new, name) != getattr(old, name)]
    old_tables, new_tables, names = old.plugin_tables(), new.plugin_tables(), {plugin.name for plugin in loaded}
    fresh = [name for name, table in new_tables.items() if name not in names and old_tables.get(name) != table]
    kept = [plugin.name for plugin in loaded if _differs(plugin, new_tables.get(plugin.name))]
    return ConfigChanges(
        [f"[[{name}]]" if name == "assets" else f"[{name}]" for name in changed if name not in FIXED_SECTIONS]
        + [f"[plugins.{name}]" for name in fresh],
        [f"[{name}]" for name in changed if name in FIXED_SECTIONS] + [f"[plugins.{name}]" for name in kept],
    )


def _differs(plugin: PluginState, table: Mapping[str, Any] | None) -> bool:
    """`table`: None where the configuration does not name the plugin, be it by an asset's adapter."""
    return not plugin.only_adapts if table is None else table != plugin.table


def with_reloaded(old: Config, new: Config) -> Config:
    """The new configuration, but for what only a restart can change."""
    return new.model_copy(update={name: getattr(old, name) for name in FIXED_SECTIONS})
