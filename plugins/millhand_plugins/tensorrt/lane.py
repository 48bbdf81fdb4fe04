"""One batch at a time on one stream: an execution context for each profile, buffers, and CUDA graphs. Python 3.10."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, ModelError
from millhand.serving.tensors import Tensors
from millhand_plugins.tensorrt.contexts import Contexts
from millhand_plugins.tensorrt.device import Buffers, Device
from millhand_plugins.tensorrt.engine import Engine, TensorSpec
from millhand_plugins.tensorrt.graphs import Graphs
from millhand_plugins.tensorrt.shapes import Extent

if TYPE_CHECKING:
    from millhand_plugins.tensorrt import api

log = logging.getLogger("millhand.worker")


def rows_cap(engine: Engine) -> int:
    """The most rows that a batch may have."""
    return max(min(extent.highest[0] for extent in profile.values()) for profile in engine.profiles)


class Lane:
    """Runs batches one after another. All calls belong into the device's context."""

    def __init__(self, engine: Engine, device: Device, contexts: Contexts) -> None:
        """Raises ModelError where the memory does not suffice."""
        self._engine = engine
        self._outputs = {tensor.name: tensor.dtype for tensor in engine.outputs}
        self._buffers = Buffers(device)
        self._contexts: list[api.IExecutionContext] = []
        self._graphs: Graphs | None = None
        self._own_graphs = contexts.own_graphs
        try:
            self._contexts = [contexts.make() for _ in engine.profiles]
            self._connect()
        except BaseException:
            self.close()
            raise
        self._seen: list[Any] = [None] * len(self._contexts)
        if contexts.runtime is not None:
            self._graphs = Graphs(contexts.runtime, self._stream)

    def _connect(self) -> None:
        """Give each context its profile, and all of them the same memory: only one runs at a time."""
        for number, context in enumerate(self._contexts):
            self._check(context.set_optimization_profile_async(number, self._stream), "select its profile")
        self._buffers.wait()
        self._buffers.add({tensor.name: self._largest_input(tensor) for tensor in self._engine.inputs})
        self._buffers.add({name: self._largest_output(name) for name in self._outputs})
        for context in self._contexts:
            for tensor in self._engine.tensors:
                address = self._buffers.address(tensor.name)
                self._check(context.set_tensor_address(tensor.name, address), f"take memory for '{tensor.name}'")

    @property
    def graphs(self) -> bool:
        """Whether batches run as CUDA graphs."""
        return self._own_graphs or self._graphs is not None

    @property
    def _stream(self) -> int:
        return int(self._buffers.stream.handle)

    def run(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Run one batch and wait for it. inputs: name -> array with the batch first; returns as many rows.

        Raises InputError for shapes that no profile takes, ModelError where the library fails.
        """
        shapes = {name: array.shape for name, array in inputs.items()}
        number = self._profile(shapes)
        context = self._contexts[number]
        sizes = {name: self._buffers.stage(name, array) for name, array in inputs.items()}
        known = self._set_shapes(number, shapes)
        results = {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}
        fetched = {name: _bytes(self._outputs[name], shape) for name, shape in results.items()}
        key = (number, *shapes.values())
        if self._graphs is not None and key in self._graphs:
            self._graphs.launch(key)
        elif self._graphs is not None and known:
            self._capture(key, context, sizes, fetched)
        else:
            self._enqueue(context, sizes, fetched)
        self._buffers.wait()
        return {name: self._buffers.taken(name, self._outputs[name], shape) for name, shape in results.items()}

    def fill_outputs(self, byte: int) -> None:
        """Overwrite what an earlier batch left, on the host and on the GPU."""
        for name in self._outputs:
            self._buffers.fill(name, byte)

    def close(self) -> None:
        """Free graphs, then contexts, then the memory that they use. May be called twice."""
        if self._graphs is not None:
            self._buffers.settle()
            self._graphs.close()
        self._contexts = []
        self._buffers.close()

    def _enqueue(self, context: api.IExecutionContext, sizes: Mapping[str, int], fetched: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            self._buffers.send(name, size)
        self._check(context.execute_async_v3(self._stream), "run")
        for name, size in fetched.items():
            self._buffers.fetch(name, size)

    def _capture(
        self, key: Any, context: api.IExecutionContext, sizes: Mapping[str, int], fetched: Mapping[str, int]
    ) -> None:
        """Capture a shape that has run before (the first run of a shape sets it up, which cannot be captured), and run
        it. A network that cannot be captured runs without graphs from then on."""
        assert self._graphs is not None
        try:
            self._graphs.capture(key, lambda: self._enqueue(context, sizes, fetched))
        except ModelError as error:
            log.warning("'%s' runs without CUDA graphs: %s", self._engine.path.name, error.message)
            self._graphs.close()
            self._graphs = None
            self._enqueue(context, sizes, fetched)
        else:
            self._graphs.launch(key)

    def _set_shapes(self, number: int, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Tell the context the shapes, where they are not the last batch's; whether they are."""
        if self._seen[number] == shapes:
            return True
        context = self._contexts[number]
        self._seen[number] = None
        for name, shape in shapes.items():
            self._check(context.set_input_shape(name, shape), f"take shape {list(shape)} for '{name}'")
        missing = context.infer_shapes()
        self._check(not missing, f"infer shapes: {', '.join(missing)} are not known")
        self._seen[number] = dict(shapes)
        return False

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The narrowest profile that takes these shapes: they are in ascending order of their batch."""
        for number, profile in enumerate(self._engine.profiles):
            if all(_within(shape, profile[name]) for name, shape in shapes.items()):
                return number
        widest = self._engine.profiles[-1]
        name = next(name for name, shape in shapes.items() if not _within(shape, widest[name]))
        extent = widest[name]
        raise InputError(
            f"tensor '{name}' has shape {list(shapes[name])}, the engine '{self._engine.path.name}' was built for "
            f"{list(extent.lowest)} to {list(extent.highest)}",
            hint="send another size, or widen [plugins.tensorrt.ranges] and build the engine anew",
        )

    def _largest_input(self, tensor: TensorSpec) -> int:
        """The most bytes that an input takes in any profile."""
        return max(_bytes(tensor.dtype, profile[tensor.name].highest) for profile in self._engine.profiles)

    def _largest_output(self, name: str) -> int:
        """The most bytes that an output takes in any profile. Raises ModelError where its shape depends on data."""
        sizes = []
        for context, profile in zip(self._contexts, self._engine.profiles):  # noqa: B905 (Python 3.10; one each)
            for tensor, extent in profile.items():
                self._check(context.set_input_shape(tensor, extent.highest), f"take its own shapes for '{tensor}'")
            missing = context.infer_shapes()
            shape = tuple(context.get_tensor_shape(name))
            if missing or any(size < 0 for size in shape):
                raise ModelError(
                    f"'{self._engine.path.name}': the shape of output '{name}' depends on the data",
                    hint="export the model with outputs of known shape, or serve it with the backend onnxruntime",
                )
            sizes.append(_bytes(self._outputs[name], shape))
        return max(sizes)

    def _check(self, done: Any, what: str) -> None:
        if not done:
            raise ModelError(
                f"'{self._engine.path.name}' could not {what}: {self._engine.said()}",
                hint="look at nvidia-smi and the driver's log; if it stays, build the engine anew",
            )


def _within(shape: tuple[int, ...], extent: Extent) -> bool:
    return len(shape) == len(extent.lowest) and all(
        low <= size <= high
        for size, low, high in zip(shape, extent.lowest, extent.highest)  # noqa: B905 (lengths equal)
    )


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
