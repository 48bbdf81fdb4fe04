"""The rows that makers calibrate with and candidates are judged by: a plugin's, the owner's, or recorded on this node.

Never random ones. What calibrates is never what judges, and what a maker may try its work on is not what the proof is
about.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, suggestion
from millhand.pipeline.recorded import Recorded, source_of
from millhand.serving.manifest import Manifest
from millhand.serving.tensors import DATATYPE_OF, Specs, Tensors, dtype_name, fits
from millhand.workshop.metric import ACCURACY, AGREEMENT, RMSE, Metric

TRUTH, GROUP = "truth", "group"
HELD_LEAST = 64
CALIBRATION_LEAST = 32
CALIBRATION_CAP = 2048
"""More rows make calibration slower and hardly better."""
CALIBRATION_SHARE = 0.25
TRIAL_EVERY = 3
"""Of the held rows, every third is for makers that try their own work; the proof is about the others."""
SPLIT_SEED = 5
METRIC_OF_TASK = {"classification": ACCURACY, "regression": RMSE}


@dataclass(frozen=True)
class Rows:
    """Rows of one model, checked."""

    calibration: Tensors
    trial: Tensors
    trial_truth: NDArray[Any] | None
    held: Tensors
    truth: NDArray[Any] | None
    metric: Metric
    source: str
    """Where they come from, in words, with the SHA-256 of their bytes."""


@dataclass(frozen=True)
class Parts:
    """Rows before they are checked."""

    where: str
    """The file or plugin, for errors."""
    calibration: Tensors
    held: Tensors
    truth: NDArray[Any] | None
    source: str


def metric_for(manifest: Manifest, name: str) -> Metric:
    """How a metric reads the model's outputs. Raises InputError where model.toml does not say it."""
    spec = manifest.prediction
    if spec is None:
        if name == AGREEMENT:
            return Metric(name=name)
        raise InputError(
            f"model '{manifest.name}' has no [prediction], which '{name}' needs",
            hint="add [prediction] to model.toml, or leave the truth out: then the original's own answers judge",
        )
    if name not in (AGREEMENT, METRIC_OF_TASK[spec.task]):
        raise InputError(f"metric '{name}' does not go with a {spec.task}", hint="mend [prediction] in model.toml")
    low, high = (limit if np.isfinite(limit) else None for limit in (spec.low, spec.high))
    return Metric(
        name=name,
        task=spec.task,
        output=spec.output,
        labels=len(spec.labels),
        scale=spec.scale,
        low=low,
        high=high,
    )


