"""The copies of a TensorRT session, host to GPU and back through pycuda, beside the CUDA driver's own.

    python benchmarks/gpu/transfer.py [--rounds 5] [--seconds 0.4]

The session's path is `Buffers` of the plugin tensorrt: pinned memory and a stream from pycuda, one copy begun and
waited for at a time, as for a batch. The peer is the C interface of the driver through ctypes, with pinned memory of
its own and the same pattern; both are made anew for each round, and alternate. `staged` counts the copy of an array
into the pinned memory, too: what a batch costs as a whole. What came back is compared with what was sent, and the
memory taken must be given back. With cuda-python installed, the same copies run as a captured CUDA graph. Needs a CUDA
driver, pycuda and nvidia-ml-py, no TensorRT; runs from a source tree (PYTHONPATH=agent:plugins).
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from card import Card
from figures import Figure, parser, progress, report

from millhand_plugins.tensorrt.device import Buffers, Device
from millhand_plugins.tensorrt.graphs import Graphs, cuda_runtime

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
JUDGED = 64 * MIB
"""Where the bandwidth counts and no longer the start of each copy."""
LEFT_MIB = 1
RUNS_MIN = 3
NAME = "x"


class Raw:
    """Pinned memory, GPU memory and a stream of the driver's C interface, in the context that is current."""

    def __init__(self, size: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._size = ctypes.c_size_t(size)
        self._host, self._device = ctypes.c_void_p(), ctypes.c_uint64()
        self._stream = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(self._host), self._size, 0)
        self._call("cuMemAlloc_v2", ctypes.byref(self._device), self._size)
        self._call("cuStreamCreate", ctypes.byref(self._stream), 0)

    def to_gpu(self) -> None:
        self._call("cuMemcpyHtoDAsync_v2", self._device, self._host, self._size, self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def from_gpu(self) -> None:
        self._call("cuMemcpyDtoHAsync_v2", self._host, self._device, self._size, self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        self._call("cuStreamDestroy_v2", self._stream)
        self._call("cuMemFree_v2", self._device)
        self._call("cuMemFreeHost", self._host)

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._cuda, function)(*arguments)
        if result:
            raise SystemExit(f"{function} gives {result}")


class Session:
    """What a session does with one input of a batch, and with one output of the same size."""

    def __init__(self, device: Device, array: np.ndarray) -> None:
        self._array, self._size = array, array.nbytes
        self._buffers = Buffers(device)
        self._buffers.add({NAME: self._size})
        self._buffers.stage(NAME, array)

    def to_gpu(self) -> None:
        self._buffers.send(NAME, self._size)
        self._buffers.wait()

    def from_gpu(self) -> None:
        self._buffers.fetch(NAME, self._size)
        self._buffers.wait()

    def staged(self) -> None:
        self._buffers.stage(NAME, self._array)
        self.to_gpu()

    def wrong(self) -> int:
        """Send the array, overwrite the host's side, fetch: how many values differ."""
        self.staged()
        self._buffers.stage(NAME, np.zeros_like(self._array))
        self.from_gpu()
        found = self._buffers.taken(NAME, self._array.dtype.name, self._array.shape)
        return int(np.count_nonzero(found != self._array))

    def wrong_as_graph(self, runtime: Any) -> int:
        """The same with both copies captured and launched as one graph."""
        graphs = Graphs(runtime, int(self._buffers.stream.handle))
        self._buffers.stage(NAME, self._array)
        graphs.capture("copies", self._both)
        graphs.launch("copies")
        self._buffers.wait()
        found = self._buffers.taken(NAME, self._array.dtype.name, self._array.shape)
        graphs.close()
        return int(np.count_nonzero(found != self._array))

    def _both(self) -> None:
        self._buffers.send(NAME, self._size)
        self._buffers.fetch(NAME, self._size)

    def close(self) -> None:
        self._buffers.close()


def rate(work: Callable[[], None], size: int, seconds: float) -> float:
    """GB/s (10^9 bytes), each run waited for."""
    work()
    runs, began = 0, time.perf_counter()
    while (now := time.perf_counter()) - began < seconds or runs < RUNS_MIN:
        work()
        runs += 1
    return size * runs / (now - began) / 1e9


def measure(device: Device, size: int, rounds: int, seconds: float) -> tuple[dict[str, float], dict[str, float], int]:
    """Median rates by what was done, the median of the rounds' ratios to the peer, and wrong values."""
    array = np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8)
    found: dict[str, list[float]] = {}
    wrong = 0
    for number in range(rounds):
        made: list[Any] = [Session(device, array), Raw(size)]
        ways = [("path to GPU", made[0].to_gpu), ("raw to GPU", made[1].to_gpu)]
        ways += [("path from GPU", made[0].from_gpu), ("raw from GPU", made[1].from_gpu)]
        for name, work in ways if number % 2 == 0 else reversed(ways):
            found.setdefault(name, []).append(rate(work, size, seconds))
        found.setdefault("staged to GPU", []).append(rate(made[0].staged, size, seconds))
        wrong += made[0].wrong()
        for one in made:
            one.close()
    ratios = {
        f"path {way}": statistics.median(
            path / raw for path, raw in zip(found[f"path {way}"], found[f"raw {way}"], strict=True)
        )
        for way in ("to GPU", "from GPU")
    }
    return {name: statistics.median(values) for name, values in found.items()}, ratios, wrong


def graph_check(device: Device) -> int | None:
    """Wrong values of copies that ran as a CUDA graph; None without cuda-python."""
    runtime = cuda_runtime()
    if runtime is None:
        return None
    path = Session(device, np.random.default_rng(1).integers(0, 255, MIB, dtype=np.uint8))
    wrong = path.wrong_as_graph(runtime)
    path.close()
    return wrong


def shown(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    options = arguments.parse_args()
    card = Card(True)
    device = Device()
    figures: list[Figure] = []
    wrong = 0
    with device.current():
        for size in SIZES:  # what CUDA itself takes the first time is not the path's
            measure(device, size, 1, 0.0)
        before = card.used_mib() or 0.0
        for size in SIZES:
            rates, ratios, bad = measure(device, size, options.rounds, options.seconds)
            wrong += bad
            progress(f"{shown(size)}: {', '.join(f'{name} {value:.2f} GB/s' for name, value in rates.items())}")
            for name, value in rates.items():
                figures.append(Figure(f"{shown(size)}: {name}", round(value, 2), "GB/s"))
            for name, value in ratios.items():
                goal = ">= 0.8" if size == JUDGED else ""
                figures.append(Figure(f"{shown(size)}: {name}, of raw", round(value, 3), "share", goal))
        left = max(0.0, (card.used_mib() or 0.0) - before)
        in_graph = graph_check(device)
    device.close()
    figures += [
        Figure("values that came back wrong", wrong, "1", "== 0"),
        Figure("GPU memory that is left", round(left, 1), "MiB", f"<= {LEFT_MIB}"),
    ]
    if in_graph is not None:
        figures.append(Figure("values that came back wrong from a CUDA graph", in_graph, "1", "== 0"))
    return report("gpu_transfer", figures, card=card.facts, cuda_python=in_graph is not None)


if __name__ == "__main__":
    sys.exit(main())
