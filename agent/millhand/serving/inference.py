"""Inference requests of the Open Inference Protocol v2: JSON, and tensors as binary data (responses: answer.py).

Decided here where the protocol leaves room: `data` is flat or nested in row-major order, only the number of elements
counts; JSON has no NaN and no infinity, so none can come in, and one that a model gives goes out as null; binary data
may hold both; BYTES are UTF-8 in JSON and anything in binary data. Parameters of requests: `deadline_ms` (millhand's),
`timeout` (Triton's, microseconds), `priority`, `binary_data_output`; others are ignored, but those of shared memory
are refused. The binary tensor data extension is Triton's:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, suggestion
from millhand.serving.quick_json import read_quickly
from millhand.serving.tensors import DATATYPES

_LISTS: dict[str, Any] = {
    "BOOL": list[bool],
    "BYTES": list[str],
    "FP16": list[float],
    "FP32": list[float],
    "FP64": list[float],
}
DIMENSIONS_CAP = 32
DEADLINE_MS_CAP = 1e9
"""Longer ones mean the same: 12 days."""
NUMBER_CAP = 1e20
"""Parameters beyond are mistakes; Triton's `timeout` may be any 64-bit number."""

_NUMBERS = {
    "deadline_ms": "give milliseconds, a number above 0",
    "timeout": "give microseconds, a number from 0 on; 0 is none",
    "priority": "give a small whole number; 0 is the default, a higher one goes first",
}
"""What to give for the parameters that are numbers."""
_FLAT = {name: msgspec.json.Decoder(_LISTS.get(name, list[int])) for name in DATATYPES}
_DTYPES = {name: np.dtype(dtype) for name, dtype in DATATYPES.items()}


class InputTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: dict[str, Any] = {}


class OutputWish(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class Body(msgspec.Struct):
    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputWish] = []


_decode_body = msgspec.json.Decoder(Body).decode


