"""Ways to run a batch: what ONNX Runtime does by itself, with buffers that are bound once, as a recorded CUDA graph.

Runs in workers: Python 3.10. A way takes the inputs of a batch (name -> array, the batch first) and returns arrays of
its own for every output, with as many rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.serving.tensors import Tensors
from millhand_plugins.onnxruntime.pinned import PinnedArray

RECORDING = threading.Lock()
"""Held while a graph is recorded, and by every run that serves: ONNX Runtime records in CUDA's global mode, in which
calls of other threads (a copy, an allocation) fail and spoil the recording."""
Arrays = dict[str, NDArray[Any]]
Way = Callable[[Tensors], Arrays]


class Plain:
    """`InferenceSession.run`, for batches of any size."""

    def __init__(self, session: Any, outputs: Sequence[str]) -> None:
        self._outputs = list(outputs)
        self.session = session
        # What `run` itself calls, after checks that a worker has made already; they take 2 us or more.
        self._run = session._sess.run if hasattr(session, "_sess") else session.run

    def __call__(self, inputs: Tensors) -> Arrays:
        return dict(zip(self._outputs, self._run(self._outputs, inputs, None)))  # noqa: B905 (it gives one each)


class Filled:
    """A way that only ever sees batches of one size: a smaller one is filled up with its last row."""

    def __init__(self, way: Way, size: int, first: str) -> None:
        """`first`: an input, which tells the rows."""
        self._way = way
        self._size = size
        self._first = first

    def __call__(self, inputs: Tensors) -> Arrays:
        rows = len(inputs[self._first])
        if rows == self._size:
            return self._way(inputs)
        found = self._way({name: _filled(array, self._size) for name, array in inputs.items()})
        return {name: array[:rows] for name, array in found.items()}


def _filled(array: NDArray[Any], size: int) -> NDArray[Any]:
    filled = np.empty((size, *array.shape[1:]), dtype=array.dtype)
    filled[: len(array)] = array
    filled[len(array) :] = array[-1]
    return filled


class Bound:
    """Device buffers for batches of one size, bound once (IO binding).

    A full batch is copied to the device from where it lies; a smaller one is filled up in page-locked memory, since
    there it has to be copied on the host anyway. One batch at a time.
    """

    def __init__(self, session: Any, inputs: Tensors, outputs: Tensors, device: str, options: Any = None) -> None:
        """inputs, outputs: a full batch and its answer, for shapes and types. device: `cuda` (`cpu` in tests).
        options: RunOptions, which say which CUDA graph this is.

        Raises RuntimeError where the device has no room.
        """
        self.options = options
        self._session = session
        self._binding = session.io_binding()
        self._inputs = {name: _buffer(array, device) for name, array in inputs.items()}
        self._outputs = {name: _buffer(array, device) for name, array in outputs.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._first, array = next(iter(inputs.items()))
        self._size = len(array)
        # Reading a buffer must give memory of one's own: the next batch is written over it.
        self._read = _copy if any(_is_view(value) for value in self._outputs.values()) else _numpy
        self._staging = {name: PinnedArray(array.shape, array.dtype) for name, array in inputs.items()}
        self.pinned = all(one.pinned for one in self._staging.values())

    def __call__(self, inputs: Tensors) -> Arrays:
        rows = len(inputs[self._first])
        if rows == self._size:
            for name, value in self._inputs.items():
                value.update_inplace(inputs[name])
            self._session.run_with_iobinding(self._binding, self.options)
            return {name: self._read(value) for name, value in self._outputs.items()}
        for name, value in self._inputs.items():
            array, staged = inputs[name], self._staging[name].array
            staged[:rows] = array
            staged[rows:] = array[-1]
            value.update_inplace(staged)
        self._session.run_with_iobinding(self._binding, self.options)
        return {name: self._read(value)[:rows] for name, value in self._outputs.items()}

    def close(self) -> None:
        for staging in self._staging.values():
            staging.release()


def _buffer(array: NDArray[Any], device: str) -> Any:
    from onnxruntime import OrtValue  # type: ignore[import-untyped]

    return OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, device, 0)


def _is_view(value: Any) -> bool:
    return bool(np.shares_memory(value.numpy(), value.numpy()))


def _numpy(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value.numpy()
    return array


def _copy(value: Any) -> NDArray[Any]:
    return np.array(value.numpy())


class OneThread:
    """Runs calls in a thread of its own, one after another, for what belongs to one thread only.

    ONNX Runtime keeps CUDA graphs for each thread that runs (its documentation: a session with CUDA graphs must not be
    run from several threads), and a worker's threads take turns.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call and return or raise what the function does. By one caller at a time."""
        self._calls.put((function, arguments))
        value, error = self._answers.get()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            function, arguments = call
            try:
                answer: tuple[Any, BaseException | None] = function(*arguments), None
            except BaseException as error:  # the caller's to handle
                answer = None, error
            self._answers.put(answer)
            del call, function, arguments, answer  # nothing of a batch is held while it waits


class CudaGraph:
    """Runs of one batch size that were recorded as a CUDA graph and are played again since; a session of its own.

    A graph has addresses of its session's memory in it, and a convolution takes other memory with every other shape: in
    a session of several shapes it would play over memory that is used otherwise.
    """

    def __init__(
        self, thread: OneThread, open_session: Callable[[], Any], inputs: Tensors, outputs: Tensors, device: str
    ) -> None:
        """`open_session` opens one with `enable_cuda_graph`; the rest as `Bound` takes it. Raises what ONNX Runtime
        does."""
        self._thread = thread
        self._open = open_session
        self._bound: Any = None
        try:
            thread.call(self._record, inputs, outputs, device)
        except BaseException:
            self.close()
            raise

    def __call__(self, inputs: Tensors) -> Arrays:
        arrays: Arrays = self._thread.call(self._bound, inputs)
        return arrays

    def close(self) -> None:
        """Free the graph and its session, in their own thread, as they came."""
        self._thread.call(self._free)

    def _record(self, inputs: Tensors, outputs: Tensors, device: str) -> None:
        self._bound = bound = Bound(self._open(), inputs, outputs, device, _graph("-1"))
        bound(inputs)  # plans and memory first, which may take long and keeps nobody waiting
        bound.options = _graph("1")
        with RECORDING:
            bound(inputs)

    def _free(self) -> None:
        if self._bound is not None:
            self._bound.close()
            self._bound = None


def _graph(number: str) -> Any:
    """Run options: which graph of the session to record or play; "-1" runs without."""
    from onnxruntime import RunOptions

    options = RunOptions()
    options.add_run_config_entry("gpu_graph_id", number)
    return options
