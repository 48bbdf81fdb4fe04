"""Replays recorded tables (CSV, TSV, space-separated, gzip) as if the machine stood here, and follows growing ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millhand.hookspecs import AdapterKind, hookimpl
from millhand_plugins.file.adapter import FileKind


@hookimpl
def millhand_adapters(config: Any) -> Sequence[AdapterKind]:
    return [FileKind()]
