"""How much memory a process or an accelerator has in use. Imported by workers: Python 3.10, and nothing heavy.

NVML is asked through its C interface (nvml.h of the driver), since a foreign interpreter may lack the Python binding. A
Jetson's GPU takes main memory, which NVML does not count: there the node's available memory is what matters.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

LIBRARY = "libnvidia-ml.so.1"
NVML_SUCCESS = 0


class DeviceMemory(NamedTuple):
    """Bytes of a device that all processes together use, and that none uses."""

    used: int
    free: int


class _Info(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def used_bytes(accelerator: str) -> int:
    """What a model's load adds to: this process's resident memory for `cpu`, else all that is used of the device."""
    if accelerator == "cpu":
        return resident_bytes()
    memory = device_memory(accelerator)
    return memory.used if memory else 0


def device_memory(accelerator: str) -> DeviceMemory | None:
    """Memory of a GPU or MIG slice by UUID or index; on a Jetson the node's. None where NVML does not know it."""
    library = _nvml()
    if library is None:
        return _main_memory()
    handle, info = ctypes.c_void_p(), _Info()
    if accelerator.isdecimal():
        found = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(accelerator)), ctypes.byref(handle))
    else:
        found = library.nvmlDeviceGetHandleByUUID(accelerator.encode(), ctypes.byref(handle))
    if found != NVML_SUCCESS:
        return None
    if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)) != NVML_SUCCESS or not info.total:
        return _main_memory()
    return DeviceMemory(info.used, info.free)


@functools.lru_cache(maxsize=1)
def _nvml() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    # Never shut down: that and another init would cost more than the reading itself.
    return library if library.nvmlInit_v2() == NVML_SUCCESS else None


def _main_memory() -> DeviceMemory:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    return DeviceMemory(total - available, available)
