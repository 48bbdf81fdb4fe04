"""What GPU and driver this process has, asked of the CUDA driver through its C interface. Python 3.10, no packages.

CUDA_VISIBLE_DEVICES shows a worker, and a build, one device, which is number 0 here.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from millhand.errors import ModelError

LIBRARY = "libcuda.so.1"
NVML = "libnvidia-ml.so.1"
SUCCESS = 0
NAME_BYTES = 256
# cuda.h: CUdevice_attribute.
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
HINT = "install the NVIDIA driver and look at nvidia-smi; CUDA_VISIBLE_DEVICES must name a GPU of this node"


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: str
    driver: str
    """The driver's version; where NVML does not say (Jetson), the CUDA version that it supports."""


@functools.lru_cache(maxsize=1)
def this_gpu() -> Gpu:
    """The GPU of this process. Raises ModelError where no driver or no GPU answers."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise ModelError(f"there is no NVIDIA driver here: {error}", hint=HINT) from error
    _call(cuda, "cuInit", 0)
    device, number = ctypes.c_int(), ctypes.c_int()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(NAME_BYTES)
    _call(cuda, "cuDeviceGetName", name, NAME_BYTES, device)
    capability = []
    for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    _call(cuda, "cuDriverGetVersion", ctypes.byref(number))
    version = _driver_version() or f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), ".".join(capability), version)


def _call(cuda: Any, function: str, *arguments: Any) -> None:
    result = getattr(cuda, function)(*arguments)
    if result != SUCCESS:
        raise ModelError(f"the CUDA driver answers {function} with error {result}", hint=HINT)


def _driver_version() -> str:
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return ""
    text = ctypes.create_string_buffer(NAME_BYTES)
    if nvml.nvmlInit_v2() != SUCCESS or nvml.nvmlSystemGetDriverVersion(text, NAME_BYTES) != SUCCESS:
        return ""
    return text.value.decode(errors="replace")
