"""What the owner says about watching the node: `[assets.options]` of `adapter = "host"`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from millhand.validation import StrictTable

Group = Literal["cpu", "load", "memory", "swap", "mounts", "disk_io", "network", "temperature", "fan", "agent"]
GROUPS: tuple[Group, ...] = (
    "cpu", "load", "memory", "swap", "mounts", "disk_io", "network", "temperature", "fan", "agent",
)  # fmt: skip


class HostOptions(StrictTable):
    every_ms: int = Field(default=5000, ge=100)
    """How often the sensors are read."""
    include: tuple[Group, ...] = Field(default=GROUPS, min_length=1)
    """Which groups of readings to make."""
    mounts: tuple[Path, ...] = (Path("/"),)
    """The file systems to watch, each by a folder in it."""
    interfaces: tuple[str, ...] = ()
    """The network interfaces whose traffic is added up; empty: all but the loopback."""

    @field_validator("mounts")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for mount in value:
            if not mount.is_absolute():
                raise ValueError(f"'{mount}' is no absolute path")
        return value
