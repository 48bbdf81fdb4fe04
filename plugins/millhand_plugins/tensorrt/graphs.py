"""CUDA graphs through cuda-python, where it is installed: pycuda has no stream capture. Python 3.10."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from millhand.errors import ModelError

GRAPHS_CAP = 8
"""Graphs that one stream keeps; each holds kernels' arguments and some memory of the GPU. The one asked least recently
goes first."""


def cuda_runtime() -> Any:
    """The module `cuda.bindings.runtime` of cuda-python; None where it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime


class Graphs:
    """What one stream has captured, by a key such as the shapes. Use it inside the device's context."""

    def __init__(self, runtime: Any, stream: int) -> None:
        """runtime: `cuda_runtime()`; stream: the handle of a stream that is not the default one."""
        self._runtime, self._stream = runtime, stream
        self._kept: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Record what `work` puts on the stream; it does not run. Raises ModelError where something in it cannot be
        recorded, or what `work` raises; the stream is usable afterwards.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._runtime.cudaStreamEndCapture(self._stream)
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            self._kept[key] = (graph, self._call("cudaGraphInstantiate", graph, 0))
        except ModelError:
            self._runtime.cudaGraphDestroy(graph)
            raise
        if len(self._kept) > GRAPHS_CAP:
            self._free(*self._kept.popitem(last=False)[1])

    def launch(self, key: Hashable) -> None:
        """Run on the stream what was captured under the key; returns at once. Raises ModelError."""
        self._kept.move_to_end(key)
        self._call("cudaGraphLaunch", self._kept[key][1], self._stream)

    def close(self) -> None:
        """Free all graphs; the stream must be done. May be called twice."""
        while self._kept:
            self._free(*self._kept.popitem()[1])

    def _free(self, graph: Any, executable: Any) -> None:
        self._runtime.cudaGraphExecDestroy(executable)
        self._runtime.cudaGraphDestroy(graph)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *results = getattr(self._runtime, function)(*arguments)
        if int(error):
            raise ModelError(
                f"CUDA graphs: {function} gives {getattr(error, 'name', error)}",
                hint="set [plugins.tensorrt] cuda_graphs = false",
            )
        return results[0] if results else None
