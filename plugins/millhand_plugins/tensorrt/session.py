"""The session around an engine: proved before it serves, several batches at once, each on a stream of its own.

Runs in workers: Python 3.10.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import AcceleratorError, InputError, ModelError
from millhand.serving.tensors import Specs, Tensors
from millhand_plugins.tensorrt.contexts import Contexts
from millhand_plugins.tensorrt.device import Device
from millhand_plugins.tensorrt.engine import Engine
from millhand_plugins.tensorrt.lane import Lane, rows_cap
from millhand_plugins.tensorrt.lifetimes import drop_frames

log = logging.getLogger("millhand.worker")

UNWRITTEN = 0xFF
"""As a float of any width it is NaN: an output that the GPU has not written cannot be taken for an answer."""
SEED = 20_260
TOLERANCE = 0.03
"""How far a row may differ between batch sizes, as a share of the largest value: kernels of half precision and int8 sum
in another order for another shape."""
SCALE_FLOOR = 1e-6


class TensorrtSession:
    """`ProvingSession`. Runs nothing for others before `prove`."""

    concurrent = True
    """Each batch has a context, buffers and a stream of its own."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        """options: the keys of `[plugins.tensorrt]`. Raises ModelError where the engine does not fit this machine."""
        self._name = path.name
        self._engine = engine = Engine(path, options)
        try:
            self._contexts = Contexts(engine, options)
            self._device = Device()
        except BaseException:
            engine.close()
            raise
        self._streams = int(options.get("streams", 2))
        self._lanes: list[Lane] = []
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        self._making = threading.Lock()
        self.inputs: Specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in engine.inputs}
        self.outputs: Specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in engine.outputs}
        self.proof: Mapping[str, Any] = {}

    def prove(self, inputs: Specs, max_batch: int) -> None:
        """Run real inferences: every output must be written and finite, and a row's answer the same in any batch.

        Sets `proof`: as `ProvingSession`, with `library`, `streams`, `graphs` (whether CUDA graphs are used),
        `batch_difference` (a share of the largest value), `first_run_ms` and `proof_ms`. There is no answer of a CPU:
        an engine has none; the workshop has compared it with the model that it was made of. Raises ModelError.
        """
        began = time.monotonic()
        row = self._example()
        first = self._run(row, prefill=True)
        ran = time.monotonic()
        self._check_written(first)
        largest = 0.0
        rows = min(max_batch, rows_cap(self._engine))
        if rows > 1:
            many = self._run({name: np.repeat(array, rows, axis=0) for name, array in row.items()}, prefill=True)
            self._check_written(many)
            largest = max(_difference(first[name], array) for name, array in many.items())
            if not largest <= TOLERANCE:
                raise ModelError(
                    f"'{self._name}': the same row gets another answer in a batch of {rows} than alone, by "
                    f"{largest:.2g} of the largest value, allowed is {TOLERANCE:g}",
                    hint="export the model so that rows do not touch each other, or build the engine anew",
                )
        for _ in range(2):  # a shape is set up at its first run and captured at its second
            self._run(row)
        self._contexts.keep_cache()
        library, layers = self._engine.library, int(self._engine.trt.num_layers)
        self.proof = {
            "provider": library.title,
            "library": library.name,
            "nodes": layers,
            "gpu_nodes": layers,
            "gpu_share": 1.0,
            "cpu_nodes": [],
            "max_difference": None,
            "reference": "none: an engine runs on its GPU alone",
            "batch_difference": largest,
            "graphs": all(lane.graphs for lane in self._lanes),
            "streams": self._streams,
            "first_run_ms": round((ran - began) * 1e3, 1),
            "proof_ms": round((time.monotonic() - ran) * 1e3, 1),
        }

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch, one with more rows than the engine takes in parts. Any thread may, several at once.

        Raises ModelError before `prove`, InputError for a size that the engine was not built for, AcceleratorError
        where the GPU fails with every input.
        """
        if not self.proof:
            raise ModelError(
                f"'{self._name}' has not proved that it runs on the GPU", hint="call prove() once after load()"
            )
        try:
            return self._run_parts(inputs)
        except ModelError as error:
            lost = self._lost_accelerator()
            if lost is None:
                raise
            raise lost from error

    def close(self) -> None:
        """Free streams, buffers, contexts, engine and the device's context, in this order. May be called twice."""
        lanes, self._lanes = self._lanes, []
        if lanes:
            with self._device.current():
                for lane in lanes:
                    lane.close()
        self._free = queue.SimpleQueue()
        self._contexts.close()
        self._engine.close()
        self._device.close()

    def _run_parts(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        rows, cap = len(next(iter(inputs.values()))), rows_cap(self._engine)
        if rows <= cap:
            return self._run(inputs)
        parts = [
            self._run({name: array[start : start + cap] for name, array in inputs.items()})
            for start in range(0, rows, cap)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def _lost_accelerator(self) -> AcceleratorError | None:
        """Tells a batch that fails (None) from a GPU that does: the row of the proof is run again. An error of CUDA
        stays with the process, and each inference after it fails, too."""
        try:
            self._run(self._example())
        except ModelError as again:
            return AcceleratorError(
                f"'{self._name}': the GPU fails with every input since: {again.message}",
                hint="the worker is started again; look at nvidia-smi and the kernel's log for the GPU",
            )
        return None

    def _run(self, inputs: Tensors, prefill: bool = False) -> dict[str, NDArray[Any]]:
        try:
            return self._run_lane(inputs, prefill)
        except (ModelError, InputError) as error:
            drop_frames(error)
            raise error
        except Exception as error:
            drop_frames(error)
            raise ModelError(
                f"'{self._name}' failed on the GPU: {error}", hint="look at the driver's log (dmesg) and nvidia-smi"
            ) from error

    def _run_lane(self, inputs: Tensors, prefill: bool) -> dict[str, NDArray[Any]]:
        with self._device.current():
            lane = self._take()
            try:
                if prefill:
                    lane.fill_outputs(UNWRITTEN)
                return lane.run(inputs)
            finally:
                self._free.put(lane)

    def _take(self) -> Lane:
        """A lane that nobody uses; made where there are fewer than `streams`, else waited for."""
        with self._making:
            try:
                return self._free.get_nowait()
            except queue.Empty:
                if len(self._lanes) < self._streams:
                    lane = Lane(self._engine, self._device, self._contexts)
                    self._lanes.append(lane)
                    return lane
        return self._free.get()

    def _example(self) -> dict[str, NDArray[Any]]:
        """One row, the same at each call: floats from 0.1 to 1, so that logarithms and roots are finite; integers 0
        and 1, valid as indices. Free dimensions have their usual size."""
        random = np.random.default_rng(SEED)
        made: dict[str, NDArray[Any]] = {}
        for tensor in self._engine.inputs:
            shape = (1, *self._engine.profiles[-1][tensor.name].usual[1:])
            values = (
                random.uniform(0.1, 1.0, shape) if tensor.dtype.startswith("float") else random.integers(0, 2, shape)
            )
            made[tensor.name] = values.astype(tensor.dtype)
        return made

    def _check_written(self, outputs: Tensors) -> None:
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ModelError(
                    f"'{self._name}': output '{name}' is not finite, or was not written, for a test input",
                    hint="look at the model in float32; half precision overflows beyond 65,504",
                )


def _difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Between one row and the same row in a batch: the largest difference, as a share of the largest value."""
    if expected.dtype.kind != "f":
        return 0.0  # a tie may fall either way
    scale = max(float(np.abs(expected).max(initial=0.0)), SCALE_FLOOR)
    return float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max(initial=0.0)) / scale
