"""Reads machines over Modbus TCP: process values as readings, snapshot blocks as waveforms. It can only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millhand.hookspecs import AdapterKind, hookimpl
from millhand_plugins.modbus.adapter import ModbusKind


@hookimpl
def millhand_adapters(config: Any) -> Sequence[AdapterKind]:
    return [ModbusKind()]
