"""What `millhand check` says of work orders: their writer, their reviser and what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from millhand.errors import ConfigError, suggestion
from millhand.language.pack import find_pack
from millhand.registry import Registry

if TYPE_CHECKING:
    from millhand.config import Config


def order_problems(config: Config) -> Iterator[ConfigError]:
    """Everything because of which orders would not be written, or not made better. Nothing is started."""
    registry = Registry()
    registry.load(config.plugin_tables())
    parts = {"writer": "millhand_order_writers", "reviser": "millhand_order_revisers"}
    for key, hook in parts.items():
        name, known = getattr(config.orders, key), {item.name for _, item in registry.collect(hook)}
        if name and name not in known:
            yield ConfigError(
                f"[orders] {key} = '{name}' is not known{suggestion(name, known)}",
                hint=f"known: {', '.join(sorted(known)) or 'none'}; name the plugin that brings it under [plugins]",
            )
    if not config.orders.reviser:
        return
    if not config.language.model:
        yield ConfigError(
            f"[orders] reviser = '{config.orders.reviser}' has no language model to ask",
            hint="name one as [language] model, or leave the reviser out",
        )
    try:
        find_pack(config.pack)
    except ConfigError as error:
        yield error
