"""Host memory that a GPU reads and writes without a copy in between: page-locked through the CUDA runtime.

Runs in workers: Python 3.10. The runtime is the one that this process has loaded already, ONNX Runtime's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY = "libcudart.so"
SUCCESS = 0


class PinnedArray:
    """An array for one tensor; plain memory where it cannot be page-locked, which `pinned` tells."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        self.array: NDArray[Any] = np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=kind, count=int(np.prod(shape)))
        self.array = self.array.reshape(shape)
        self._runtime = cuda_runtime()
        address, length = ctypes.c_void_p(self.array.ctypes.data), ctypes.c_size_t(max(size, 1))
        self.pinned = self._runtime is not None and self._runtime.cudaHostRegister(address, length, 0) == SUCCESS

    def release(self) -> None:
        """Unlock the memory, which lives as long as the array does. Nothing may run on it any more."""
        if self.pinned:
            self.pinned = False
            self._runtime.cudaHostUnregister(ctypes.c_void_p(self.array.ctypes.data))


def cuda_runtime() -> Any:
    """The CUDA runtime of this process; None where it has loaded none."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        name = line.rpartition(" ")[2]
        if LIBRARY in name:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(name)
    return None
