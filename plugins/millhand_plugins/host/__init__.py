"""Watches the node itself: processor, memory, disks, network, temperatures and fans, by psutil."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millhand.hookspecs import AdapterKind, hookimpl
from millhand_plugins.host.adapter import HostKind


@hookimpl
def millhand_adapters(config: Any) -> Sequence[AdapterKind]:
    return [HostKind()]
