"""ModelInferRequest to tensors, tensors to ModelInferResponse.

Tensors come raw (`raw_input_contents`, views of the message's bytes) or typed (`contents`), not both in one request;
answers are always raw, as Triton's are. FP16 comes raw only; BF16 is refused, for NumPy does not know it. Request
parameters: `timeout` in µs (Triton's) and `deadline_ms` bound the request, the shorter counts; a higher `priority`
goes first. Sequence parameters are ignored: models keep no state. Shared memory is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from millhand.errors import InputError, suggestion
from millhand.serving.answer import classify, raw_bytes
from millhand.serving.grpc import wire
from millhand.serving.inference import DEADLINE_MS_CAP, misfit, read_strings
from millhand.serving.tensors import DATATYPE_OF, DATATYPES, dtype_name, unknown_output

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
WHOLE_CAP = 1 << 31
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
    classes: dict[str, int]
    """Outputs that are asked for as the names of so many classes."""
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
    classes = {}
    for output in request.outputs:
        _check_parameters(output.name, output.parameters)
        if "classification" in output.parameters:
            classes[output.name] = max(_whole(output.parameters, "classification"), 1)
    parameters = request.parameters
    return InferCall(
        request.model_name,
        request.model_version,
        request.id,
        tensors,
        tuple(output.name for output in request.outputs),
        _budget_ms(parameters) if parameters else None,
        _whole(parameters, "priority") if parameters else 0,
        classes,
        FINAL_RESPONSE in parameters and parameters[FINAL_RESPONSE].bool_param,
    )


def write_response(
    call: InferCall,
    version: int,
    outputs: Mapping[str, NDArray[Any]],
    labels: Mapping[str, Sequence[str]],
) -> wire.ModelInferResponse:
    """The response; `labels` names the classes of an output.

    Raises InputError for an output that the model does not give.
    """
    response = wire.ModelInferResponse(model_name=call.model, model_version=str(version), id=call.id)
    for name in call.wanted or outputs:
        array = outputs.get(name)
        if array is None:
            raise unknown_output(call.model, name, outputs)
        if name in call.classes:
            array = classify(name, array, call.classes[name], labels.get(name, ()))
        response.outputs.add(name=name, datatype=DATATYPE_OF[dtype_name(array.dtype)], shape=array.shape)
        response.raw_output_contents.append(raw_bytes(array))
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
        return read_strings(name, data, count).reshape(shape)
    if count * dtype.itemsize != len(data):
        raise InputError(
            f"tensor '{name}' has {len(data)} bytes, its shape {list(shape)} of {DATATYPE_OF[dtype_name(dtype)]} "
            f"needs {count * dtype.itemsize}",
            hint="send data that fit the shape",
        )
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise InputError(f"tensor '{name}' of BOOL holds bytes other than 0 and 1", hint="send one byte a value")
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
    if len(elements) != math.prod(shape):
        raise InputError(
            f"tensor '{name}' has {len(elements)} elements, its shape {list(shape)} needs {math.prod(shape)}",
            hint="send data that fit the shape",
        )
    if dtype.hasobject:
        array = np.empty(len(elements), dtype=object)
        array[:] = list(elements)
        return array.reshape(shape)
    array = np.fromiter(elements, _FIELD_DTYPES.get(field, dtype), len(elements))
    if array.dtype != dtype:  # integers of 8 and 16 bits travel as 32
        narrow = array.astype(dtype)
        if not np.array_equal(narrow, array):
            raise misfit(name, datatype, shape, array.tolist())
        array = narrow
    return array.reshape(shape)


def _check_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    if parameters and "shared_memory_region" in parameters:
        raise InputError(
            f"tensor '{name}': shared memory regions are not served", hint="send the tensor in the request"
        )


def _budget_ms(parameters: Mapping[str, wire.InferParameter]) -> float | None:
    timeout_us, deadline_ms = _number(parameters, "timeout"), _number(parameters, "deadline_ms")
    if deadline_ms is not None and deadline_ms <= 0:
        raise InputError(f"parameter 'deadline_ms' = {deadline_ms} is not valid", hint="give a number above 0")
    budgets = [min(budget, DEADLINE_MS_CAP) for budget in ((timeout_us or 0) / 1000, deadline_ms or 0) if budget > 0]
    return min(budgets, default=None)


def _number(parameters: Mapping[str, wire.InferParameter], key: str) -> float | None:
    if key not in parameters:
        return None
    parameter = parameters[key]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in ("int64_param", "uint64_param", "double_param") or not math.isfinite(getattr(parameter, kind)):
        raise InputError(f"parameter '{key}' is not valid", hint="send it as int64_param, uint64_param or double_param")
    return float(getattr(parameter, kind))


def _whole(parameters: Mapping[str, wire.InferParameter], key: str) -> int:
    number = _number(parameters, key) or 0
    if number % 1 or abs(number) >= WHOLE_CAP:
        raise InputError(f"parameter '{key}' = {number:g} is not valid", hint="give a small whole number")
    return int(number)
