"""Files and standard input as a model's input tensors; output tensors as files."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from millhand.cli.files import TENSOR_FORMATS, written
from millhand.cli.tensor_csv import Spec, read_csv, write_csv
from millhand.errors import InputError, suggestion
from millhand.serving.tensors import DATATYPE_OF, DATATYPES, fits


def format_of(source: str, stated: str | None) -> str:
    """The format of an input by its name, JSON for standard input, unless it is stated. Raises InputError."""
    found = stated or ("json" if source == "-" else _suffix(source))
    if found not in TENSOR_FORMATS:
        raise InputError(
            f"the name of '{source}' does not tell its format", hint=f"give --format {'|'.join(TENSOR_FORMATS)}"
        )
    return found


def output_format_of(path: Path) -> str:
    """The format of an output by its name. Raises InputError."""
    found = _suffix(path.name)
    if found not in TENSOR_FORMATS:
        endings = ", ".join(f".{name}" for name in TENSOR_FORMATS)
        raise InputError(
            f"the name of the output '{path}' does not tell its format", hint=f"end it in one of {endings}"
        )
    return found


def _suffix(name: str) -> str:
    return Path(name).suffix.lower().removeprefix(".")


def read_bytes(source: str) -> bytes:
    """A file, or standard input for `-`. Raises InputError."""
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"'{source}' cannot be read: {error.strerror}", hint="give the path of a file") from error


def read_json(source: str) -> dict[str, Any]:
    """A request of the Open Inference Protocol v2 as plain data. Raises InputError."""
    try:
        request = json.loads(read_bytes(source).decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        hint = "send an object with 'inputs'; --format csv|npy|npz for other data"
        raise InputError(f"'{_label(source)}' is not valid JSON: {error}", hint=hint) from error
    if not isinstance(request, dict) or "inputs" not in request:
        raise InputError(
            f"'{_label(source)}' has no key 'inputs'",
            hint='{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
        )
    return request


def _label(source: str) -> str:
    return "stdin" if source == "-" else source


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def specs_of(inputs: Sequence[Mapping[str, Any]]) -> list[Spec]:
    """The inputs of a model, as its metadata describe them."""
    return [Spec(tensor["name"], tensor["datatype"], tuple(tensor["shape"])) for tensor in inputs]


def read_tensors(source: str, kind: str, specs: Sequence[Spec]) -> dict[str, NDArray[Any]]:
    """Read CSV, .npy or .npz as arrays of the inputs' dtypes and shapes; all have as many rows. Raises InputError.

    An array without the batch dimension becomes a batch of one.
    """
    data, source = read_bytes(source), _label(source)
    if kind == "csv":
        try:
            tensors = read_csv(data.decode("utf-8-sig"), specs, source)
        except UnicodeDecodeError as error:
            raise InputError(f"'{source}' is not UTF-8 text: {error}", hint="save it as UTF-8") from error
    else:
        arrays = _arrays(data, kind, source, specs)
        tensors = {spec.name: _fitted(arrays[spec.name], spec, source) for spec in specs}
    rows = {name: len(array) for name, array in tensors.items()}
    if len(set(rows.values())) > 1 or not all(rows.values()):
        shown = ", ".join(f"'{name}' {count}" for name, count in rows.items())
        raise InputError(f"'{source}': rows of the inputs: {shown}", hint="give all inputs as many rows, at least one")
    return tensors


def _arrays(data: bytes, kind: str, source: str, specs: Sequence[Spec]) -> dict[str, NDArray[Any]]:
    """Input name -> array as the file holds it. One array alone fits one input alone, whatever its name."""
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        how = "numpy.savez" if kind == "npz" else "numpy.save"
        raise InputError(f"'{source}' cannot be read as .{kind}: {error}", hint=f"write it with {how}") from error
    if len(arrays) == len(specs) == 1:
        return {specs[0].name: next(iter(arrays.values()))}
    names = [spec.name for spec in specs]
    if "" in arrays:
        raise InputError(
            f"'{source}' holds one array, the model has the inputs {', '.join(names)}",
            hint="write an .npz with one array an input: numpy.savez(path, name=array, …)",
        )
    for name in arrays:
        if name not in names:
            raise InputError(
                f"'{source}': array '{name}' is no input of the model{suggestion(name, names)}",
                hint=f"name the arrays {', '.join(names)}",
            )
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"'{source}' has no array '{missing[0]}'", hint=f"it must hold {', '.join(names)}")
    return arrays


def _fitted(array: NDArray[Any], spec: Spec, source: str) -> NDArray[Any]:
    """The array in the input's dtype and shape. Raises InputError where values or dimensions do not fit."""
    where = f"'{source}', input '{spec.name}'"
    if array.ndim == len(spec.shape) - 1:
        array = array[np.newaxis]
    if not fits(array.shape, spec.shape):
        raise InputError(
            f"{where}: shape {list(array.shape)}, expected {list(spec.shape)}",
            hint="-1 stands for any size; the first dimension is the batch",
        )
    return converted(array, spec.datatype, where)