def checked(manifest: Manifest, parts: Parts, metric: str = "") -> Rows:
    """Check rows against model.toml, and set those aside that makers may try their work on.

    metric: empty takes what the truth allows. Raises InputError naming file, array, value and remedy.
    """
    specs = manifest.specs(manifest.inputs)
    count = _check_tensors(manifest, f"{parts.where}: held rows", specs, parts.held)
    if count < HELD_LEAST:
        raise _too_few(parts.where, "held", count, HELD_LEAST)
    if parts.calibration:
        rows = _check_tensors(manifest, f"{parts.where}: calibration rows", specs, parts.calibration)
        if rows < CALIBRATION_LEAST:
            raise _too_few(parts.where, "calibration", rows, CALIBRATION_LEAST)
    else:
        raise _too_few(parts.where, "calibration", 0, CALIBRATION_LEAST)
    wanted = metric or (METRIC_OF_TASK.get(_task(manifest), ACCURACY) if parts.truth is not None else AGREEMENT)
    how = metric_for(manifest, wanted)
    truth = None if wanted == AGREEMENT else _checked_truth(parts, how, count, manifest)
    trial = np.arange(count) % TRIAL_EVERY == 0
    return Rows(
        calibration=parts.calibration,
        trial={name: array[trial] for name, array in parts.held.items()},
        trial_truth=None if truth is None else truth[trial],
        held={name: array[~trial] for name, array in parts.held.items()},
        truth=None if truth is None else truth[~trial],
        metric=how,
        source=f"{parts.source}; sha256 {_digest(parts)}",
    )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz, or of a folder of .npy files, by name. Raises InputError naming file and remedy."""
    try:
        if path.is_dir():
            return {file.stem: np.load(file, allow_pickle=False) for file in sorted(path.glob("*.npy"))}
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise InputError(f"'{path}' does not exist", hint="name an .npz file, or a folder of .npy files") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}", hint="check its permissions") from error
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise InputError(
            f"'{path}' is no .npz of plain arrays: {error}", hint="write it with numpy.savez(path, name=array, ...)"
        ) from error


def owner_parts(path: Path, manifest: Manifest) -> Parts:
    """The owner's arrays, named as the inputs, with `truth` and `group` where they have them, split into two parts.

    Rows of one group (a machine, a life) stay on one side. Raises InputError.
    """
    arrays = read_arrays(path)
    inputs = [tensor.name for tensor in manifest.inputs]
    extra = {name: arrays.pop(name) for name in (TRUTH, GROUP) if name in arrays and name not in inputs}
    for name in arrays:
        if name not in inputs:
            raise InputError(
                f"'{path}': array '{name}' is no input of model '{manifest.name}'"
                f"{suggestion(name, [*inputs, TRUTH, GROUP])}",
                hint=f"name the arrays {', '.join(inputs)}, and '{TRUTH}' or '{GROUP}' beside them",
            )
    count = _check_tensors(manifest, f"'{path}'", manifest.specs(manifest.inputs), arrays)
    for name, array in extra.items():
        if array.ndim != 1 or len(array) != count:
            raise InputError(
                f"'{path}': array '{name}' has shape {list(array.shape)}, expected [{count}]",
                hint="give one value a row",
            )
    group = extra.get(GROUP)
    calibrates = _drawn(count) if group is None else _drawn_groups(path, group)
    truth = extra.get(TRUTH)
    return Parts(
        where=f"'{path}'",
        calibration={name: array[calibrates][:CALIBRATION_CAP] for name, array in arrays.items()},
        held={name: array[~calibrates] for name, array in arrays.items()},
        truth=None if truth is None else truth[~calibrates],
        source=f"'{path.name}' of the owner" + ("" if group is None else ", split by group"),
    )


def recorded_parts(path: Path, manifest: Manifest) -> Parts:
    """What this node has recorded, in the order of time: the oldest rows calibrate, the newer ones judge.

    Rows that are not finite (a window with a gap) are passed over. Raises InputError, FileNotFoundError.
    """
    recorded = Recorded.read(path)
    if recorded.source != source_of(manifest):
        raise InputError(
            f"'{path}' was recorded when model.toml of '{manifest.name}' had other inputs, window or features",
            hint="let the node record anew, or bring rows with --data",
        )
    count = _check_tensors(manifest, f"'{path}'", manifest.specs(manifest.inputs), recorded.inputs, finite=False)
    whole = np.ones(count, bool)
    for array in recorded.inputs.values():
        whole &= _finite_rows(array)
    order = np.argsort(recorded.window_end_ns, kind="stable")
    order = order[whole[order]]
    split = int(len(order) * CALIBRATION_SHARE)
    return Parts(
        where=f"'{path}'",
        calibration={name: array[order[:split][-CALIBRATION_CAP:]] for name, array in recorded.inputs.items()},
        held={name: array[order[split:]] for name, array in recorded.inputs.items()},
        truth=None,
        source="recorded on this node",
    )


def _task(manifest: Manifest) -> str:
    return manifest.prediction.task if manifest.prediction else ""


def _drawn(count: int) -> NDArray[np.bool_]:
    """A share of the rows, drawn the same at each call."""
    chosen = np.zeros(count, bool)
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    chosen[order[: int(count * CALIBRATION_SHARE)]] = True
    return chosen


def _drawn_groups(path: Path, group: NDArray[Any]) -> NDArray[np.bool_]:
    """Whole groups, drawn the same at each call, until they hold a share of the rows. Raises InputError."""
    names, place, sizes = np.unique(group, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise InputError(
            f"'{path}': array '{GROUP}' has one value only, so no part can be held back",
            hint="give the rows of at least two machines, or leave the array out",
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(names))
    before = np.cumsum(sizes[order]) - sizes[order]
    taken = order[before < len(group) * CALIBRATION_SHARE][: len(names) - 1]
    return np.isin(place.reshape(-1), taken)


def _check_tensors(manifest: Manifest, where: str, specs: Specs, arrays: Tensors, finite: bool = True) -> int:
    """Return the number of rows. Raises InputError naming array, what came, what is expected, and the remedy."""
    counts: dict[str, int] = {}
    for name, (dtype, shape) in specs.items():
        array = arrays.get(name)
        if dtype == "object":
            raise InputError(
                f"model '{manifest.name}': input '{name}' is BYTES, which no maker can calibrate",
                hint="build models whose inputs are numbers",
            )
        if array is None:
            raise InputError(
                f"{where}: array '{name}' is missing{suggestion(name, arrays)}",
                hint=f"there are: {', '.join(arrays) or 'none'}; give one array for each input of the model",
            )
        if dtype_name(array.dtype) != dtype:
            raise InputError(
                f"{where}: array '{name}' is {array.dtype}, expected {dtype} ({DATATYPE_OF[dtype]})",
                hint=f"write it as array.astype('{dtype}')",
            )
        if not fits(array.shape, shape):
            raise InputError(
                f"{where}: array '{name}' has shape {list(array.shape)}, expected {list(shape)}",
                hint="-1 stands for any size; the first dimension is the batch",
            )
        if finite and not (rows := _finite_rows(array)).all():
            number = int(np.argmin(rows))
            place = np.argwhere(~np.isfinite(array[number]))[0].tolist()
            raise InputError(
                f"{where}: array '{name}' is {array[number][tuple(place)]} at {[number, *place]}",
                hint=f"leave that row out; {int((~rows).sum())} of {len(rows)} rows are not finite",
            )
        counts[name] = len(array)
    if len(set(counts.values())) > 1:
        raise InputError(f"{where}: the arrays have {counts} rows", hint="give all of them the same first dimension")
    return next(iter(counts.values()))


def _finite_rows(array: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows hold numbers alone."""
    if array.dtype.kind != "f":
        return np.ones(len(array), bool)
    return np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim))))


