"""The node's clocks: what an adapter stamps on a value at receipt."""

from __future__ import annotations

import ctypes
import time
from functools import cache
from pathlib import Path

from millhand.records import Clock

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TIME_ERROR = 5
_TIMEX_BYTES = 256
"""More than a struct timex takes on any architecture (208 on 64-bit Linux); all zero: no mode bit is set."""


@cache
def boot_id() -> str:
    """The kernel's id of this boot; empty where the kernel gives none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def is_synchronised() -> bool | None:
    """Whether something disciplines the wall clock (NTP, PTP, GPS); None where the kernel does not say.

    adjtimex(2) with no mode bit set only reads; it returns TIME_ERROR while the clock is not synchronised.
    """
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


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
