"""The node's clocks: what an adapter stamps on a value at receipt."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

from millhand.records import Clock

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def boot_id() -> str:
    """The kernel's id of this boot; empty where the kernel gives none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def stamp(source_ns: int | None = None, *, synced: bool = True) -> Clock:
    """A Clock of now. `source_ns` is the asset's own time; without one the receive time stands in for it."""
    receive_ns = time.time_ns()
    return Clock(
        receive_ns if source_ns is None else source_ns,
        receive_ns,
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        boot_id(),
        synced,
    )
