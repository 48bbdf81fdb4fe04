"""Work orders: written by a table of faults, without a language model, and made better with one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from millhand.hookspecs import OrderReviser, OrderWriter, hookimpl
from millhand.validation import StrictTable


class OrdersConfig(StrictTable):
    knowledge: Path | None = None
    """A TOML file of your own with tables like those in knowledge.toml; its kinds win over the shipped ones."""
    language: Literal["en", "zh"] = "en"
    """What orders are written in: English or Simplified Chinese."""


@hookimpl
def millhand_config() -> type[OrdersConfig]:
    return OrdersConfig


@hookimpl
def millhand_order_writers(config: OrdersConfig) -> Sequence[OrderWriter]:
    from millhand_plugins.orders.writer import DeterministicWriter, read_knowledge

    return [DeterministicWriter(read_knowledge(config.knowledge, config.language), config.language)]


@hookimpl
def millhand_order_revisers(config: OrdersConfig) -> Sequence[OrderReviser]:
    from millhand_plugins.orders.reviser import ModelReviser

    return [ModelReviser()]
