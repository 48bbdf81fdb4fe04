"""From `[[assets]]` tables to adapters: which kind, which options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from millhand.errors import ConfigError, suggestion
from millhand.validation import validate

if TYPE_CHECKING:
    from pydantic import BaseModel

    from millhand.config import Config
    from millhand.hookspecs import Adapter, AdapterKind
    from millhand.pipeline.settings import AssetSettings
    from millhand.registry import Registry


def adapter_kinds(registry: Registry) -> dict[str, AdapterKind]:
    """Every adapter kind that the loaded plugins bring, by name."""
    return {kind.name: kind for _, kind in registry.collect("millhand_adapters")}


def asset_options(settings: AssetSettings, kinds: Mapping[str, AdapterKind]) -> tuple[AdapterKind, BaseModel]:
    """Find the asset's adapter kind and check its options. Raises ConfigError naming asset, key and value."""
    kind = kinds.get(settings.adapter)
    if kind is None:
        raise ConfigError(
            f"config [[assets]] '{settings.name}': adapter = '{settings.adapter}' is not known"
            f"{suggestion(settings.adapter, kinds)}",
            hint="'millhand plugin list' shows what is installed and what failed",
        )
    return kind, validate(kind.options, settings.options, f"config [[assets]] '{settings.name}' options")


def create_adapter(settings: AssetSettings, kinds: Mapping[str, AdapterKind]) -> Adapter:
    """Make the asset's adapter; it does not connect yet."""
    kind, options = asset_options(settings, kinds)
    return kind.create(settings.name, options)


def faulty_assets(config: Config, registry: Registry) -> list[ConfigError]:
    """What is wrong with each asset's adapter and options; empty where nothing is."""
    kinds, faults = adapter_kinds(registry), []
    for settings in config.assets:
        try:
            asset_options(settings, kinds)
        except ConfigError as error:
            faults.append(error)
    return faults
