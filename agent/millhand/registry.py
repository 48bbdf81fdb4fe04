"""Entry points -> plugins. A broken one is reported and left out; only `required = true` makes it fatal."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
from pydantic import BaseModel

from millhand.errors import MillhandError, PluginError, suggestion
from millhand.hookspecs import Hooks
from millhand.validation import validate

log = logging.getLogger("millhand.registry")

GROUP = "millhand"
META_KEYS = ("enabled", "required")


@dataclass
class PluginState:
    """What `plugin list` shows of one plugin."""

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    state: str = "available"
    """available (not named by config), loaded, degraded (a hook raised), failed, disabled."""
    error: str = ""
    hint: str = ""
    hooks: list[str] = field(default_factory=list)
    config: Any = None
    table: dict[str, Any] = field(default_factory=dict)
    """Its table of the configuration, as it was when the plugin was loaded."""

    @property
    def only_adapts(self) -> bool:
        """Whether it does nothing but read machines, so that without an asset nothing is left of it."""
        return set(self.hooks) <= {"millhand_config", "millhand_adapters"}

    def to_dict(self) -> dict[str, Any]:
        shown = ("name", "module", "distribution", "version", "state", "error", "hint", "hooks")
        return {key: getattr(self, key) for key in shown}


class Registry:
    """Imports plugins, validates their tables and calls their hooks, each under a guard of its own."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(Hooks)
        self._points = _entry_points()
        self._tables: dict[str, dict[str, Any]] = {}
        self.plugins: dict[str, PluginState] = {}

    def load(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Import and configure the plugins that `tables` names (name -> its config table).

        Raises PluginError only for a plugin whose table says `required = true`.
        """
        for name, table in tables.items():
            self._tables[name] = dict(table)
            if name not in self.plugins or self.plugins[name].state in ("available", "failed", "disabled"):
                self._load_one(name, dict(table))

    def loaded(self) -> list[PluginState]:
        """The plugins that are at work, be it badly."""
        return [plugin for plugin in self.plugins.values() if plugin.state in ("loaded", "degraded")]

    def retry_failed(self) -> list[str]:
        """Try the failed plugins again; return the names that came up."""
        failed = [name for name, plugin in self.plugins.items() if plugin.state == "failed"]
        for name in failed:
            self._load_one(name, dict(self._tables[name]))
        return [name for name in failed if self.plugins[name].state == "loaded"]

    def collect(self, hook: str) -> Iterator[tuple[str, Any]]:
        """Yield (plugin name, item) of every sequence that the implementations of `hook` return."""
        for name, items in self._called(hook, lambda produced: list(produced or ())):
            for item in items:
                yield name, item

    def one(self, hook: str) -> Any:
        """What the first implementation of `hook` returns that returns anything; None where none does."""
        return next((found for _, found in self._called(hook, lambda produced: produced) if found is not None), None)

    def _called(self, hook: str, read: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
        """(plugin name, what `read` makes of its answer); a plugin that raises is degraded and left out."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        for implementation in caller.get_hookimpls():
            plugin = self.plugins[implementation.plugin_name]
            try:
                arguments = {"config": plugin.config}
                produced = read(implementation.function(*(arguments[name] for name in implementation.argnames)))
            except Exception as error:
                self._degrade(plugin, hook, error)
                continue
            yield plugin.name, produced

    def tables(self, name: str) -> dict[str, type[BaseModel]]:
        """The tables that an installed plugin reads, title -> model, whether or not config names the plugin.

        Adapters that need a required key of the plugin's own table are left out until config gives it. Raises
        PluginError where the plugin cannot be imported.
        """
        try:
            module = importlib.import_module(self._points[name].module)
            hook = getattr(module, "millhand_config", None)
            model = hook() if hook is not None else None
        except Exception as error:
            hint = error.hint if isinstance(error, MillhandError) else _import_hint(error)
            raise PluginError(f"plugin '{name}' cannot be imported: {_describe(error)}", hint=hint) from error
        tables = {} if model is None else {f"[plugins.{name}]": model}
        config = self.plugins[name].config if name in self.plugins else None
        with suppress(Exception):  # it wants a table that config does not give; `plugin list` says what it raises
            adapters = module.millhand_adapters
            wants_config = bool(inspect.signature(adapters).parameters)
            kinds = adapters(config or (model and model())) if wants_config else adapters()
            tables |= {f'[assets.options] of adapter "{kind.name}"': kind.options for kind in kinds}
        return tables

    def hooks(self, name: str) -> list[str]:
        """The hooks that an installed plugin implements. Import it first (`load` or `tables`)."""
        return _implemented_hooks(sys.modules[self._points[name].module])

    def listing(self) -> list[PluginState]:
        """Every installed plugin, also those that config does not name."""
        known = dict(self.plugins)
        for name, point in self._points.items():
            if name not in known:
                known[name] = _state_of(point)
        return sorted(known.values(), key=lambda plugin: plugin.name)

    def _load_one(self, name: str, table: dict[str, Any]) -> None:
        point = self._points.get(name)
        state = _state_of(point) if point else PluginState(name, "")
        self.plugins[name], state.table = state, dict(table)
        meta = {key: table.pop(key) for key in META_KEYS if key in table}
        if meta.get("enabled", True) is False:
            state.state = "disabled"
            return
        try:
            if point is None:
                raise PluginError(
                    f"plugin '{name}' is not installed{suggestion(name, self._points)}",
                    hint=f"install the package that brings it, or delete [plugins.{name}]",
                )
            self._register(point, state, table)
        except Exception as error:
            self._fail(state, error)
            if meta.get("required", False):
                raise PluginError(
                    f"plugin '{name}' is required and could not be loaded: {state.error}", hint=state.hint
                ) from error

    def _register(self, point: EntryPoint, state: PluginState, table: dict[str, Any]) -> None:
        module = importlib.import_module(point.module)
        implemented = _implemented_hooks(module)
        known = [name for name in dir(Hooks) if name.startswith("millhand_")]
        for name in implemented:
            if name not in known:
                raise PluginError(
                    f"plugin '{state.name}' implements '{name}', which is no hook{suggestion(name, known)}",
                    hint="see docs/plugins.md for the hooks",
                )
        state.config = self._configure(module, state.name, table)
        if self._manager.has_plugin(state.name):
            self._manager.unregister(name=state.name)
        self._manager.register(module, name=state.name)
        state.state, state.error, state.hint, state.hooks = "loaded", "", "", implemented

    def _configure(self, module: Any, name: str, table: dict[str, Any]) -> Any:
        hook = getattr(module, "millhand_config", None)
        model = hook() if hook is not None else None
        if model is not None:
            return validate(model, table, f"config [plugins.{name}]")
        if table:
            key = next(iter(table))
            raise PluginError(
                f"config [plugins.{name}]: key '{key}' is not known; this plugin takes no options",
                hint=f"delete the key; [plugins.{name}] may stay empty",
            )
        return None

    def _fail(self, state: PluginState, error: Exception) -> None:
        state.state = "failed"
        state.error = _describe(error)
        state.hint = error.hint if isinstance(error, MillhandError) else _import_hint(error)
        log.error("plugin %s failed: %s", state.name, state.error)

    def _degrade(self, plugin: PluginState, hook: str, error: Exception) -> None:
        plugin.state = "degraded"
        plugin.error = f"{hook}: {_describe(error)}"
        plugin.hint = error.hint if isinstance(error, MillhandError) else "report this to the plugin's author"
        log.error("plugin %s: %s", plugin.name, plugin.error)


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _state_of(point: EntryPoint) -> PluginState:
    distribution = point.dist
    return PluginState(
        point.name,
        point.value,
        distribution.name if distribution else "",
        distribution.version if distribution else "",
    )


def _implemented_hooks(module: Any) -> list[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, function in functions if hasattr(function, f"{GROUP}_impl")]


def _describe(error: Exception) -> str:
    return error.message if isinstance(error, MillhandError) else f"{type(error).__name__}: {error}"


def _import_hint(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"install the package that brings '{error.name}' (see the plugin's README for its extra)"
    return "report this to the plugin's author"
