"""Triton's repository index, out of what the daemon tells of its models: HTTP and gRPC answer the same."""

from __future__ import annotations

from typing import Any, NamedTuple


class IndexEntry(NamedTuple):
    """One version; of a folder that cannot be served the folder, with an empty `version`."""

    name: str
    version: str
    state: str
    """READY or UNAVAILABLE."""
    reason: str
    """Why it is not ready; empty where it is."""


def index_entries(models: list[dict[str, Any]], ready: bool) -> list[IndexEntry]:
    """`models`: as `ModelPool.index` tells of them. `ready`: only what is."""
    entries = [entry for model in models for entry in _entries(model)]
    return [entry for entry in entries if entry.state == "READY" or not ready]


def _entries(model: dict[str, Any]) -> list[IndexEntry]:
    name = model["name"]
    if "details" not in model:
        return [IndexEntry(name, "", "UNAVAILABLE", model["reason"])]
    return [
        IndexEntry(name, str(found["version"]), "READY", "")
        if found["state"] == "ready"
        else IndexEntry(name, str(found["version"]), "UNAVAILABLE", found["reason"] or found["state"])
        for found in model["details"]
    ]
