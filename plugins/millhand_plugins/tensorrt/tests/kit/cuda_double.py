"""A double of pycuda and of cuda-python's stream capture, for machines without a GPU.

Memory of the "GPU" is host memory at made-up addresses. What is put on a stream runs when the stream is waited for,
not before: a missing wait, a buffer that is overwritten too early, memory that is freed too early, or a call outside
the context shows as a wrong answer or an error. Nothing is said about speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class CudaError(Exception):
    pass


class CudaMemoryError(CudaError):
    pass


class Gpu:
    """What the process shares: contexts, memory, streams; and what a test wants to know of it."""

    def __init__(self, bytes_cap: int = 1 << 30) -> None:
        self.bytes_cap = bytes_cap
        self.calls: list[str] = []
        self.retained = 0
        self.allocations: dict[int, np.ndarray] = {}
        self.pinned = 0
        self.streams: dict[int, Stream] = {}
        self.launches = 0
        self.faults = 0
        """How many waits fail from now on; -1: all of them."""
        self._next = 0x7000_0000
        self._stacks = threading.local()

    @property
    def stack(self) -> list[Any]:
        if not hasattr(self._stacks, "contexts"):
            self._stacks.contexts = []
        return self._stacks.contexts

    def need_context(self, what: str) -> None:
        if not self.stack:
            raise CudaError(f"{what}: invalid device context")
        self.calls.append(what)

    def used(self) -> int:
        return sum(len(memory) for memory in self.allocations.values())

    def take(self, size: int) -> int:
        if self.used() + size > self.bytes_cap:
            raise CudaMemoryError("cuMemAlloc failed: out of memory")
        address = self._next
        self._next += size + 4096
        self.allocations[address] = np.full(size, 0xA5, np.uint8)
        return address

    def memory(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address; an error where none are allocated there."""
        for start, memory in self.allocations.items():
            if start <= address and address + size <= start + len(memory):
                return memory[address - start : address - start + size]
        raise CudaError(f"an illegal memory access was encountered at {address:#x}")


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        gpu.need_context("Stream")
        self._gpu = gpu
        self.handle = 0x5000 + 16 * (len(gpu.streams) + 1)
        self.pending: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        gpu.streams[self.handle] = self

    def put(self, work: Callable[[], None]) -> None:
        (self.pending if self.captured is None else self.captured).append(work)

    def synchronize(self) -> Stream:
        self._gpu.need_context("synchronize")
        if self.captured is not None:
            raise CudaError("cuStreamSynchronize failed: operation not permitted when stream is capturing")
        pending, self.pending = self.pending, []
        if self._gpu.faults:
            self._gpu.faults -= 1 if self._gpu.faults > 0 else 0
            raise CudaError("cuStreamSynchronize failed: an illegal memory access was encountered")
        for work in pending:
            work()
        return self


class DeviceAllocation:
    def __init__(self, gpu: Gpu, size: int) -> None:
        gpu.need_context("mem_alloc")
        self._gpu, self._address = gpu, gpu.take(size)

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        self._gpu.need_context("free")
        del self._gpu.allocations[self._address]


class HostAllocation:
    def __init__(self, gpu: Gpu, size: int) -> None:
        gpu.need_context("pagelocked_empty")
        self._gpu, self._memory = gpu, np.full(size, 0x5A, np.uint8)
        self.__array_interface__ = self._memory.__array_interface__
        gpu.pinned += 1

    def free(self) -> None:
        self._gpu.need_context("free pinned")
        self._memory[:] = 0xEE  # whoever still reads it sees it
        self._gpu.pinned -= 1


class PrimaryContext:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._valid = gpu, True
        self._thread = threading.get_ident()
        gpu.retained += 1

    def push(self) -> None:
        self._gpu.stack.append(self)

    def detach(self) -> None:
        """As pycuda: in a thread that neither made it nor has it current, it stays retained without a word."""
        if not self._valid:
            raise CudaError("context::detach failed: invalid device context")
        self._valid = False
        current = bool(self._gpu.stack) and self._gpu.stack[-1] is self
        if current:
            self._gpu.stack.pop()
        if current or self._thread == threading.get_ident():
            self._gpu.retained -= 1


def pycuda_double(gpu: Gpu) -> ModuleType:
    """What `import pycuda.driver` gives."""
    driver = ModuleType("pycuda.driver")

    def pop() -> None:
        gpu.stack.pop()

    def pagelocked_empty(shape: int, dtype: Any) -> np.ndarray:
        array: np.ndarray = np.asarray(HostAllocation(gpu, shape * np.dtype(dtype).itemsize))
        return array

    def htod(address: int, source: np.ndarray, stream: Stream) -> None:
        gpu.need_context("htod")
        stream.put(lambda: np.copyto(gpu.memory(address, source.nbytes), source))

    def dtoh(target: np.ndarray, address: int, stream: Stream) -> None:
        gpu.need_context("dtoh")
        stream.put(lambda: np.copyto(target, gpu.memory(address, target.nbytes)))

    driver.__dict__.update(
        Error=CudaError,
        MemoryError=CudaMemoryError,
        init=lambda: None,
        Device=lambda number: SimpleNamespace(retain_primary_context=lambda: PrimaryContext(gpu)),
        Context=SimpleNamespace(pop=pop),
        Stream=lambda: Stream(gpu),
        mem_alloc=lambda size: DeviceAllocation(gpu, size),
        pagelocked_empty=pagelocked_empty,
        memcpy_htod_async=htod,
        memcpy_dtoh_async=dtoh,
    )
    return driver


class RuntimeDouble:
    """`cuda.bindings.runtime`: each call returns a tuple that begins with an error."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.graphs = self.executables = 0
        self.refused = False
        """Whether captures fail, as with a network that synchronises inside."""

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        found = self._gpu.streams[stream]
        assert not found.pending, "what was put before would not be in the graph"
        found.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        found = self._gpu.streams[stream]
        captured, found.captured = found.captured, None
        if self.refused:
            return (901, None)  # cudaErrorStreamCaptureInvalidated
        self.graphs += 1
        return (0, captured)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        self.executables += 1
        return (0, list(graph))

    def cudaGraphLaunch(self, executable: Any, stream: int) -> tuple[Any, ...]:
        for work in executable:
            self._gpu.streams[stream].put(work)
        self._gpu.launches += 1
        return (0,)

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        executable.clear()
        self.executables -= 1
        return (0,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self.graphs -= 1
        return (0,)
