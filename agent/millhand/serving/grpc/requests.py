"""ModelInferRequest to tensors, tensors to ModelInferResponse.

Tensors come raw (`raw_input_contents`, views of the message's bytes) or typed (`contents`), not both in one request;
answers are always raw, as Triton's are. FP16 comes raw only; BF16 is refused, for NumPy does not know it. Request
parameters: `timeout` in µs (Triton's) and `deadline_ms` bound the request, the shorter counts; a higher `priority`
goes first. Sequence parameters are ignored: models keep no state. Shared memory and classification are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from millhand.errors import InputError, suggestion
from millhand.serving.grpc import wire
from millhand.serving.tensors import DATATYPE_OF, DATATYPES, dtype_name

_DTYPES = {datatype: np.dtype(name) for datatype, name in DATATYPES.items()}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_FIELD_DTYPES = {"int_contents": np.dtype("int32"), "uint_contents": np.dtype("uint32")}
_REFUSED = {
    "shared_memory_region": "send the tensor in the request: shared memory of clients is not served",
    "classification": "ask for the output itself: classification is not served",
}
FINAL_RESPONSE = "triton_enable_empty_final_response"


class InferCall(msgspec.Struct):
    """A request as the workers take it."""

    model: str
    version: str
    """"" for the highest."""
    id: str
    tensors: dict[str, NDArray[Any]]
    wanted: tuple[str, ...]
    """The outputs asked for; empty for all."""
    budget_ms: float | None
    priority: int
    marks_final: bool
    """The client of a stream wants to be told that an answer is the last of its request, as each is."""


def read_request(message: bytes) -> InferCall:
    """Read a ModelInferRequest. Raises InputError naming the tensor or the key, what came and what is expected."""
    try:
        request = wire.ModelInferRequest.FromString(message)
    except DecodeError as error:
        raise InputError("the message is no inference.ModelInferRequest", hint="mend the client") from error
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(
            f"raw_input_contents holds {len(raw)} tensors, inputs names {len(request.inputs)}",
            hint="send one for each input, or `contents` in every input",
        )
    tensors: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in tensors:
            raise InputError(f"tensor '{name}' is given twice", hint="name each input once")
        _check_parameters(name, tensor.parameters)
        dtype, shape = _dtype(name, tensor.datatype), tuple(tensor.shape)
        if shape and min(shape) < 0:
            raise InputError(f"tensor '{name}': shape {list(shape)} is negative", hint="give the shape of the data")
        if raw:
            if tensor.HasField("contents"):
                raise InputError(
                    f"tensor '{name}' has contents beside raw_input_contents", hint="send one of both in a request"
                )
            tensors[name] = _from_raw(name, dtype, shape, raw[index])
        else:
            tensors[name] = _from_contents(name, tensor.datatype, dtype, shape, tensor.contents)
    for output in request.outputs:
        _check_parameters(output.name, output.parameters)
    parameters = request.parameters
    return InferCall(
        request.model_name,
        request.model_version,
        request.id,
        tensors,
        tuple(output.name for output in request.outputs),
        _budget_ms(parameters) if parameters else None,
        int(_number(parameters, "priority") or 0) if parameters else 0,
        FINAL_RESPONSE in parameters and parameters[FINAL_RESPONSE].bool_param,
    )


def write_response(call: InferCall, version: int, outputs: Mapping[str, NDArray[Any]]) -> wire.ModelInferResponse:
    """The response. Raises InputError for an output that the model does not give."""
    response = wire.ModelInferResponse(model_name=call.model, model_version=str(version), id=call.id)
    for name in call.wanted or outputs:
        array = outputs.get(name)
        if array is None:
            raise InputError(
                f"model '{call.model}' has no output '{name}'{suggestion(name, outputs)}",
                hint=f"it gives {', '.join(outputs)}",
            )
        response.outputs.add(name=name, datatype=DATATYPE_OF[dtype_name(array.dtype)], shape=array.shape)
        response.raw_output_contents.append(_to_raw(array))
    if call.marks_final:
        response.parameters["triton_final_response"].bool_param = True
    return response


def _dtype(name: str, datatype: str) -> np.dtype[Any]:
    dtype = _DTYPES.get(datatype)
    if dtype is None:
        hint = "send it as FP32" if datatype == "BF16" else f"use one of {', '.join(DATATYPES)}"
        raise InputError(
            f"tensor '{name}': datatype '{datatype}' is not served{suggestion(datatype, DATATYPES)}", hint=hint
        )
    return dtype


def _from_raw(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], data: bytes) -> NDArray[Any]:
    count = math.prod(shape)
    if dtype.hasobject:
        return _strings(name, shape, _split(name, data))
    if count * dtype.itemsize != len(data):
        raise InputError(
            f"tensor '{name}' has {len(data)} bytes, its shape {list(shape)} of {DATATYPE_OF[dtype_name(dtype)]} "
            f"needs {count * dtype.itemsize}",
            hint="send data that fit the shape",
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _from_contents(
    name: str, datatype: str, dtype: np.dtype[Any], shape: tuple[int, ...], contents: wire.InferTensorContents
) -> NDArray[Any]:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise InputError(f"tensor '{name}' of {datatype} has no typed contents", hint="send it in raw_input_contents")
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InputError(
                f"tensor '{name}' of {datatype} has {descriptor.name}, expected {field}",
                hint=f"put its data into {field}, or into raw_input_contents",
            )
    elements = getattr(contents, field)
    if datatype == "BYTES":
        return _strings(name, shape, list(elements))
    if len(elements) != math.prod(shape):
        raise _wrong_count(name, shape, len(elements))
    array = np.fromiter(elements, _FIELD_DTYPES.get(field, dtype), len(elements))
    if array.dtype != dtype:  # integers of 8 and 16 bits travel as 32
        narrow = array.astype(dtype)
        if not np.array_equal(narrow, array):
            raise InputError(f"tensor '{name}' holds a value that is too large for {datatype}", hint="check it")
        array = narrow
    return array.reshape(shape)


def _strings(name: str, shape: tuple[int, ...], elements: list[bytes]) -> NDArray[Any]:
    if len(elements) != math.prod(shape):
        raise _wrong_count(name, shape, len(elements))
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _wrong_count(name: str, shape: tuple[int, ...], count: int) -> InputError:
    return InputError(
        f"tensor '{name}' has {count} elements, its shape {list(shape)} needs {math.prod(shape)}",
        hint="send data that fit the shape",
    )


def _split(name: str, data: bytes) -> list[bytes]:
    """The elements of a raw BYTES tensor."""
    elements, position, end = [], 0, len(data)
    while position + 4 <= end:
        (size,) = struct.unpack_from("<I", data, position)
        position += 4 + size
        elements.append(data[position - size : position])
    if position != end:
        raise InputError(
            f"tensor '{name}' of BYTES ends inside an element", hint="send a 4-byte little-endian length before each"
        )
    return elements


def _to_raw(array: NDArray[Any]) -> bytes:
    if array.dtype.hasobject:
        elements = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
        return b"".join(struct.pack("<I", len(item)) + item for item in elements)
    return array.tobytes()


def _check_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    for key, remedy in _REFUSED.items() if parameters else ():
        if key in parameters:
            raise InputError(f"tensor '{name}': parameter '{key}' is not served", hint=remedy)


def _budget_ms(parameters: Mapping[str, wire.InferParameter]) -> float | None:
    timeout_us, deadline_ms = _number(parameters, "timeout"), _number(parameters, "deadline_ms")
    if deadline_ms is not None and deadline_ms <= 0:
        raise InputError(f"parameter 'deadline_ms' = {deadline_ms} is not valid", hint="give a number above 0")
    budgets = [budget for budget in ((timeout_us or 0) / 1000, deadline_ms or 0) if budget > 0]
    return min(budgets, default=None)


def _number(parameters: Mapping[str, wire.InferParameter], key: str) -> float | None:
    if key not in parameters:
        return None
    parameter = parameters[key]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param", "double_param") or not math.isfinite(getattr(parameter, kind)):
        raise InputError(f"parameter '{key}' is not valid", hint="send it as int64_param, uint64_param or double_param")
    return float(getattr(parameter, kind))