def converted(array: NDArray[Any], datatype: str, where: str) -> NDArray[Any]:
    """The array in the datatype's dtype, no value changed but by rounding. Raises InputError naming the first bad."""
    dtype = np.dtype(DATATYPES[datatype])
    if datatype == "BYTES":
        if array.dtype.kind not in "US":
            raise _unfit(where, f"dtype {array.dtype} is no text", datatype)
        encoded = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
        return encoded.astype(object)
    if array.dtype.kind not in "biuf":
        raise _unfit(where, f"dtype {array.dtype} is no number", datatype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            rounded = array.astype(dtype)
        _check(np.isfinite(rounded) | ~np.isfinite(array), array, where, f"is too large for {datatype}", datatype)
        return rounded
    _check(np.isfinite(array), array, where, "is no finite number", datatype)
    if dtype.kind == "b":
        _check((array == 0) | (array == 1), array, where, "is neither 0 nor 1", datatype)
        return array.astype(dtype)
    if array.dtype.kind == "f":
        _check(np.mod(array, 1) == 0, array, where, "is no whole number", datatype)
    limits = np.iinfo(dtype)
    for place in {int(array.argmin()), int(array.argmax())} if array.size else ():
        value = int(array.flat[place])
        if not limits.min <= value <= limits.max:
            raise _unfit(where, f"{value} does not fit {datatype}, {limits.min} to {limits.max}", datatype)
    return array.astype(dtype)


def _check(good: NDArray[Any], array: NDArray[Any], where: str, what: str, datatype: str) -> None:
    if not good.all():
        place = [int(index) for index in np.argwhere(~good)[0]]
        raise _unfit(where, f"{array[tuple(place)]} at {place} {what}", datatype)


def _unfit(where: str, what: str, datatype: str) -> InputError:
    return InputError(f"{where}: {what}", hint=f"the input takes {datatype}")


def request_of(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """A request of the Open Inference Protocol v2 as plain data."""
    return {"inputs": [_plain(name, array) for name, array in tensors.items()]}


def _plain(name: str, array: NDArray[Any]) -> dict[str, Any]:
    data = array.ravel().tolist()
    if array.dtype == object:
        try:
            data = [element.decode() for element in data]
        except UnicodeDecodeError as error:
            raise InputError(f"input '{name}' holds bytes that are no UTF-8: {error}", hint="send text") from error
    return {"name": name, "datatype": DATATYPE_OF[array.dtype.name], "shape": list(array.shape), "data": data}


def outputs_of(response: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The output tensors of a response; a null, which is what JSON has for NaN, becomes NaN, text becomes str."""
    return {item["name"]: _output(item) for item in response["outputs"]}


def _output(item: Mapping[str, Any]) -> NDArray[Any]:
    if item["datatype"] == "BYTES":
        return np.array(item["data"], dtype=np.str_).reshape(item["shape"])
    return np.array(item["data"], dtype=DATATYPES[item["datatype"]]).reshape(item["shape"])


def write_outputs(path: Path, kind: str, document: Mapping[str, Any], reading: Mapping[str, Sequence[Any]]) -> None:
    """Write a response's outputs. CSV holds the columns of `reading` too. Raises InputError."""
    outputs = outputs_of(document)
    if kind == "npy" and len(outputs) > 1:
        raise InputError(f"'{path}' can hold one output; the model gives {', '.join(outputs)}", hint="write .npz")
    buffer = io.BytesIO()
    if kind == "json":
        buffer.write(json.dumps(document, indent=2, ensure_ascii=False).encode())
    elif kind == "csv":
        buffer.write(write_csv(outputs, reading).encode())
    elif kind == "npz":
        np.savez(buffer, **outputs)  # type: ignore[arg-type]
    else:
        np.save(buffer, next(iter(outputs.values())))
    with written(path) as file:
        file.write(buffer.getbuffer())
