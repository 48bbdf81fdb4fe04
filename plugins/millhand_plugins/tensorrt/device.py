"""Everything that touches the GPU beside TensorRT itself: pycuda's context, streams and memory. Python 3.10.

Depends on pycuda and NumPy alone, so that the copy path can be measured without TensorRT. A context is current in a
thread only inside `Device.current`; all other calls belong into such a block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import ModelError

INSTALL_HINT = "pip install 'millhand[pycuda]' with the workers' interpreter; it is built from source and needs nvcc"
MIB = 1 << 20
ALIGNMENT = 256
"""Bytes; tensors of one allocation begin at multiples of it, as cudaMalloc's own do."""


class Device:
    """The one GPU that this process sees, through its primary context: TensorRT uses that one, too."""

    def __init__(self) -> None:
        """Raises ModelError where pycuda is missing, or no GPU answers."""
        self._cuda = cuda = _pycuda()
        try:
            cuda.init()
            self._context: Any = cuda.Device(0).retain_primary_context()
        except cuda.Error as error:
            raise ModelError(
                f"CUDA does not start: {error}",
                hint="look at nvidia-smi; CUDA_VISIBLE_DEVICES must name a GPU of this node",
            ) from error

    @property
    def error(self) -> type[Exception]:
        """What pycuda raises where CUDA fails."""
        kind: type[Exception] = self._cuda.Error
        return kind

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context this thread's own for the block."""
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def stream(self) -> Any:
        return self._cuda.Stream()

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory of so many bytes that the GPU reads and writes directly. Free it with `free_pinned`."""
        memory: NDArray[np.uint8] = self._cuda.pagelocked_empty(size, np.uint8)
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        base: Any = memory.base
        base.free()

    def allocate(self, size: int) -> Any:
        """Memory of the GPU; `int()` is its address, `free()` gives it back."""
        return self._cuda.mem_alloc(size)

    def copy_in(self, address: int, source: NDArray[np.uint8], stream: Any) -> None:
        """Begin a copy to the GPU; `source` must be pinned and stay as it is until the stream is done."""
        self._cuda.memcpy_htod_async(address, source, stream)

    def copy_out(self, target: NDArray[np.uint8], address: int, stream: Any) -> None:
        """Begin a copy from the GPU."""
        self._cuda.memcpy_dtoh_async(target, address, stream)

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, self._cuda.MemoryError)

    def close(self) -> None:
        """Let the context go; its last user's release frees it. May be called twice, and by any thread."""
        context, self._context = self._context, None
        if context is not None:
            context.push()  # a thread that it is not current in would leave it as it is
            context.detach()


class Buffers:
    """Pinned host memory and GPU memory for the tensors of one batch, and the stream on which they move.

    All calls belong into `Device.current`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._addresses: dict[str, int] = {}
        self._host: dict[str, NDArray[np.uint8]] = {}
        self._owned: list[Any] = []
        self.stream: Any = device.stream()

    def add(self, sizes: Mapping[str, int]) -> None:
        """Make room for tensors: name -> most bytes. They lie in one block on either side.

        Raises ModelError where the memory does not suffice.
        """
        places, total = {}, 0
        for name, size in sizes.items():
            places[name] = total
            total += -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        try:
            host = self._device.pinned(max(total, ALIGNMENT))
            self._owned.append(_Pinned(self._device, host))
            memory = self._device.allocate(max(total, ALIGNMENT))
            self._owned.append(memory)
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
            raise ModelError(
                f"the GPU or the host has no {total / MIB:.1f} MiB left for a batch's tensors",
                hint="unload other models, lower max_batch, or set [plugins.tensorrt] streams = 1",
            ) from error
        for name, place in places.items():
            self._addresses[name] = int(memory) + place
            self._host[name] = host[place : place + sizes[name]]

    def address(self, name: str) -> int:
        """Where a tensor lies on the GPU."""
        return self._addresses[name]

    def stage(self, name: str, array: NDArray[Any]) -> int:
        """Copy an array into the pinned memory; return its bytes."""
        np.copyto(self._host[name][: array.nbytes].view(array.dtype).reshape(array.shape), array)
        return array.nbytes

    def send(self, name: str, size: int) -> None:
        """Begin the copy of what was staged to the GPU."""
        self._device.copy_in(self._addresses[name], self._host[name][:size], self.stream)

    def fetch(self, name: str, size: int) -> None:
        """Begin the copy of a result into the pinned memory; read it with `taken` after `wait`."""
        self._device.copy_out(self._host[name][:size], self._addresses[name], self.stream)

    def wait(self) -> None:
        """Wait until all that was begun is done; other threads run meanwhile."""
        self.stream.synchronize()

    def settle(self) -> None:
        """As `wait`, also where the GPU fails: then nothing of it runs any more."""
        with contextlib.suppress(self._device.error):
            self.stream.synchronize()

    def taken(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of what was fetched."""
        size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
        return self._host[name][:size].view(dtype).reshape(shape).copy()

    def fill(self, name: str, byte: int) -> None:
        """Begin to overwrite a tensor's whole memory, on the host and on the GPU."""
        self._host[name][:] = byte
        self.send(name, len(self._host[name]))

    def close(self) -> None:
        """Free all of it, once the stream is done. May be called twice."""
        if self.stream is None:
            return
        self.settle()
        self._host = {}
        while self._owned:
            self._owned.pop().free()
        self.stream = None


class _Pinned:
    """Frees pinned memory as GPU memory is freed."""

    def __init__(self, device: Device, memory: NDArray[np.uint8]) -> None:
        self._device, self._memory = device, memory

    def free(self) -> None:
        self._device.free_pinned(self._memory)


def _pycuda() -> Any:
    try:
        import pycuda.driver
    except ImportError as error:  # the package, or the driver's libcuda that it is linked to
        raise ModelError(f"pycuda cannot be imported: {error}", hint=INSTALL_HINT) from error
    return pycuda.driver
