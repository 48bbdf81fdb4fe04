"""Outputs as a response of the Open Inference Protocol v2: JSON, binary data, and classes."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError
from millhand.serving.inference import InferRequest, OutputWish
from millhand.serving.tensors import DATATYPE_OF, dtype_name, unknown_output


def write_response(
    model: str,
    version: int,
    request: InferRequest,
    outputs: Mapping[str, NDArray[Any]],
    labels: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[Any]]:
    """The response's JSON as plain data, and the buffers of binary data that follow it.

    `labels` name an output's classes, where it is asked for as a classification. Raises InputError for an output that
    the model does not give.
    """
    wishes = request.outputs or [OutputWish(name) for name in outputs]
    entries: list[dict[str, Any]] = []
    buffers: list[Any] = []
    for wish in wishes:
        name, parameters = wish.name, wish.parameters
        array = outputs.get(name)
        if array is None:
            raise unknown_output(model, name, outputs)
        if parameters.get("classification"):
            array = classify(name, array, parameters["classification"], labels.get(name, ()))
        if parameters.get("binary_data", request.binary):
            data = raw_bytes(array) if array.dtype == object else _view(array)
            buffers.append(data)
            entries.append(_entry(name, array) | {"parameters": {"binary_data_size": len(data)}})
        else:
            entries.append(_entry(name, array) | {"data": _values(array)})
    response: dict[str, Any] = {"model_name": model, "model_version": str(version), "outputs": entries}
    if request.id:
        response["id"] = request.id
    return response, buffers


def encode_response(
    model: str, version: int, request: InferRequest, outputs: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """The response as plain data (the control socket's), without binary data."""
    wishes = [OutputWish(name) for name in request.wanted]
    plain = InferRequest(request.tensors, request.id, wishes)
    return write_response(model, version, plain, outputs)[0]


def _entry(name: str, array: NDArray[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPE_OF[dtype_name(array.dtype)], "shape": array.shape}


def _values(array: NDArray[Any]) -> list[Any]:
    flat = array.ravel()
    if array.dtype == object:
        return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in flat]
    data: list[Any] = flat.tolist()
    if array.dtype.kind == "f" and not np.isfinite(flat).all():
        data = [value if math.isfinite(value) else None for value in data]
    return data


def _view(array: NDArray[Any]) -> memoryview:
    """Its bytes in row-major order, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def raw_bytes(array: NDArray[Any]) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
    return b"".join([struct.pack("<I", len(item)) + item for item in items])


def classify(name: str, array: NDArray[Any], count: int, labels: Sequence[str]) -> NDArray[Any]:
    """Triton's classification extension: the `count` largest of each row as BYTES "value:index[:label]"."""
    if array.dtype.kind not in "iuf":
        raise InputError(
            f"output '{name}' of {DATATYPE_OF[dtype_name(array.dtype)]} has no classes", hint="ask for it as it is"
        )
    rows = array.reshape(array.shape[0], -1)
    falling = -rows if array.dtype.kind == "f" else ~rows  # of integers the complement: it cannot overflow
    count = min(count, rows.shape[1])
    found = np.empty((len(rows), count), dtype=object)
    for number, row in enumerate(rows):
        for place, index in enumerate(np.argsort(falling[number], kind="stable")[:count]):
            label = f":{labels[index]}" if index < len(labels) else ""
            found[number, place] = f"{row[index]:f}:{index}{label}".encode()
    return found
