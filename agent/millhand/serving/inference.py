"""Open Inference Protocol v2 in JSON: requests to tensors, tensors to responses.

Rules where the protocol leaves room: `data` is flat or nested in row-major order, only the number of elements counts;
JSON has no NaN and no infinity, so none can come in, and one that a model gives goes out as null; BYTES are UTF-8.
Millhand's own request parameters: `deadline_ms` and `priority`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError, suggestion
from millhand.serving.tensors import DATATYPE_OF, DATATYPES

_LISTS: dict[str, Any] = {
    "BOOL": list[bool],
    "BYTES": list[str],
    "FP16": list[float],
    "FP32": list[float],
    "FP64": list[float],
}
_FLAT = {name: msgspec.json.Decoder(_LISTS.get(name, list[int])) for name in DATATYPES}


class InputTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw
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
    id: str
    wanted: tuple[str, ...]
    """The outputs asked for; empty for all."""
    deadline_ms: float | None
    priority: int


def read_body(body: bytes) -> InferRequest:
    """Read a JSON request. Raises InputError naming the tensor or the key, what came and what is expected."""
    try:
        request = _decode_body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"the body is no inference request: {error}",
            hint='send {"inputs": [{"name", "shape", "datatype", "data"}]}; JSON knows neither NaN nor Infinity',
        ) from error
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise InputError(f"tensor '{tensor.name}' is given twice", hint="name each input once")
        tensors[tensor.name] = _array(tensor)
    return InferRequest(
        tensors,
        request.id,
        tuple(output.name for output in request.outputs),
        _number(request.parameters, "deadline_ms"),
        int(_number(request.parameters, "priority") or 0),
    )


def read_request(request: Mapping[str, Any]) -> InferRequest:
    """The same from plain data (the control socket's)."""
    return read_body(msgspec.json.encode(request))


def encode_response(
    model: str, version: int, request: InferRequest, outputs: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """The response as plain data. Raises InputError for an output that the model does not give."""
    for name in request.wanted:
        if name not in outputs:
            raise InputError(
                f"model '{model}' has no output '{name}'{suggestion(name, outputs)}",
                hint=f"it gives {', '.join(outputs)}",
            )
    names = request.wanted or tuple(outputs)
    response: dict[str, Any] = {
        "model_name": model,
        "model_version": str(version),
        "outputs": [_tensor(name, outputs[name]) for name in names],
    }
    if request.id:
        response["id"] = request.id
    return response


def _array(tensor: InputTensor) -> NDArray[Any]:
    name, datatype = tensor.name, tensor.datatype
    if datatype not in DATATYPES:
        raise InputError(
            f"tensor '{name}': datatype '{datatype}' is not known{suggestion(datatype, DATATYPES)}",
            hint=f"use one of {', '.join(DATATYPES)}",
        )
    if any(size < 0 for size in tensor.shape):
        raise InputError(f"tensor '{name}': shape {tensor.shape} is negative", hint="give the shape of the data sent")
    elements = _elements(tensor)
    if len(elements) != math.prod(tensor.shape):
        raise InputError(
            f"tensor '{name}' has {len(elements)} elements, its shape {tensor.shape} needs {math.prod(tensor.shape)}",
            hint="send data that fit the shape",
        )
    if datatype == "BYTES":
        array = np.empty(len(elements), dtype=object)
        array[:] = [element.encode() for element in elements]
        return array.reshape(tensor.shape)
    try:
        with np.errstate(over="raise"):
            return np.array(elements, dtype=DATATYPES[datatype]).reshape(tensor.shape)
    except (OverflowError, FloatingPointError) as error:
        raise InputError(f"tensor '{name}' holds a value that is too large for {datatype}", hint="check it") from error


def _elements(tensor: InputTensor) -> list[Any]:
    try:
        flat: list[Any] = _FLAT[tensor.datatype].decode(tensor.data)
        return flat
    except msgspec.ValidationError as error:
        reason = str(error)
    # Nested, or wrong: the flat reading above is the quick way of most requests.
    elements = list(_leaves(msgspec.json.decode(tensor.data)))
    try:
        converted: list[Any] = msgspec.convert(elements, _LISTS.get(tensor.datatype, list[int]))
        return converted
    except msgspec.ValidationError as error:
        raise InputError(
            f"tensor '{tensor.name}': data is not {tensor.datatype}: {reason if not elements else error}",
            hint=f"send {tensor.datatype} values, flat or nested in row-major order",
        ) from error


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for item in data:
            yield from _leaves(item)
    else:
        yield data


def _number(parameters: Mapping[str, Any], key: str) -> float | None:
    value = parameters.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or (key == "deadline_ms" and value <= 0):
        raise InputError(f"parameter '{key}' = {value!r} is not valid", hint="give a number; a deadline is above 0")
    return float(value)


def _tensor(name: str, array: NDArray[Any]) -> dict[str, Any]:
    flat = array.ravel()
    if array.dtype == object:
        texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in flat]
        return {"name": name, "datatype": "BYTES", "shape": list(array.shape), "data": texts}
    data: list[Any] = flat.tolist()
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        data = [value if math.isfinite(value) else None for value in data]
    return {"name": name, "datatype": DATATYPE_OF[array.dtype.name], "shape": list(array.shape), "data": data}
