"""A simulated motor-bearing-pump skid, in-process or over Modbus, and the model that knows its faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millhand.hookspecs import AdapterKind, hookimpl
from millhand_plugins.rig.adapter import RigKind


@hookimpl
def millhand_adapters(config: Any) -> Sequence[AdapterKind]:
    return [RigKind()]
