"""A session on a GPU: proved before it serves, and for convolution nets one inner session for each batch size.

Runs in workers: Python 3.10.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import MillhandError, ModelError
from millhand.serving.tensors import Specs, Tensors
from millhand_plugins.onnxruntime import proof
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.session import OnnxruntimeSession

log = logging.getLogger("millhand.worker")

SIZE_STEP = 8


class GpuSession(OnnxruntimeSession):
    """`ProvingSession` around InferenceSessions with a GPU provider. Runs nothing for others before `prove`."""

    concurrent = False  # one stream: a second batch at once would only wait on the device

    def __init__(self, artifact: Artifact) -> None:
        """Raises what `Artifact.open` raises."""
        self._artifact = artifact
        self._folder = tempfile.TemporaryDirectory(prefix="millhand-proof-")
        try:
            super().__init__(artifact.open(profile=Path(self._folder.name) / "run"), artifact.path)
        except BaseException:
            self._folder.cleanup()
            raise
        self._batches: FixedBatches | None = None
        self.proof: Mapping[str, Any] = {}

    def prove(self, inputs: Specs, max_batch: int) -> None:
        """Run a real inference on the GPU and on the CPU and compare; look up in the profile what ran where.

        Sets `proof`: `provider`, `nodes`, `gpu_nodes`, `gpu_share`, `cpu_nodes`, `max_difference` and `tolerance`
        (shares of the largest value), `reference`, `batch_sizes` (empty: any), `first_run_ms` (the first inference,
        which any load pays) and `proof_ms` (the rest of the proof). Raises ModelError where the GPU was not used or
        gives another answer.
        """
        name, row = self._artifact.path.name, proof.example(inputs)
        began = time.monotonic()
        try:
            found = self._infer(row)
        except ModelError as error:
            raise ModelError(
                f"the first inference on the GPU: {error.message}", hint="check CUDA, cuDNN and the GPU's free memory"
            ) from error
        ran = time.monotonic()
        nodes = self._take_profile()
        evidence = proof.check_nodes(name, nodes)
        if evidence["cpu_nodes"]:
            log.info("'%s': on the CPU run %s", name, ", ".join(evidence["cpu_nodes"]))
        half = bool(self._artifact.options.get("tf32")) or any(node.half for node in nodes)
        tolerance = proof.HALF_TOLERANCE if half else proof.TOLERANCE
        expected, reference = self._reference(row)
        if expected is None:
            proof.check_finite(name, found)
            largest = None
        else:
            largest = proof.check_answer(name, expected, found, tolerance, 1)
        proved = time.monotonic()
        sizes = self._batch_sizes(nodes, max_batch)
        if sizes:
            self._batches = FixedBatches(self._session, self._artifact, sizes)
            for size in sizes[1:]:
                answer = self._infer({key: np.repeat(array, size, axis=0) for key, array in row.items()})
                if expected is not None and largest is not None:
                    first = {key: array[:1] for key, array in answer.items()}
                    largest = max(largest, proof.check_answer(name, expected, first, tolerance, size))
        self.proof = {
            **evidence,
            "max_difference": largest,
            "tolerance": tolerance,
            "reference": reference,
            "batch_sizes": list(sizes),
            "first_run_ms": round((ran - began) * 1e3, 1),
            "proof_ms": round((proved - ran) * 1e3, 1),
        }

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """As `OnnxruntimeSession.run`. Raises ModelError before `prove`."""
        if not self.proof:
            raise ModelError(
                f"'{self._name}' has not proved that it runs on the GPU", hint="call prove() once after load()"
            )
        return super().run(inputs)

    def close(self) -> None:
        super().close()
        self._batches = None
        self._folder.cleanup()

    def _call(self, inputs: Tensors) -> list[NDArray[Any]]:
        if self._batches is None:
            return super()._call(inputs)
        return self._batches.run(self._output_names, inputs)

    def _take_profile(self) -> list[proof.NodeRun]:
        """Stop profiling, and read what it has written."""
        try:
            return proof.read_profile(Path(self._session.end_profiling()))
        finally:
            self._folder.cleanup()

    def _reference(self, row: Tensors) -> tuple[dict[str, NDArray[Any]] | None, str]:
        """The CPU's answer, or None and why there is none. A model that it cannot run cannot fall back to it either."""
        try:
            session = OnnxruntimeSession(self._artifact.on_cpu().open(), self._artifact.path)
            return session.run(row), "CPUExecutionProvider"
        except MillhandError as error:
            return None, f"none: {error.message}"

    def _batch_sizes(self, nodes: list[proof.NodeRun], max_batch: int) -> tuple[int, ...]:
        """1, 8, 64, ... and `max_batch` for a convolution net; none for others, which take any size as it comes."""
        fixed = self._artifact.options.get("fixed_batches", True)
        if not fixed or not any(node.operator in proof.CONVOLUTIONS and node.on_gpu for node in nodes):
            return ()
        sizes = [1]
        while sizes[-1] * SIZE_STEP < max_batch:
            sizes.append(sizes[-1] * SIZE_STEP)
        return (*sizes, max_batch) if max_batch > 1 else tuple(sizes)


class FixedBatches:
    """An InferenceSession for each of a few batch sizes; a batch is filled up to the next one with its last row.

    ONNX Runtime's convolutions on CUDA remember one cuDNN plan, the last shape's: each change of the batch size builds
    it anew, milliseconds for every convolution (github.com/microsoft/onnxruntime/issues/23006). A session that only
    ever sees one shape does not.
    """

    def __init__(self, first: Any, artifact: Artifact, sizes: Sequence[int]) -> None:
        """`first` serves the smallest size. `sizes` ascend."""
        self._sessions = {sizes[0]: first, **{size: artifact.open() for size in sizes[1:]}}

    def run(self, outputs: Sequence[str], inputs: Tensors) -> list[NDArray[Any]]:
        """Run one batch, one larger than the largest size in parts. inputs: name -> array; returns as many rows."""
        rows, largest = len(next(iter(inputs.values()))), max(self._sessions)
        if rows <= largest:
            return self._run_part(outputs, inputs, rows)
        parts = []
        for start in range(0, rows, largest):
            part = {name: array[start : start + largest] for name, array in inputs.items()}
            parts.append(self._run_part(outputs, part, min(largest, rows - start)))
        return [np.concatenate(arrays) for arrays in zip(*parts)]  # noqa: B905 (Python 3.10; all have every output)

    def _run_part(self, outputs: Sequence[str], inputs: Tensors, rows: int) -> list[NDArray[Any]]:
        size = next(size for size in self._sessions if size >= rows)
        if size > rows:
            inputs = {name: _filled(array, size) for name, array in inputs.items()}
        return [array[:rows] for array in self._sessions[size].run(outputs, inputs)]


def _filled(array: NDArray[Any], size: int) -> NDArray[Any]:
    filled = np.empty((size, *array.shape[1:]), dtype=array.dtype)
    filled[: len(array)] = array
    filled[len(array) :] = array[-1]
    return filled