class InferRequest(msgspec.Struct):
    """A request as the pool and the workers take it."""

    tensors: dict[str, NDArray[Any]]
    """Views of the body where they came as binary data."""
    id: str = ""
    outputs: list[OutputWish] = []
    """The outputs asked for; empty for all."""
    deadline_ms: float | None = None
    priority: int = 0
    binary: bool = False
    """Whether outputs that do not say otherwise go back as binary data."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """The names of the outputs asked for, each once."""
        return tuple(dict.fromkeys([wish.name for wish in self.outputs]))

    @property
    def all_binary(self) -> bool:
        """Whether every output goes back as binary data, as it is."""
        if not self.outputs:
            return self.binary
        return all(
            wish.parameters.get("binary_data", self.binary) is True and not wish.parameters.get("classification")
            for wish in self.outputs
        )


def read_body(body: bytes | memoryview, header_bytes: int | None = None) -> InferRequest:
    """Read a request. `header_bytes`: the size of its JSON where binary data follow it; None where it is JSON alone.

    Raises InputError naming the tensor or the key, what came and what is expected.
    """
    if header_bytes is None:
        request, elements = _read_json(body)
        binary = memoryview(b"")
    else:
        if not 0 < header_bytes <= len(body):
            raise InputError(
                f"Inference-Header-Content-Length = {header_bytes} does not fit the body of {len(body)} bytes",
                hint="give the number of bytes of the JSON that begins the body",
            )
        request, elements = _decode(body[:header_bytes]), {}
        binary = memoryview(body)[header_bytes:]
    return _read(request, elements, binary)


def _read(request: Body, elements: Mapping[str, Any], binary: memoryview) -> InferRequest:
    """A request, of which some inputs may have been read already, and some may lie in `binary`."""
    tensors: dict[str, NDArray[Any]] = {}
    position = 0
    for tensor in request.inputs:
        name = tensor.name
        if name in tensors:
            raise InputError(f"tensor '{name}' is given twice", hint="name each input once")
        _check_head(tensor)
        size = tensor.parameters.get("binary_data_size") if tensor.parameters else None
        if size is None:
            found = elements.get(name)
            tensors[name] = _array(tensor, _elements(tensor) if found is None else found)
        else:
            tensors[name] = _binary(tensor, size, binary, position)
            position += size
    if position != len(binary):
        raise InputError(
            f"{len(binary)} bytes follow the JSON, the tensors' binary_data_size add up to {position}",
            hint="make Inference-Header-Content-Length and binary_data_size fit the body",
        )
    return _request(request, tensors)


def read_raw(body: bytes | memoryview, specs: Sequence[Mapping[str, Any]]) -> InferRequest:
    """Read a raw binary request (Inference-Header-Content-Length: 0): the body is the model's only input.

    `specs`: the model's inputs (`name`, `datatype`, `shape`). The batch is what the size says, so only the first
    dimension may be free; one element of BYTES is the whole body. Raises InputError.
    """
    if len(specs) != 1 or any(size < 0 for size in specs[0]["shape"][1:]):
        raise InputError(
            "a raw binary request needs a model with one input that is free in its first dimension alone",
            hint="send the JSON header as well, with its size in Inference-Header-Content-Length",
        )
    name, datatype, shape = specs[0]["name"], specs[0]["datatype"], list(specs[0]["shape"][1:])
    if datatype == "BYTES":
        data: Any = struct.pack("<I", len(body)) + body
        rows = 1
    else:
        data, row_bytes = body, math.prod(shape) * _DTYPES[datatype].itemsize
        rows = len(body) // max(row_bytes, 1)
        if rows * row_bytes != len(body):
            raise InputError(
                f"the body of {len(body)} bytes is no multiple of {row_bytes}, the bytes of a row of input '{name}' "
                f"({datatype}, {shape})",
                hint="send whole rows",
            )
    tensor = InputTensor(name, [rows, *shape], datatype)
    return InferRequest({name: _binary(tensor, len(data), memoryview(data), 0)}, binary=True)


def read_request(request: Mapping[str, Any]) -> InferRequest:
    """The same from plain data (the control socket's), whose numbers may be NaN or infinite."""
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(tensor, dict) for tensor in inputs):
        return read_body(msgspec.json.encode(request))  # it says what is wrong
    bare = [{key: value for key, value in tensor.items() if key != "data"} for tensor in inputs]
    body = _decode(msgspec.json.encode({**request, "inputs": bare}))
    elements = {}
    for tensor, entry in zip(body.inputs, inputs, strict=True):
        _check_head(tensor)
        if "data" in entry:
            elements[tensor.name] = _flattened(tensor, entry["data"])
    return _read(body, elements, memoryview(b""))


def _read_json(body: bytes | memoryview) -> tuple[Body, dict[str, NDArray[Any]]]:
    """A request, and the elements of those inputs that could be read quickly."""
    quick = read_quickly(body)
    if quick is not None:
        try:
            return msgspec.convert(quick[0], Body), quick[1]
        except msgspec.ValidationError:
            pass  # the plain reader says what is wrong
    return _decode(body), {}


def _decode(body: bytes | memoryview) -> Body:
    try:
        return _decode_body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"the body is no inference request: {error}",
            hint='send {"inputs": [{"name", "shape", "datatype", "data"}]}; JSON knows neither NaN nor Infinity',
        ) from error


def _request(body: Body, tensors: dict[str, NDArray[Any]]) -> InferRequest:
    parameters = body.parameters
    for wish in body.outputs:
        if wish.parameters:
            _check_wish(wish)
    if not parameters:
        return InferRequest(tensors, body.id, body.outputs)
    deadline_ms = _number(parameters, "deadline_ms")
    timeout_us = _number(parameters, "timeout")
    if deadline_ms is None and timeout_us:  # Triton: 0 is none
        deadline_ms = timeout_us / 1000
    if deadline_ms is not None:
        deadline_ms = min(deadline_ms, DEADLINE_MS_CAP)
    priority = _number(parameters, "priority") or 0
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise InputError(f"parameter 'binary_data_output' = {binary!r} is not valid", hint="give true or false")
    if priority % 1 or not -(1 << 31) <= priority < 1 << 31:
        raise InputError(f"parameter 'priority' = {priority:g} is not valid", hint=_NUMBERS["priority"])
    return InferRequest(tensors, body.id, body.outputs, deadline_ms, int(priority), binary)