def _checked_truth(parts: Parts, metric: Metric, count: int, manifest: Manifest) -> NDArray[Any]:
    truth = parts.truth
    assert truth is not None
    where = f"{parts.where}: array '{TRUTH}'"
    if truth.shape != (count,):
        raise InputError(f"{where} has shape {list(truth.shape)}, expected [{count}]", hint="give one value a row")
    if metric.name == RMSE:
        values = np.asarray(truth, np.float64) if truth.dtype.kind in "fiu" else np.full(count, np.nan)
        if not np.isfinite(values).all():
            number = int(np.argmin(np.isfinite(values)))
            raise InputError(f"{where} is {truth[number]!r} in row {number}, expected a number", hint="mend that row")
        return values
    labels = manifest.prediction.labels if manifest.prediction else ()
    bad = np.ones(count, bool) if truth.dtype.kind not in "iu" else (truth < 0) | (truth >= len(labels))
    if bad.any():
        number = int(np.argmax(bad))
        numbers = ", ".join(f"{place} = {label}" for place, label in enumerate(labels))
        raise InputError(
            f"{where} is {truth[number]!r} in row {number}, expected a whole number from 0 to {len(labels) - 1}",
            hint=f"give the classes by number: {numbers}",
        )
    return truth.astype(np.int64)


def _too_few(where: str, part: str, count: int, least: int) -> InputError:
    return InputError(
        f"{where}: {count} {part} rows, at least {least} are needed",
        hint="bring more rows with --data, or let the node record for longer",
    )


def _digest(parts: Parts) -> str:
    digest = hashlib.sha256()
    sides: dict[str, Mapping[str, NDArray[Any]]] = {"calibration": parts.calibration, "held": parts.held}
    if parts.truth is not None:
        sides[TRUTH] = {TRUTH: parts.truth}
    for side, arrays in sides.items():
        for name, array in sorted(arrays.items()):
            digest.update(f"{side}/{name}/{array.dtype.str}/{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
