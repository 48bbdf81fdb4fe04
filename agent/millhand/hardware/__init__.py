"""What this node is: CPU, memory, disks, GPUs, Jetson. Live, or read under a root folder of recordings."""

from __future__ import annotations

from millhand.hardware.discovery import discover
from millhand.hardware.facts import (
    Accelerator,
    Cpu,
    Disk,
    Engine,
    Hardware,
    Jetson,
    Memory,
    MigInstance,
    Problem,
    Rail,
    Storage,
    Topology,
)

__all__ = [
    "Accelerator",
    "Cpu",
    "Disk",
    "Engine",
    "Hardware",
    "Jetson",
    "Memory",
    "MigInstance",
    "Problem",
    "Rail",
    "Storage",
    "Topology",
    "discover",
]
