"""A session on anything but the plain CPU: proved before it serves, and each batch size run the way that is fastest.

Runs in workers: Python 3.10.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from millhand.errors import AcceleratorError, MillhandError, ModelError
from millhand.serving.tensors import Specs, Tensors
from millhand_plugins.onnxruntime import proof
from millhand_plugins.onnxruntime.artifact import Artifact
from millhand_plugins.onnxruntime.ladder import batch_sizes
from millhand_plugins.onnxruntime.providers import CPU_PROVIDER, first_line
from millhand_plugins.onnxruntime.session import OnnxruntimeSession
from millhand_plugins.onnxruntime.trials import Judge, Trials
from millhand_plugins.onnxruntime.ways import RECORDING, Arrays, Bound, CudaGraph, OneThread, Plain

log = logging.getLogger("millhand.worker")


class AcceleratedSession(OnnxruntimeSession):
    """`ProvingSession` around InferenceSessions with other providers than the CPU's. Serves nobody before `prove`."""

    concurrent = False  # one stream: a second batch at once would only wait on the device

    def __init__(self, artifact: Artifact) -> None:
        """Raises what `Artifact.open` raises."""
        self._artifact = artifact
        self._folder = tempfile.TemporaryDirectory(prefix="millhand-proof-")
        try:
            self._session = artifact.open(profile=Path(self._folder.name) / "run")
            super().__init__(self._session, artifact.path)
        except BaseException:
            self._folder.cleanup()
            raise
        self._way = self._unproved
        self._example: Tensors = {}
        self._kept: list[Bound | CudaGraph | OneThread] = []
        self.proof: Mapping[str, Any] = {}

    def prove(self, inputs: Specs, max_batch: int) -> None:
        """Run real inferences there and on the CPU and compare; look up in the profile what ran where; then measure
        which way each batch size runs fastest.

        Sets `proof`: `provider`, `providers` (the nodes of each), `nodes`, `gpu_nodes`, `gpu_share`, `cpu_nodes`,
        `max_difference` and `tolerance` (shares of the largest value), `reference`, `batch_sizes` (empty: any),
        `first_run_ms` (the first inference, which any load pays), `proof_ms` (the rest of the proof), `ways` (batch
        size -> `way`, and `us` of each that was tried), `left_out` (way -> why it was not tried), `pinned` and
        `trials_ms`. Raises ModelError where the provider was not used or gives another answer.
        """
        name, rows = self._artifact.path.name, self._ready(proof.examples(inputs))
        began = time.monotonic()
        found = self._first_answer(_row(rows, 0))
        ran = time.monotonic()
        nodes = self._take_profile()
        evidence = proof.check_nodes(name, nodes, self._session.get_providers()[0])
        if evidence["cpu_nodes"]:
            log.info("'%s': on the CPU run %s", name, ", ".join(evidence["cpu_nodes"]))
        half = bool(self._artifact.options.get("tf32")) or any(node.half for node in nodes)
        expected, reference = self._reference(rows)
        judge = Judge(name, rows, expected, proof.HALF_TOLERANCE if half else proof.TOLERANCE)
        judge.check(found, 1)
        proved = time.monotonic()
        sizes, measured = self._measure(judge, inputs, nodes, max_batch)
        self._example = _row(rows, 0)
        self.proof = {
            **evidence,
            "max_difference": judge.largest,
            "tolerance": judge.tolerance,
            "reference": reference,
            "batch_sizes": list(sizes),
            "first_run_ms": round((ran - began) * 1e3, 1),
            "proof_ms": round((proved - ran) * 1e3, 1),
            **measured,
            "trials_ms": round((time.monotonic() - proved) * 1e3, 1),
        }

    def run(self, inputs: Tensors) -> Arrays:
        """As `OnnxruntimeSession.run`. Raises ModelError before `prove`, AcceleratorError where every input fails."""
        with RECORDING:
            return super().run(inputs)

    def close(self) -> None:
        super().close()
        self._session = None
        for kept in reversed(self._kept):
            kept.close()
        self._kept.clear()
        self._folder.cleanup()

    def _unproved(self, inputs: Tensors) -> Arrays:
        raise ModelError(
            f"'{self._name}' has not proved that it runs on '{self._artifact.providers[0]}'",
            hint="call prove() once after load()",
        )

    def _first_answer(self, row: Tensors) -> Arrays:
        try:
            return Plain(self._session, list(self.outputs))(row)
        except Exception as error:
            raise ModelError(
                f"the first inference on '{self._artifact.providers[0]}': '{self._name}' failed: {first_line(error)}",
                hint="check CUDA, cuDNN and the GPU's free memory",
            ) from error

    def _measure(
        self, judge: Judge, inputs: Specs, nodes: list[proof.NodeRun], max_batch: int
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Choose the ways. Returns the batch sizes that a convolution net runs at (none for others, which take any),
        and what was measured.

        ONNX Runtime's convolutions on CUDA remember one cuDNN plan, the last shape's: each change of the batch size
        builds it anew, milliseconds for every convolution (github.com/microsoft/onnxruntime/issues/23006). A session
        that only ever sees one shape does not.
        """
        allowed = bool(self._artifact.options.get("fixed_batches", True))
        fixed = allowed and any(node.operator in proof.CONVOLUTIONS and node.accelerated for node in nodes)
        trials = Trials(self._artifact, self._session, judge, (inputs, self.outputs), fixed)
        self._kept = trials.kept
        sizes = batch_sizes(max_batch)
        usable = allowed and (fixed or trials.possible)
        way = trials.ladder(sizes) if usable else Plain(self._session, list(self.outputs))
        self._way, self._session = way, None  # the ways hold the sessions that are still used
        measured = {"ways": trials.found, "left_out": trials.left_out, "pinned": trials.pinned}
        return sizes if fixed else (), measured

    def _take_profile(self) -> list[proof.NodeRun]:
        """Stop profiling, and read what it has written."""
        try:
            return proof.read_profile(Path(self._session.end_profiling()))
        finally:
            self._folder.cleanup()

    def _reference(self, rows: Tensors) -> tuple[Arrays | None, str]:
        """The CPU's answers, or None and why there are none. A model that it cannot run cannot fall back to it."""
        try:
            session = OnnxruntimeSession(self._artifact.on_cpu().open(), self._artifact.path)
            answers = [session.run(_row(rows, number)) for number in range(proof.EXAMPLES)]
            return {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}, CPU_PROVIDER
        except MillhandError as error:
            return None, f"none: {error.message}"

    def _failure(self, error: Exception) -> MillhandError:
        """Tells a request that fails from an accelerator that does: the example, which ran at the load, is run again.

        An error of CUDA stays with the process, and each inference after it fails, too.
        """
        if self._example:
            try:
                self._way(self._example)
            except Exception as again:
                provider = self._artifact.providers[0]
                return AcceleratorError(
                    f"'{self._name}': '{provider}' fails with every input since: {first_line(again)}",
                    hint="the worker is started again; look at nvidia-smi and the kernel's log for the GPU",
                )
        return super()._failure(error)


def _row(rows: Tensors, number: int) -> Tensors:
    return {name: array[number : number + 1] for name, array in rows.items()}