def _check_wish(wish: OutputWish) -> None:
    binary, classes = wish.parameters.get("binary_data", False), wish.parameters.get("classification", 0)
    if not isinstance(binary, bool):
        raise InputError(f"output '{wish.name}': binary_data = {binary!r} is not valid", hint="give true or false")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise InputError(
            f"output '{wish.name}': classification = {classes!r} is not valid", hint="ask for a number of classes"
        )
    _check_memory(wish.name, wish.parameters)


def _check_head(tensor: InputTensor) -> None:
    name, datatype = tensor.name, tensor.datatype
    if datatype not in DATATYPES:
        raise InputError(
            f"tensor '{name}': datatype '{datatype}' is not known{suggestion(datatype, DATATYPES)}",
            hint=f"use one of {', '.join(DATATYPES)}",
        )
    if len(tensor.shape) > DIMENSIONS_CAP:
        raise InputError(
            f"tensor '{name}' has {len(tensor.shape)} dimensions", hint=f"send no more than {DIMENSIONS_CAP}"
        )
    if tensor.shape and min(tensor.shape) < 0:
        raise InputError(f"tensor '{name}': shape {tensor.shape} is negative", hint="give the shape of the data sent")
    _check_memory(name, tensor.parameters)


def _check_memory(name: str, parameters: Mapping[str, Any]) -> None:
    if "shared_memory_region" in parameters:
        raise InputError(
            f"tensor '{name}': shared memory of clients is not served",
            hint="send inputs in the request; outputs come in the answer",
        )


def _array(tensor: InputTensor, elements: Any) -> NDArray[Any]:
    name, datatype = tensor.name, tensor.datatype
    if len(elements) != math.prod(tensor.shape):
        raise InputError(
            f"tensor '{name}' has {len(elements)} elements, its shape {tensor.shape} needs {math.prod(tensor.shape)}",
            hint="send data that fit the shape",
        )
    if datatype == "BYTES":
        array = np.empty(len(elements), dtype=object)
        array[:] = [element.encode() for element in elements]
        return _shaped(tensor, array)
    try:
        with np.errstate(over="raise"):
            if isinstance(elements, np.ndarray) and elements.dtype.kind in "iu":
                return _shaped(tensor, _narrowed(elements, _DTYPES[datatype]))
            return _shaped(tensor, np.asarray(elements, dtype=_DTYPES[datatype]))
    except (OverflowError, FloatingPointError) as error:
        raise misfit(name, datatype, tensor.shape, elements) from error


def misfit(name: str, datatype: str, shape: Sequence[int], elements: Sequence[Any]) -> InputError:
    """The error of a tensor that holds a number beyond its datatype: the first, with its place. `elements` are flat."""
    dtype = _DTYPES[datatype]
    if dtype.kind == "f":
        low, high = float(np.finfo(dtype).min), float(np.finfo(dtype).max)
        wide = np.asarray(elements, np.float64)
        with np.errstate(over="ignore"):  # what lies a little beyond a limit is rounded to it
            index = int(np.argmax(np.isinf(wide.astype(dtype)) & np.isfinite(wide)))
    else:
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        index = next(index for index, value in enumerate(elements) if not low <= value <= high)
    place = [int(part) for part in np.unravel_index(index, tuple(shape))]
    return InputError(
        f"tensor '{name}': {elements[index]} at {place} does not fit {datatype}, {low} to {high}",
        hint="send values within these limits",
    )


def _shaped(tensor: InputTensor, array: NDArray[Any]) -> NDArray[Any]:
    try:
        return array.reshape(tensor.shape)
    except (OverflowError, ValueError) as error:  # the number of elements fits: it is 0, and the rest is huge
        raise InputError(f"tensor '{tensor.name}': shape {tensor.shape} is too large", hint="check it") from error


