"""The recorded rows that a candidate is fitted to, and what a model's tensors hold on them. Needs onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from millhand.errors import ModelError
from millhand.workshop.recipe import Job
from millhand_plugins.quantize.graph import INLINE_BYTES

Rows = dict[str, NDArray[Any]]
"""Input name -> array with the batch first."""

_RECORD = "record real inputs of the model ([recording] in the configuration), or name data that its evaluation takes"


class Calibration:
    """Checked rows. What was left out of them stands in `notes`."""

    def __init__(self, job: Job, least: int, most: int, seed: int) -> None:
        """Draw at most `most` of the job's rows at random, the same ones for a seed.

        Raises ModelError where there are fewer than `least`, or they do not fit what the model takes.
        """
        self.notes: list[str] = []
        rows = _checked(job.inputs, job.calibration)
        finite = np.logical_and.reduce([_finite_rows(array) for array in rows.values()])
        if not finite.all():
            self.notes.append(f"{int((~finite).sum())} calibration rows with NaN or infinity were left out")
        kept = np.flatnonzero(finite)
        if len(kept) < least:
            raise ModelError(
                f"there are {len(kept)} calibration rows that can be used, at least {least} are needed", hint=_RECORD
            )
        if len(kept) > most:
            kept = np.sort(np.random.default_rng(seed).choice(kept, most, replace=False))
        self.rows: Rows = {name: array[kept] for name, array in rows.items()}
        self._batch = max(1, min(job.max_batch, 16))

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def batches(self) -> Iterator[Rows]:
        """A few rows at a time, all of one size but the last."""
        for begin in range(0, len(self), self._batch):
            yield {name: array[begin : begin + self._batch] for name, array in self.rows.items()}

    def watch(self, model: onnx.ModelProto, tensors: Sequence[str]) -> Iterator[Rows]:
        """Run the model on the CPU, batch by batch, and yield what the named tensors hold.

        Raises ModelError where it does not run.
        """
        session = _session(model, tensors)
        for rows in self.batches():
            try:
                outputs = session.run(list(tensors), rows)
            except Exception as error:
                raise ModelError(
                    f"the model does not run on the calibration rows: {first_line(error)}",
                    hint="check that model.toml declares the shapes that the artifact takes",
                ) from error
            yield dict(zip(tensors, outputs, strict=True))


def _checked(inputs: Mapping[str, tuple[str, tuple[int, ...]]], given: Mapping[str, NDArray[Any]]) -> Rows:
    if not given:
        raise ModelError("there are no calibration rows", hint=_RECORD)
    rows: Rows = {}
    for name, (dtype, shape) in inputs.items():
        if name not in given:
            raise ModelError(
                f"the calibration rows lack the input '{name}'; they have {', '.join(given)}", hint=_RECORD
            )
        array = np.asarray(given[name])
        wanted = ("n", *("any" if size < 0 else str(size) for size in shape[1:]))
        fits = array.ndim == len(shape) and all(
            size in (-1, there) for size, there in zip(shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            raise ModelError(
                f"calibration rows of input '{name}' have the shape {list(array.shape)}, "
                f"the model takes [{', '.join(wanted)}]",
                hint="record them anew with this version of the model",
            )
        if not np.can_cast(array.dtype, np.dtype(dtype), "same_kind"):
            raise ModelError(
                f"calibration rows of input '{name}' are {array.dtype}, the model takes {dtype}",
                hint="record them anew with this version of the model",
            )
        rows[name] = np.ascontiguousarray(array, np.dtype(dtype))
    counts = {name: len(array) for name, array in rows.items()}
    if len(set(counts.values())) > 1:
        raise ModelError(
            f"the inputs have different numbers of calibration rows: {counts}", hint="give as many rows of each input"
        )
    return rows


def _finite_rows(array: NDArray[Any]) -> NDArray[np.bool_]:
    if array.dtype.kind != "f":
        return np.ones(len(array), bool)
    return np.asarray(np.isfinite(array).reshape(len(array), -1).all(axis=1))


def _session(model: onnx.ModelProto, tensors: Sequence[str]) -> Any:
    """A session with further outputs. Tensors that are written nowhere are found by ONNX Runtime, and named."""
    import onnxruntime  # type: ignore[import-untyped]

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    present = {item.name for item in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in present)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        if sum(tensor.ByteSize() for tensor in watched.graph.initializer) <= INLINE_BYTES:
            return onnxruntime.InferenceSession(
                watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "watched.onnx"
            onnx.save(watched, str(path), save_as_external_data=True)
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime cannot run the model: {first_line(error)}", hint="check that the artifact serves as it is"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