def _narrowed(elements: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Integers as another integer type. Raises OverflowError where one does not fit."""
    limits = np.iinfo(dtype)
    if elements.size and not (limits.min <= int(elements.min()) and int(elements.max()) <= limits.max):
        raise OverflowError
    return elements.astype(dtype)


def _elements(tensor: InputTensor) -> list[Any]:
    if not tensor.data:
        raise InputError(
            f"tensor '{tensor.name}' has no data", hint="give `data`, or binary data and parameter binary_data_size"
        )
    try:
        flat: list[Any] = _FLAT[tensor.datatype].decode(tensor.data)
        return flat
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass  # nested, or wrong: the flat reading is the quick way of most requests
    try:
        data = msgspec.json.decode(tensor.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _no_data(tensor, error) from error
    return _flattened(tensor, data)


def _flattened(tensor: InputTensor, data: Any) -> list[Any]:
    """Nested elements in row-major order. Raises InputError for one that is none of the tensor's datatype."""
    try:
        elements: list[Any] = msgspec.convert(list(_leaves(data)), _LISTS.get(tensor.datatype, list[int]))
        return elements
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _no_data(tensor, error) from error


def _no_data(tensor: InputTensor, error: Exception) -> InputError:
    return InputError(
        f"tensor '{tensor.name}': data is not {tensor.datatype}: {error}",
        hint=f"send {tensor.datatype} values, flat or nested in row-major order",
    )


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


def _binary(tensor: InputTensor, size: Any, binary: memoryview, position: int) -> NDArray[Any]:
    """A view of the tensor's binary data (little-endian, row major; BYTES: each a 4-byte length and its bytes)."""
    name, count = tensor.name, math.prod(tensor.shape)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InputError(f"tensor '{name}': binary_data_size = {size!r} is no size", hint="give a number of bytes")
    if tensor.data:
        raise InputError(f"tensor '{name}' has both data and binary_data_size", hint="send one of them")
    if position + size > len(binary):
        raise InputError(
            f"tensor '{name}': binary_data_size = {size}, {len(binary) - position} bytes are left in the body",
            hint="check binary_data_size and Inference-Header-Content-Length",
        )
    if tensor.datatype == "BYTES":
        return _shaped(tensor, read_strings(name, bytes(binary[position : position + size]), count))
    dtype = _DTYPES[tensor.datatype]
    if size != count * dtype.itemsize:
        raise InputError(
            f"tensor '{name}' has {size} bytes of binary data, its shape {tensor.shape} of {tensor.datatype} "
            f"needs {count * dtype.itemsize}",
            hint="send data that fit the shape",
        )
    array = _shaped(tensor, np.frombuffer(binary, dtype, count, position))
    if dtype.kind == "b" and count and int(np.frombuffer(binary, np.uint8, count, position).max()) > 1:
        raise InputError(f"tensor '{name}' of BOOL holds bytes other than 0 and 1", hint="send one byte a value")
    return array


def read_strings(name: str, data: bytes, count: int) -> NDArray[Any]:
    elements: list[bytes] = []
    position = 0
    while position + 4 <= len(data) and len(elements) < count:
        (size,) = struct.unpack_from("<I", data, position)
        elements.append(data[position + 4 : position + 4 + size])
        position += 4 + size
    if position != len(data) or len(elements) != count:
        raise InputError(
            f"tensor '{name}': its {len(data)} bytes are not the {count} strings of its shape",
            hint="send each as a 4-byte little-endian length and its bytes",
        )
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array


def _number(parameters: Mapping[str, Any], key: str) -> float | None:
    value = parameters.get(key)
    if value is None:
        return None
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= NUMBER_CAP
    if wrong or (key == "deadline_ms" and value <= 0) or (key == "timeout" and value < 0):
        text = f"{value!r:.100}"
        raise InputError(f"parameter '{key}' = {text} is not valid", hint=_NUMBERS[key])
    return float(value)
